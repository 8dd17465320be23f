// The first page: rollouts that run, and every route with its live split, routers and load. Pure functions from
// data to elements.

import { h, table } from "./dom.js";
import { count, percent } from "./format.js";
import { ago, chip, empty, ladder, rolloutLink, weightBar } from "./parts.js";

const SHOWN = 50;

/** The page. `search`: what routes must contain; `all`: show more than the first ones. */
export function overviewView({ overview, search, all, now }) {
  if (!overview) return h("p", { class: "muted loading" }, "Loading…");
  return h(
    "div",
    { class: "page" },
    h("h1", { class: "sr", id: "title", tabindex: "-1" }, "Overview"),
    tiles(overview),
    h(
      "section",
      { "aria-labelledby": "running", "data-key": "running" },
      h("h2", { id: "running" }, "Running rollouts"),
      overview.rollouts.length ? h("div", { class: "cards" }, overview.rollouts.map((r) => rolloutCard(r, now))) : noRollout(),
    ),
    routes(overview, search, all),
  );
}

function tiles(overview) {
  const loads = overview.routers.map((r) => r.in_flight);
  const apart = overview.routes.filter((r) => !r.agreed).length;
  const { controller } = overview;
  const acts = controller?.alive;
  const rows = [
    ["Routes", count(overview.routes.length), apart ? `${apart} still being taken over` : "all routers agree", apart ? "warn" : ""],
    ["Rollouts", count(overview.rollouts.length), overview.rollouts.length ? "running" : "none running", ""],
    ["Routers", count(overview.routers.length), overview.routers.length ? "reporting" : "none reported lately", overview.routers.length ? "" : "warn"],
    ["In flight", count(loads.reduce((a, b) => a + b, 0)), "requests at upstreams", ""],
    ["Controller", acts ? "acting" : "away", acts ? controller.holder : "rollouts stand still", acts ? "" : "warn"],
  ];
  return h(
    "dl",
    { class: "tiles", "data-key": "tiles" },
    rows.map(([name, value, note, tone]) =>
      h("div", { class: `tile ${tone}`, "data-key": name }, h("dt", {}, name), h("dd", { class: "tile-value" }, value), h("dd", { class: "muted small", title: note }, note)),
    ),
  );
}

function noRollout() {
  return h(
    "div",
    { class: "card", "data-key": "none" },
    empty("No rollout is running", "Move a route onto a student, step by step, on evidence:", "stillhouse rollout start ROUTE MODEL"),
  );
}

function rolloutCard(r, now) {
  return h(
    "article",
    { class: "card rollout-card", "data-key": r.id, "aria-label": `Rollout of ${r.route}` },
    h("header", {}, h("h3", {}, rolloutLink(r.id, r.route)), chip(r.phase)),
    h("p", { class: "muted small" }, r.model_ref, " · in this phase for ", ago(r.phase_since, now)),
    ladder(r, true),
    h("p", { class: "reason" }, r.reason),
    h("p", { class: "muted small" }, `${percent(r.weight)} canary · ${count(r.canary_requests)} canary requests`),
  );
}

function routes(overview, search, all) {
  const wanted = search.trim().toLowerCase();
  const matches = (r) => [r.route, r.stable, r.canary ?? "", ...r.aliases].some((n) => n.toLowerCase().includes(wanted));
  const found = overview.routes.filter(matches);
  const shown = all ? found : found.slice(0, SHOWN);
  const phases = new Map(overview.rollouts.map((r) => [r.id, r]));
  return h(
    "section",
    { "aria-labelledby": "routes", "data-key": "routes" },
    h(
      "div",
      { class: "section-head" },
      h("h2", { id: "routes" }, "Routes"),
      h(
        "div",
        { class: "search" },
        h("label", { for: "search", class: "sr" }, "Search routes"),
        h("span", { class: "muted small", role: "status" }, wanted ? `${found.length} of ${overview.routes.length}` : ""),
        h("input", { id: "search", type: "search", value: search, placeholder: "Search routes, upstreams, aliases", autocomplete: "off", spellcheck: "false" }),
      ),
    ),
    h("div", { class: "card flush", "data-key": "list" }, routeList(overview, shown, wanted, phases)),
    found.length > shown.length
      ? h("button", { type: "button", "data-act": "all-routes", "data-key": "more" }, `Show ${found.length - shown.length} more`)
      : null,
  );
}

function routeList(overview, shown, wanted, phases) {
  if (!overview.routes.length) {
    return empty("No routes yet", "Routes come from the stack's configuration when it starts:", "stillhouse up --config stillhouse.yaml");
  }
  if (!shown.length) return empty("No route matches", `Nothing contains “${wanted}”.`);
  const columns = [
    { name: "route" }, { name: "split" }, { name: "in flight", class: "number" }, { name: "routers" }, { name: "rollout" },
  ];
  return table("Routes", columns, shown.map((r) => routeRow(r, phases)));
}

function routeRow(r, phases) {
  const running = phases.get(r.rollout_id);
  const aliases = r.aliases.length ? h("span", { class: "muted small" }, `also ${r.aliases.join(", ")}`) : null;
  const names = [
    h("span", { class: "arm stable" }, r.stable),
    r.canary ? [" ", h("span", { class: "arm canary" }, `${r.canary} ${percent(r.weight)}`)] : null,
    r.shadow ? [" ", h("span", { class: "muted small" }, `shadow ${r.shadow}`)] : null,
  ];
  return {
    key: r.route,
    cells: [
      h("div", { class: "stack" }, h("span", { class: "name" }, r.route), aliases),
      h("div", { class: "stack split" }, weightBar(r), h("span", { class: "small" }, names)),
      h("span", { class: "loads" }, load(r, r.stable, "stable"), r.canary ? load(r, r.canary, "canary") : null),
      agreement(r),
      running ? rolloutLink(running.id, chip(running.phase)) : h("a", { class: "muted small", href: `#/history?route=${encodeURIComponent(r.route)}` }, "history"),
    ],
  };
}

function load(r, upstream, arm) {
  return h("span", { class: `arm ${arm}` }, h("span", { class: "sr" }, `${arm} `), count(r.in_flight[upstream] ?? 0));
}

function agreement(r) {
  const all = Object.values(r.routers).reduce((a, b) => a + b, 0);
  const on = r.routers[r.split_version] ?? 0;
  if (!all) return h("span", { class: "muted small" }, `split ${r.split_version}, no router reports`);
  const text = `${on} of ${all} on split ${r.split_version}`;
  return h("span", { class: r.agreed ? "agreed small" : "apart small" }, r.agreed ? `✓ ${text}` : `… ${text}`);
}
