// Numbers, times and e-values for people. Pure.

/** A weight or a share: 0.05 → "5 %". */
export function percent(share) {
  return `${Number((100 * share).toFixed(2))} %`;
}

/** "12 (3.4 %)". */
export function rate(k, n) {
  return n ? `${count(k)} (${((100 * k) / n).toFixed(1)} %)` : "–";
}

/** 12345 → "12,345". */
export function count(n) {
  return n.toLocaleString("en");
}

/** An e-value from its natural log: 0.3, 41, 1.2e+7. */
export function evalue(log) {
  if (log === null || log === undefined) return "–";
  if (Math.abs(log) > 600) return `1e${log > 0 ? "+" : "−"}${Math.abs(log / Math.LN10).toFixed(0)}`;
  const value = Math.exp(log);
  if (value >= 10_000 || value < 0.01) return value.toExponential(1).replace("-", "−");
  return String(Number(value.toFixed(value >= 100 ? 0 : value >= 1 ? 1 : 2)));
}

/** Seconds of latency: "40 ms", "1.5 s". */
export function latency(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  return seconds < 1 ? `${Number((1000 * seconds).toFixed(1))} ms` : `${seconds} s`;
}

/** Seconds that passed: "12 s", "5 min", "3 h 20 min", "2 d 4 h". */
export function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 120) return `${s} s`;
  if (s < 7200) return `${Math.floor(s / 60)} min`;
  if (s < 172_800) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86_400)} d ${Math.floor((s % 86_400) / 3600)} h`;
}

/** Unix seconds as local date and time. */
export function moment(at) {
  const d = new Date(1000 * at);
  const two = (n) => String(n).padStart(2, "0");
  const day = `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())}`;
  return `${day} ${two(d.getHours())}:${two(d.getMinutes())}:${two(d.getSeconds())}`;
}

/** "rolling_back" → "rolling back". */
export function words(name) {
  return name.replaceAll("_", " ");
}

/** How a phase is coloured: info, good, warn, bad or still. */
export function tone(phase) {
  const tones = {
    pending: "info", warming: "info", ramping: "info", held: "warn", paused: "warn",
    promoting: "good", promoted: "good", rolling_back: "bad", rolled_back: "bad", aborted: "still",
  };
  return tones[phase] ?? "info";
}
