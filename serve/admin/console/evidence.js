// Evidence drawn: each metric's two tests as bars on a log scale that end at what decides, and how they got
// there. Knows no statistics: e-values and thresholds come as the controller stored them.

import { h, svg } from "./dom.js";
import { evalue, percent } from "./format.js";

const AT = 86; // Where on a bar the deciding e-value is, in percent of its length.
const VERDICTS = {
  PASS: ["good", "no worse"], FAIL: ["bad", "harm"], NO_DATA: ["still", "no data"],
  INCONCLUSIVE: ["info", "undecided"], ERROR: ["bad", "error"],
};

/** Every metric of a rollout against its thresholds. */
export function evidence(rollout) {
  const at = rollout.thresholds;
  return h(
    "div",
    { class: "metrics" },
    rollout.metrics.map((metric) => metricCard(metric, at, rollout)),
    at && rollout.metrics.length > 1 ? together(rollout, at) : null,
  );
}

function metricCard(metric, at, rollout) {
  const { spec } = metric;
  const [colour, verdict] = VERDICTS[metric.verdict] ?? ["info", metric.verdict];
  const decides = spec.role !== "info";
  const needed = at?.step_evidence > 1 ? Math.log(at.step_evidence) : null;
  return h(
    "section",
    { class: "metric", "data-key": metric.name, "aria-label": `Evidence on ${metric.name}` },
    h(
      "header",
      {},
      h("h3", {}, metric.name),
      h("span", { class: `chip ${colour}` }, verdict),
      h("span", { class: "muted small" }, about(spec)),
    ),
    h(
      "div",
      { class: "metric-body" },
      h(
        "div",
        { class: "tests" },
        decides ? test("harm", "Harm → roll back", metric.log_harm, at?.log_harm_each, null) : null,
        decides ? test("good", "No worse → promote", metric.log_noninferior, at?.log_promote, needed) : null,
        decides ? null : h("p", { class: "muted" }, "Reported only; it decides nothing."),
      ),
      decides && at ? curve(metric, at, rollout.looks) : null,
    ),
  );
}

function about(spec) {
  const parts = [spec.role, `margin ${points(spec.margin)}`, `tolerance ${points(spec.tolerance ?? spec.margin / 4)}`];
  if (spec.thresholds_s.length) parts.push(`over ${spec.thresholds_s.join(", ")} s`);
  if (spec.better) parts.push("must be better");
  return parts.join(" · ");
}

function points(share) {
  return `${Number((100 * share).toFixed(2))} pp`;
}

function together(rollout, at) {
  return h(
    "section",
    { class: "metric", "data-key": "(together)", "aria-label": "Evidence of all metrics together" },
    h("header", {}, h("h3", {}, "all together"), h("span", { class: "muted small" }, "mean of the harm e-values")),
    h("div", { class: "tests" }, test("harm", "Harm → roll back", rollout.log_mean_harm, at.log_harm_mean, null)),
  );
}

/** One test: `log` is its e-value's logarithm, `at` the one that decides, `needed` what the step asks for. */
function test(kind, label, log, at, needed) {
  const known = at !== null && at !== undefined;
  const value = evalue(log);
  const said = known ? `e = ${value} of ${evalue(at)}` : `e = ${value}, its threshold comes with the first look`;
  return h(
    "div",
    { class: `test ${kind}` },
    h("div", { class: "test-label" }, h("span", {}, label), h("span", { class: "number" }, known ? `e = ${value}` : said)),
    known ? bar(label, log ?? 0, at, needed, said) : h("div", { class: "track" }),
  );
}

function bar(label, log, at, needed, said) {
  const place = (x) => `${Math.min(100, Math.max(0, (AT * x) / at))}%`;
  const stepMark = needed !== null && needed < at ? h("span", { class: "mark step", style: { left: place(needed) } }) : null;
  const track = h(
    "div",
    {
      class: log >= at ? "track reached" : "track",
      role: "meter",
      "aria-label": label,
      "aria-valuemin": 0,
      "aria-valuemax": at.toFixed(3),
      "aria-valuenow": Math.min(at, Math.max(0, log)).toFixed(3),
      "aria-valuetext": said + (stepMark ? `; this step needs ${evalue(needed)}` : ""),
    },
    h("div", { class: "zone", style: { left: `${AT}%` } }),
    h("div", { class: "fill", style: { width: place(log) } }),
    stepMark,
    h("span", { class: "mark", style: { left: `${AT}%` } }),
  );
  return [track, scale(at, place, stepMark ? needed : null)];
}

/** The numbers under a bar: powers of ten, what the step needs, and the e-value that decides. */
function scale(at, place, needed) {
  const marks = [[0, "1"]];
  for (let e = 1; e * Math.LN10 < at; e += 1) marks.push([e * Math.LN10, e < 4 ? String(10 ** e) : `1e+${e}`]);
  const room = 0.09 * at; // Numbers that would touch the ones that matter are left out.
  const matter = [at, ...(needed === null ? [] : [needed])];
  const shown = marks.filter(([x]) => matter.every((m) => Math.abs(m - x) > room));
  const number = (x, text, kind) => h("span", { class: kind, style: { left: place(x) } }, text);
  return h(
    "div",
    { class: "scale", "aria-hidden": "true" },
    shown.map(([x, text]) => number(x, text, x ? "" : "first")),
    needed === null ? null : number(needed, `step ${evalue(needed)}`, "matters"),
    number(at, evalue(at), "matters"),
  );
}

/** Both tests over the looks, each as a share of what decides; the dashed line is the decision. */
function curve(metric, at, looks) {
  const [width, height] = [180, 64];
  const rows = looks.map((look) => look.metrics[metric.name]).filter(Boolean);
  if (rows.length < 2) return null;
  const [low, high] = [-0.4, 1.15];
  const y = (share) => height - ((Math.min(high, Math.max(low, share)) - low) / (high - low)) * height;
  const line = (index, full) =>
    rows
      .map((row, i) => `${((i / (rows.length - 1)) * width).toFixed(1)},${y((row[index] ?? 0) / full).toFixed(1)}`)
      .join(" ");
  const said =
    `${metric.name} over ${rows.length} looks: harm e-value now ${evalue(metric.log_harm)}, ` +
    `no-worse e-value now ${evalue(metric.log_noninferior)}`;
  return h(
    "figure",
    { class: "curve" },
    svg(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": said, preserveAspectRatio: "none" },
      svg("line", { class: "zero", x1: 0, x2: width, y1: y(0), y2: y(0) }),
      svg("line", { class: "decides", x1: 0, x2: width, y1: y(1), y2: y(1) }),
      svg("polyline", { class: "harm", points: line(0, at.log_harm_each) }),
      svg("polyline", { class: "good", points: line(1, at.log_promote) }),
    ),
    h("figcaption", { class: "muted small" }, `last ${rows.length} looks; dashed: decides`),
  );
}

/** The share of a step's conditions that is there. */
export function progress(rollout, now) {
  const step = rollout.spec.steps[rollout.step];
  if (!["ramping", "held", "paused"].includes(rollout.phase)) return null;
  const weakest = Math.min(...rollout.metrics.filter((m) => m.spec.role !== "info").map((m) => m.log_noninferior ?? 0));
  const needed = rollout.thresholds?.step_evidence;
  const rows = [
    ["canary requests", rollout.step_canary_requests, step.min_samples, (v) => `${v}`],
    ["time in the step", now - rollout.step_since, step.min_dwell_s, (v) => `${Math.max(0, Math.round(v))} s`],
  ];
  if (needed > 1) rows.push(["weakest no-worse e-value", weakest, Math.log(needed), (v) => evalue(v)]);
  return h(
    "div",
    { class: "conditions" },
    h("p", { class: "muted small" }, `To leave step ${rollout.step + 1} of ${rollout.steps.length} (${percent(step.weight)}):`),
    h("ul", {}, rows.filter(([, , need]) => need > 0).map(([name, have, need, show]) => condition(name, have, need, show))),
  );
}

function condition(name, have, need, show) {
  const met = have >= need;
  return h(
    "li",
    { class: met ? "met" : "open" },
    h("span", { class: "tickbox", "aria-hidden": "true" }, met ? "✓" : "…"),
    h("span", {}, h("span", { class: "sr" }, met ? "met: " : "not yet: "), `${name}: ${show(have)} of ${show(need)}`),
  );
}
