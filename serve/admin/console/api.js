// The admin API as the console uses it: one bearer key, kept in this tab, sent to this server only.
// Knows nothing about the page.

const KEY = "stillhouse-admin-key";
const TIMEOUT_MS = 8000;

/** A request that failed: `status` is 0 when nobody answered. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }

  /** True when another key is needed. */
  get refused() {
    return this.status === 401 || this.status === 403;
  }
}

/** False where the server was started with --insecure. */
export const needsKey = document.documentElement.dataset.keys === "required";

export const session = {
  get key() {
    return sessionStorage.getItem(KEY);
  },
  set key(value) {
    if (value === null) sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, value);
  },
};

/** What is going on; null while it is what `tag` stands for. */
export async function events(tag, key = session.key) {
  const reply = await send("GET", "v1/events", { key, tag });
  if (reply.status === 304) return null;
  return { tag: reply.headers.get("etag"), body: await reply.json() };
}

/** One rollout with all that is known about it. */
export async function rollout(id) {
  return (await send("GET", `v1/rollouts/${encodeURIComponent(id)}`)).json();
}

/** A page of rollouts: {route, after, limit}. */
export async function rollouts(query) {
  return (await send("GET", `v1/rollouts?${search(query)}`)).json();
}

/** A page of an audit trail: {kind, before, limit}. */
export async function audit(id, query) {
  return (await send("GET", `v1/rollouts/${encodeURIComponent(id)}/audit?${search(query)}`)).json();
}

/** Ask the controller for something. */
export async function command(id, verb, reason) {
  const body = JSON.stringify({ verb, reason });
  return (await send("POST", `v1/rollouts/${encodeURIComponent(id)}/commands`, { body })).json();
}

function search(query) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined);
  return new URLSearchParams(given);
}

async function send(method, path, { key = session.key, tag = null, body = null } = {}) {
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (tag) headers["if-none-match"] = tag;
  if (body !== null) headers["content-type"] = "application/json";
  const signal = AbortSignal.timeout(TIMEOUT_MS);
  let reply;
  try {
    reply = await fetch(path, { method, headers, body, signal, cache: "no-store", credentials: "omit" });
  } catch {
    throw new ApiError(0, "The admin server does not answer.");
  }
  if (reply.ok || reply.status === 304) return reply;
  throw new ApiError(reply.status, await why(reply));
}

async function why(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `The admin server answered ${reply.status}.`;
  }
}
