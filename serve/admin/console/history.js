// All rollouts and how they ended, a page at a time. Pure functions from data to elements.

import { h, table } from "./dom.js";
import { count, moment, percent } from "./format.js";
import { chip, empty, rolloutLink } from "./parts.js";

/** The page. `history`: {data, has_more} or null; `route`: only this one. */
export function historyView({ history, route }) {
  return h(
    "div",
    { class: "page" },
    h("h1", { id: "title", tabindex: "-1" }, route ? `History of ${route}` : "History"),
    route ? h("p", {}, h("a", { href: "#/history" }, "all routes")) : null,
    h("div", { class: "card flush", "data-key": "list" }, list(history, route)),
    history?.has_more ? h("button", { type: "button", "data-act": "more-history", "data-key": "more" }, "Older rollouts") : null,
  );
}

function list(history, route) {
  if (!history) return h("p", { class: "muted loading" }, "Loading…");
  if (!history.data.length) {
    const which = route ? `Route ${route} never had one.` : "Nothing was rolled out yet.";
    return empty("No rollouts", which, `stillhouse rollout start ${route ?? "ROUTE"} MODEL`);
  }
  const columns = [
    { name: "started" }, { name: "route" }, { name: "model" }, { name: "phase" },
    { name: "most weight", class: "number" }, { name: "canary requests", class: "number" }, { name: "why" },
  ];
  const rows = history.data.map((r) => ({
    key: r.id,
    cells: [
      rolloutLink(r.id, h("time", { datetime: new Date(1000 * r.created_at).toISOString() }, moment(r.created_at))),
      r.route, r.model_ref, chip(r.phase), percent(r.max_weight), count(r.canary_requests),
      h("span", { class: "why" }, r.reason),
    ],
  }));
  return table("Rollouts", columns, rows);
}
