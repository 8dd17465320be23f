// One rollout on one page: where it is and why, what can be asked of it, its evidence and its audit trail.
// Pure functions from data to elements; buttons carry data-act, app.js acts.

import { h, table } from "./dom.js";
import { evidence, progress } from "./evidence.js";
import { count, duration, latency, moment, percent, rate, tone, words } from "./format.js";
import { ago, chip, empty, ladder, weightBar } from "./parts.js";

/** The page. `trail`: {entries, more, looks}; `online`: false while nothing can be asked. */
export function rolloutView({ rollout, trail, now, online, controller }) {
  if (!rollout) return h("p", { class: "muted loading" }, "Loading…");
  return h(
    "div",
    { class: "page" },
    heading(rollout, now, online),
    h(
      "div",
      { class: "columns" },
      h(
        "div",
        { class: "column" },
        ramp(rollout, now, controller),
        card("Evidence", "evidence", evidence(rollout), legend(rollout)),
        card("Counts by arm", "counts", arms(rollout)),
      ),
      h("div", { class: "column side" }, audit(trail), facts(rollout, now)),
    ),
  );
}

function card(title, key, ...content) {
  const id = `card-${key}`;
  return h("section", { class: "card", "data-key": key, "aria-labelledby": id }, h("h2", { id }, title), content);
}

function heading(rollout, now, online) {
  return h(
    "header",
    { class: `card hero ${tone(rollout.phase)}`, "data-key": "hero" },
    h(
      "div",
      { class: "hero-text" },
      h("p", { class: "muted small" }, h("a", { href: "#/" }, "Overview"), " / ", rollout.id),
      h("h1", { id: "title", tabindex: "-1" }, rollout.route, h("span", { class: "muted" }, " ← "), rollout.model_ref),
      h("p", { class: "phase-line" }, chip(rollout.phase), h("span", {}, rollout.sentence)),
      h("p", { class: "reason" }, rollout.reason),
      rollout.pending.map((c) =>
        h(
          "p",
          { class: "pending", "data-key": `pending-${c.id}` },
          `${c.verb} was asked for by ${c.by} `,
          ago(c.at, now, " ago"),
          c.reason ? `: ${c.reason}` : "",
          "; the controller obeys at its next tick.",
        ),
      ),
    ),
    verbs(rollout, online),
  );
}

function verbs(rollout, online) {
  if (!rollout.verbs.length) return null;
  const pending = new Set(rollout.pending.map((c) => c.verb));
  return h(
    "div",
    { class: "verbs", role: "group", "aria-label": "Commands" },
    rollout.verbs.map((v) =>
      h(
        "button",
        {
          type: "button", "data-key": v.verb, "data-act": "ask", "data-verb": v.verb,
          class: v.danger ? (v.verb === "abort" ? "danger-line" : "strong") : "",
          "aria-haspopup": "dialog", title: v.effect,
          // Not `disabled`: that would take the focus away from whoever is on it.
          "aria-disabled": !online || pending.has(v.verb) ? "true" : null,
        },
        words(v.verb),
      ),
    ),
  );
}

function ramp(rollout, now, controller) {
  const left = rollout.next_look_at - now;
  const alive = controller?.alive;
  const look = rollout.decision ? null : !alive ? "no controller looks" : left > 0.5 ? `next look in ${duration(left)}` : "looking now";
  const route = { weight: rollout.weight, canary: rollout.spec.candidate.name, stable: rollout.stable?.name ?? "stable" };
  return card(
    "Ramp",
    "ramp",
    ladder(rollout),
    rollout.decision ? null : weightBar(route),
    h(
      "p",
      { class: "facts-line muted" },
      rollout.decision
        ? h("span", {}, `highest canary weight ${percent(rollout.max_weight)}`)
        : h("span", {}, `canary weight ${percent(rollout.weight)}`),
      h("span", {}, "in this phase for ", ago(rollout.phase_since, now)),
      look ? h("span", {}, look) : null,
    ),
    progress(rollout, now),
  );
}

function legend(rollout) {
  const first = rollout.thresholds
    ? "Bars are e-values on a log scale, from 1 to the one that decides. Below 1 nothing speaks for it."
    : "Nothing was looked at yet: evidence comes with the first look at live traffic.";
  return h("p", { class: "muted small" }, first);
}

function arms(rollout) {
  const names = ["stable", "canary"];
  const known = names.map((arm) => rollout.arms[arm]);
  if (!known.some(Boolean)) return empty("No counts yet", "They come with the first look after the ramp began.");
  const graders = [...new Set(known.flatMap((arm) => Object.keys(arm?.graded ?? {})))];
  const columns = [
    { name: "arm" }, { name: "requests", class: "number" }, { name: "errors", class: "number" },
    ...graders.map((g) => ({ name: g === "grade" ? "failed grades" : `${g}: below full score`, class: "number" })),
    { name: "first token p50 / p95", class: "number" }, { name: "last token p50 / p95", class: "number" },
  ];
  const rows = names.map((arm, i) => {
    const c = known[i];
    if (!c) return { key: arm, cells: [arm, ...columns.slice(1).map(() => "–")] };
    const graded = graders.map((g) => {
      const [n, below] = c.graded[g] ?? [0, 0];
      return n ? `${rate(below, n)} of ${count(n)}` : "–";
    });
    const ttft = `${latency(c.ttft_p50_s)} / ${latency(c.ttft_p95_s)}`;
    const e2e = `${latency(c.e2e_p50_s)} / ${latency(c.e2e_p95_s)}`;
    const name = h("span", { class: `arm ${arm}` }, arm);
    return { key: arm, cells: [name, count(c.n), rate(c.errors, c.n), ...graded, ttft, e2e] };
  });
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Counts by arm" }, table("Counts by arm", columns, rows));
}

function audit(trail) {
  const list = trail.entries.length
    ? h("ol", { class: "timeline" }, trail.entries.map(entry))
    : empty("Nothing yet", "Every look and every move is written down here.");
  return card(
    "Audit trail",
    "audit",
    h(
      "label",
      { class: "check", "data-key": "looks" },
      h("input", { type: "checkbox", id: "looks", "data-act": "looks", checked: trail.looks }),
      "also looks that moved nothing",
    ),
    list,
    trail.more ? h("button", { type: "button", "data-act": "older", "data-key": "older" }, "Older entries") : null,
  );
}

function entry(e) {
  const { body } = e;
  const to = body.to ?? body.phase;
  const moved = body.from && body.from !== body.to;
  const what = e.kind === "look" ? "look" : (body.event ?? (moved ? `${words(body.from)} → ${words(body.to)}` : "note"));
  const notes = Array.isArray(body.notes) ? body.notes : [];
  return h(
    "li",
    { class: to ? tone(to) : "still", "data-key": `audit-${e.id}` },
    h(
      "p",
      { class: "entry-head" },
      h("strong", {}, words(String(what))),
      h("time", { class: "muted small", datetime: new Date(1000 * e.at).toISOString() }, moment(e.at)),
    ),
    h("p", {}, String(body.reason ?? "")),
    notes.map((n) => h("p", { class: "note" }, String(n))),
    h("p", { class: "muted small" }, `tick ${e.tick} · weight ${percent(Number(body.weight ?? 0))}`),
  );
}

function facts(rollout, now) {
  const { spec } = rollout;
  const rows = [
    ["Id", h("code", {}, rollout.id)],
    ["Model", rollout.model_ref],
    ["Candidate", spec.candidate.app ?? spec.candidate.url],
    ["Digest", spec.digest ? h("code", { title: spec.digest }, spec.digest.slice(0, 19)) : "–"],
    ["Stable before", rollout.stable?.name ?? "–"],
    ["Asked for", [moment(rollout.created_at), " (", ago(rollout.created_at, now, " ago"), ")"]],
    ["By", rollout.created_by],
    ["α harm / promote", `${spec.alpha_harm} / ${spec.alpha_promote}`],
    ["A look every", spec.look_s < 120 ? `${spec.look_s} s` : duration(spec.look_s)],
    ["Kill switch", `${percent(spec.kill_switch_errors)} errors`],
    ["No-data deadline", duration(spec.no_data_deadline_s)],
    ["After the last step", spec.hold_final ? "a person decides" : "promote by itself"],
  ];
  return card("Facts", "facts", h("dl", {}, rows.map(([k, v]) => h("div", {}, h("dt", {}, k), h("dd", {}, v)))));
}
