// The console: asks what is going on about once a second, shows it, and sends what a person confirmed.
// State is here, drawing is in the views, talking in api.js.

import * as api from "./api.js";
import { confirm, watchDialog } from "./dialog.js";
import { h, morphChildren } from "./dom.js";
import { duration, percent, words } from "./format.js";
import { historyView } from "./history.js";
import { overviewView } from "./overview.js";
import { rolloutView } from "./rollout.js";

const POLL_MS = 600;
const HIDDEN_MS = 5000;
const MOST_BACKOFF_MS = 5000;
const PAGE = 30;
const TOAST_MS = 7000;
const MOST_TOASTS = 4;
const find = (id) => document.getElementById(id);

const fresh = () => ({
  overview: null, tag: null, search: "", all: false, rollout: null, history: null,
  trail: { entries: [], more: false, looks: false }, freshAt: 0, failure: null, failures: 0, missing: null,
  arrived: false,
});
let state = fresh();
let offset = 0; // Server's clock minus ours, in seconds.
let round = 0; // Of the session: replies to an earlier one are dropped.
let timer = null;

const now = () => Date.now() / 1000 + offset;

// where we are -------------------------------------------------------------------------------------

function place() {
  const [path, query] = location.hash.replace(/^#/, "").split("?");
  const parts = path.split("/").filter(Boolean).map(decoded);
  const route = new URLSearchParams(query ?? "").get("route");
  if (parts[0] === "rollouts" && parts[1]) return { view: "rollout", id: parts[1] };
  if (parts[0] === "history") return { view: "history", route };
  return { view: "overview" };
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

function go() {
  if (location.hash && !location.hash.startsWith("#/")) return;
  state.rollout = null;
  state.history = null;
  state.missing = null;
  state.trail = { entries: [], more: false, looks: state.trail.looks };
  state.arrived = true;
  draw();
  window.scrollTo(0, 0);
  refresh().catch(fail);
}

// asking -------------------------------------------------------------------------------------------

function loggedIn() {
  return !api.needsKey || Boolean(api.session.key);
}

async function poll() {
  const mine = round;
  try {
    const found = await api.events(state.tag);
    if (mine !== round) return;
    if (found) accept(found);
    state.freshAt = Date.now() / 1000;
    state.failures = 0;
    state.failure = null;
    await refresh();
  } catch (error) {
    if (mine === round) fail(error);
  } finally {
    if (mine === round && loggedIn()) schedule();
  }
}

function accept({ tag, body }) {
  const before = state.overview;
  state.overview = body;
  state.tag = tag;
  offset = body.at - Date.now() / 1000;
  if (before) announce(before.rollouts, body.rollouts);
  draw();
}

function schedule() {
  clearTimeout(timer);
  const backoff = Math.min(MOST_BACKOFF_MS, POLL_MS * 2 ** Math.min(state.failures, 4));
  timer = setTimeout(poll, document.hidden ? Math.max(HIDDEN_MS, backoff) : backoff);
}

function fail(error) {
  if (!(error instanceof api.ApiError)) throw error;
  if (error.refused && api.needsKey) {
    logout(error.message);
    return;
  }
  state.failures += 1;
  state.failure = error.message;
  draw();
}

/** Fetch what the view shows beside the overview, when it is not what was fetched already. */
async function refresh() {
  const at = place();
  if (!loggedIn()) return;
  if (at.view === "history") await refreshHistory(at);
  if (at.view === "rollout") await refreshRollout(at);
  draw();
}

async function refreshHistory(at) {
  const running = (state.overview?.rollouts ?? []).map((r) => `${r.id}:${r.phase}`).join();
  if (state.history && state.history.running === running) return;
  const mine = round;
  const limit = Math.min(200, Math.max(PAGE, state.history?.data.length ?? 0));
  const page = await api.rollouts({ route: at.route, limit });
  if (mine === round && place().route === at.route) state.history = { ...page, running };
}

async function refreshRollout(at, force = false) {
  const running = state.overview?.rollouts.find((r) => r.id === at.id);
  const ended = ["promoted", "rolled_back", "aborted"].includes(state.rollout?.phase);
  const known = state.rollout && (running ? running.status_version === state.rollout.status_version : ended);
  if ((known || state.missing) && !force) return;
  const mine = round;
  try {
    const [found, page] = await Promise.all([api.rollout(at.id), api.audit(at.id, trailQuery())]);
    if (mine !== round || place().id !== at.id) return;
    state.rollout = found;
    merge(page);
  } catch (error) {
    if (![400, 404].includes(error.status)) throw error;
    state.missing = error.message;
  }
}

function trailQuery(before = null) {
  return { kind: state.trail.looks ? null : "transition", limit: PAGE, before };
}

/** The trail is append-only: what is known stays, new entries come before it. */
function merge(page) {
  const known = new Map([...state.trail.entries, ...page.data].map((e) => [e.id, e]));
  const oldest = Math.min(...state.trail.entries.map((e) => e.id));
  const atEnd = !state.trail.entries.length || page.data.some((e) => e.id < oldest);
  state.trail.entries = [...known.values()].sort((a, b) => b.id - a.id);
  if (atEnd) state.trail.more = page.has_more;
}

// drawing ------------------------------------------------------------------------------------------

function draw() {
  const inside = loggedIn();
  find("login").hidden = inside;
  find("nav").hidden = !inside;
  find("session").hidden = !inside;
  find("logout").hidden = !api.needsKey;
  const at = place();
  for (const link of find("nav").children) {
    if (link.dataset.view === at.view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  drawConnection();
  const root = h("div", {}, inside ? view(at) : null);
  if (root.firstChild?.dataset) root.firstChild.dataset.key = location.hash.split("?")[0] || "#/";
  const inView = find("view").contains(document.activeElement);
  morphChildren(find("view"), root);
  keepFocus(inView);
  const where = { overview: "Overview", history: "History", rollout: state.rollout?.route ?? "Rollout" }[at.view];
  document.title = `${inside ? where : "Log in"} · Stillhouse console`;
}

/** A new view, or one whose focused button is gone, is read from its heading on. */
function keepFocus(inView) {
  const title = find("title");
  if (!title || !(state.arrived || (inView && document.activeElement === document.body))) return;
  state.arrived = false;
  title.focus({ preventScroll: true });
}

function view(at) {
  if (at.view === "history") return historyView({ history: state.history, route: at.route });
  if (at.view === "overview") return overviewView({ ...state, now: now() });
  if (state.missing) {
    return h("div", { class: "page" }, h("h1", { id: "title", tabindex: "-1" }, "No such rollout"), h("p", {}, state.missing), h("p", {}, h("a", { href: "#/history" }, "All rollouts")));
  }
  const online = !state.failure;
  return rolloutView({ rollout: state.rollout, trail: state.trail, now: now(), online, controller: state.overview?.controller });
}

function drawConnection() {
  const { failure, overview, freshAt } = state;
  const since = duration(Date.now() / 1000 - freshAt);
  const idle = overview && !failure && overview.rollouts.length > 0 && !overview.controller?.alive;
  find("connection").dataset.state = failure ? "stale" : overview ? "live" : "waiting";
  find("connection-text").textContent = failure ? (overview ? `Stale, ${since}` : "No data") : overview ? "Live" : "Connecting";
  let text = "";
  if (failure && loggedIn()) text = `${failure} ${overview ? "What you see is old; " : ""}trying again.`;
  else if (idle && loggedIn()) text = "No controller is acting: rollouts stand still and commands wait. Is the stack up? Run: stillhouse status";
  const banner = find("banner");
  if (banner.textContent !== text) banner.textContent = text;
  banner.hidden = !text;
  banner.classList.toggle("warn", !failure);
}

// telling ------------------------------------------------------------------------------------------

function toast(text, kind = "info") {
  const shown = h("div", { class: `toast ${kind}` }, text);
  const list = find("toasts");
  list.append(shown);
  if (list.children.length > MOST_TOASTS) list.firstChild.remove();
  setTimeout(() => shown.remove(), TOAST_MS);
}

function announce(before, after) {
  const known = new Map(before.map((r) => [r.id, r]));
  for (const r of after) {
    const was = known.get(r.id);
    known.delete(r.id);
    if (!was) toast(`${r.route}: a rollout of ${r.model_ref} began`);
    else if (was.phase !== r.phase) toast(`${r.route}: ${words(was.phase)} → ${words(r.phase)}`);
    else if (was.step !== r.step) toast(`${r.route}: step ${r.step + 1} of ${r.steps.length}, ${percent(r.weight)}`);
  }
  for (const gone of known.values()) announceEnd(gone).catch(fail);
}

async function announceEnd(gone) {
  const ended = await api.rollout(gone.id);
  toast(`${ended.route}: ${words(ended.phase)}`, ended.phase === "promoted" ? "good" : "bad");
}

// doing --------------------------------------------------------------------------------------------

function ask(verb) {
  const { rollout } = state;
  const known = rollout?.verbs.find((v) => v.verb === verb);
  if (!known) return;
  confirm({
    ...known,
    route: rollout.route,
    now: `It is ${words(rollout.phase)} with ${percent(rollout.weight)} of the traffic on ${rollout.model_ref}.`,
    send: async (reason) => {
      await api.command(rollout.id, verb, reason);
      toast(`Asked to ${words(verb)} ${rollout.route}; the controller obeys at its next tick.`);
      await refreshRollout(place(), true).catch(fail);
      draw();
    },
  });
}

async function older() {
  const { trail } = state;
  const before = Math.min(...trail.entries.map((e) => e.id));
  const page = await api.audit(place().id, trailQuery(before));
  merge(page);
  trail.more = page.has_more;
  draw();
}

async function moreHistory() {
  const { history } = state;
  const page = await api.rollouts({ route: place().route, after: history.data.at(-1).id, limit: PAGE });
  state.history = { ...page, data: [...history.data, ...page.data], running: history.running };
  draw();
}

async function switchLooks(looks) {
  state.trail = { entries: [], more: false, looks };
  await refreshRollout(place(), true);
  draw();
}

const ACTIONS = {
  ask: (target) => ask(target.dataset.verb),
  older: () => older().catch(fail),
  looks: (target) => switchLooks(target.checked).catch(fail),
  "more-history": () => moreHistory().catch(fail),
  "all-routes": () => {
    state.all = true;
    draw();
  },
};

// the session --------------------------------------------------------------------------------------

async function login(event) {
  event.preventDefault();
  const key = find("login-key").value.trim();
  if (!key) return loginFailed("Enter an admin key.");
  if (!/^[\x21-\x7e]+$/.test(key)) return loginFailed("A key has no spaces and no other special characters.");
  try {
    await api.events(null, key);
  } catch (error) {
    return loginFailed(error.message);
  }
  api.session.key = key;
  find("login-key").value = "";
  start();
  find("main").focus();
  return undefined;
}

function loginFailed(message) {
  find("login-error").textContent = message;
  find("login-key").setAttribute("aria-invalid", "true");
  find("login-key").focus();
}

function logout(message = "") {
  api.session.key = null;
  round += 1;
  clearTimeout(timer);
  state = fresh();
  find("confirm").close();
  find("toasts").replaceChildren();
  draw();
  find("login-error").textContent = message;
  find("login-key").focus();
}

function start() {
  round += 1;
  state = fresh();
  find("login-error").textContent = "";
  find("login-key").removeAttribute("aria-invalid");
  draw();
  if (loggedIn()) poll();
  else find("login-key").focus();
}

document.addEventListener("click", (event) => {
  const target = event.target.closest("[data-act]");
  if (target && target.getAttribute("aria-disabled") !== "true") ACTIONS[target.dataset.act]?.(target);
});
document.addEventListener("input", (event) => {
  if (event.target.id !== "search") return;
  state.search = event.target.value;
  state.all = false;
  draw();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  find("main").focus();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && loggedIn()) {
    clearTimeout(timer);
    poll();
  }
});
window.addEventListener("hashchange", go);
find("login-form").addEventListener("submit", login);
find("logout").addEventListener("click", () => logout());
watchDialog(() => (loggedIn() ? (find("title") ?? find("main")) : find("login-key")).focus());
setInterval(() => {
  if (loggedIn() && state.overview && !document.hidden) draw();
}, 1000);
start();
