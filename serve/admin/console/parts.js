// The small pieces that several views show: phase chips, weight bars, ladders, commands to copy. Pure functions
// from data to elements.

import { h } from "./dom.js";
import { duration, moment, percent, tone, words } from "./format.js";

/** A phase as a chip. */
export function chip(phase) {
  return h("span", { class: `chip ${tone(phase)}`, "data-phase": phase }, words(phase));
}

/** Who gets how much of a route. */
export function weightBar(route) {
  const share = percent(route.weight);
  const said = route.canary
    ? `${share} to canary ${route.canary}, ${percent(1 - route.weight)} to stable ${route.stable}`
    : `all to stable ${route.stable}`;
  return h(
    "div",
    { class: "weights", role: "img", "aria-label": said },
    h("div", { class: "weights-canary", style: { width: `${100 * route.weight}%` } }),
  );
}

/** The ramp: steps that are done, the current one, those to come, and the promotion. */
export function ladder(rollout, small = false) {
  const began = rollout.max_weight > 0;
  const items = rollout.steps.map((weight, i) => {
    const done = began && (i < rollout.step || rollout.decision === "promoted");
    const current = began && !done && i === rollout.step;
    return step(percent(weight), done ? "done" : current ? "current" : "coming", tone(rollout.phase));
  });
  const last = rollout.phase === "promoted" ? "done" : rollout.phase === "promoting" ? "current" : "coming";
  const label = `Ramp: step ${rollout.step + 1} of ${rollout.steps.length}, then 100 %`;
  return h("ol", { class: small ? "ladder small" : "ladder", "aria-label": label }, items, step("100 %", last, "good"));
}

function step(text, state, colour) {
  const said = { done: "done: ", current: "now: ", coming: "" }[state];
  return h(
    "li",
    { class: `${state} ${colour}`, "aria-current": state === "current" ? "step" : null },
    h("span", { class: "node", "aria-hidden": "true" }),
    h("span", {}, h("span", { class: "sr" }, said), text),
  );
}

/** How long ago, with the moment itself for whoever hovers. */
export function ago(at, now, after = "") {
  return h(
    "time",
    { datetime: new Date(1000 * at).toISOString(), title: moment(at) },
    duration(now - at) + after,
  );
}

/** Something that is not there yet, and what makes it. */
export function empty(title, text, command = null) {
  return h(
    "div",
    { class: "empty" },
    h("p", { class: "empty-title" }, title),
    h("p", { class: "muted" }, text),
    command ? h("pre", { tabindex: "0", "aria-label": "Command" }, h("code", {}, command)) : null,
  );
}

/** Where a rollout is shown. */
export function rolloutLink(id, ...content) {
  return h("a", { href: `#/rollouts/${encodeURIComponent(id)}` }, content);
}
