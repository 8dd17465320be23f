// What a page must hold for everybody to use it, as a list of what is wrong: names, roles, references, headings
// and the contrast of every visible text against what is behind it (WCAG 2.2, 1.4.3 and 4.1.2).
() => {
  const wrong = [];
  const say = (element, what) => {
    const id = element.id ? `#${element.id}` : `.${element.getAttribute("class") ?? ""}`;
    wrong.push(`${element.tagName.toLowerCase()}${id} "${element.textContent.trim().slice(0, 40)}": ${what}`);
  };
  const open = document.querySelector("dialog[open]");
  const shown = (e) => e.checkVisibility({ checkVisibilityCSS: true }) && (!open || open.contains(e));
  const all = (selector) => [...document.querySelectorAll(selector)].filter(shown);
  const byId = (ids) => ids.split(/\s+/).map((id) => document.getElementById(id));

  const name = (e) => {
    if (e.getAttribute("aria-labelledby")) return byId(e.getAttribute("aria-labelledby")).map((n) => n?.textContent).join(" ");
    if (e.getAttribute("aria-label")) return e.getAttribute("aria-label");
    if (e.labels?.length) return [...e.labels].map((l) => l.textContent).join(" ");
    return e.textContent + [...e.querySelectorAll("[aria-label], img[alt]")].map((n) => n.ariaLabel ?? n.alt).join(" ");
  };
  for (const e of all("button, a[href], input, select, textarea, dialog, section, article, nav, table, [role], [tabindex='0']")) {
    const role = e.getAttribute("role");
    if (["status", "alert", "rowgroup", "row", "cell", "rowheader", "columnheader"].includes(role)) continue;
    if (e.tagName === "SECTION" && !e.hasAttribute("aria-label") && !e.hasAttribute("aria-labelledby")) say(e, "a section without a name");
    if (!name(e)?.trim()) say(e, "has no accessible name");
  }
  for (const e of all("img")) if (!e.hasAttribute("alt")) say(e, "has no alt");
  for (const e of all("input")) if (e.placeholder && !e.labels.length) say(e, "a placeholder is no label");
  for (const attribute of ["aria-labelledby", "aria-describedby", "for", "aria-controls"]) {
    for (const e of document.querySelectorAll(`[${attribute}]`)) {
      if (byId(e.getAttribute(attribute)).includes(null)) say(e, `${attribute} names nothing`);
    }
  }
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  for (const id of new Set(ids)) if (ids.filter((i) => i === id).length > 1) wrong.push(`id ${id} is there twice`);
  for (const e of all("[role='meter']")) {
    for (const a of ["aria-valuemin", "aria-valuemax", "aria-valuenow", "aria-valuetext"]) if (!e.hasAttribute(a)) say(e, `no ${a}`);
    if (Number(e.ariaValueNow) > Number(e.ariaValueMax)) say(e, "is above its maximum");
  }
  for (const e of all("[tabindex]")) if (e.tabIndex > 0) say(e, "a positive tabindex");
  const headings = all("h1, h2, h3, h4, h5, h6");
  if (!open && headings.filter((e) => e.tagName === "H1").length !== 1) wrong.push("there must be one h1");
  let level = open ? 1 : 0;
  for (const e of headings) {
    if (Number(e.tagName[1]) > level + 1) say(e, "skips a heading level");
    level = Number(e.tagName[1]);
  }
  if (!document.documentElement.lang) wrong.push("html has no lang");
  if (!document.title.trim()) wrong.push("no title");
  if (document.querySelectorAll("main").length !== 1) wrong.push("there must be one main");
  if (!document.querySelector("[aria-live='polite']")) wrong.push("no live region");

  const channels = (text) => {
    const n = text.match(/-?[\d.]+(e-?\d+)?/g).map(Number);
    const scale = text.startsWith("color(") ? 255 : 1;
    return { rgb: n.slice(0, 3).map((v) => v * scale), a: n[3] ?? 1 };
  };
  const over = (top, below) => top.rgb.map((v, i) => v * top.a + below[i] * (1 - top.a));
  const behind = (e) => {
    const layers = [];
    for (let at = e; at; at = at.parentElement) layers.push(channels(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let texts = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !shown(e) || e.closest(".sr, .skip, noscript, [aria-disabled='true'], :disabled")) continue;
    const style = getComputedStyle(e);
    const below = behind(e);
    const [a, b] = [luminance(over(channels(style.color), below)), luminance(below)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    texts += 1;
    if (ratio < 4.5) say(e, `contrast ${ratio.toFixed(2)}`);
  }
  return { wrong, texts };
}
