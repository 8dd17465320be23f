// Elements from data, and how what is on the page becomes what should be: text is only ever text, focus and
// selection stay where they are. Knows nothing about rollouts.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `props`: attributes; `style` is an object of CSS properties; null, false leave one out. */
export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** The same for SVG. */
export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "style") {
      for (const [property, of] of Object.entries(value)) element.style.setProperty(property, of);
    } else {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  for (const child of children.flat(3)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
  return element;
}

/** A table that stays one for a screen reader when a narrow screen shows it as cards. */
export function table(label, columns, rows) {
  const head = columns.map((c) => h("th", { scope: "col", role: "columnheader", class: c.class }, c.name));
  return h(
    "table",
    { role: "table", "aria-label": label },
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, head)),
    h("tbody", { role: "rowgroup" }, rows.map((row) => tableRow(columns, row))),
  );
}

function tableRow(columns, row) {
  const cells = row.cells.map((content, i) => {
    const shared = { "data-label": columns[i].name, class: columns[i].class };
    return i === 0
      ? h("th", { ...shared, scope: "row", role: "rowheader" }, content)
      : h("td", { ...shared, role: "cell" }, content);
  });
  return h("tr", { role: "row", "data-key": row.key, class: row.class }, cells);
}

/** Make the children of `target` those of `wanted`, touching only what differs. */
export function morphChildren(target, wanted) {
  const keyed = new Map();
  for (const node of target.children) if (node.dataset?.key) keyed.set(node.dataset.key, node);
  let at = target.firstChild;
  for (const next of [...wanted.childNodes]) {
    const key = next.dataset?.key;
    let found = key ? keyed.get(key) : at;
    if (!key && found?.dataset?.key) found = null;
    if (found && same(found, next)) {
      if (found === at) at = at.nextSibling;
      else target.insertBefore(found, at);
      if (key) keyed.delete(key);
      morph(found, next);
    } else {
      target.insertBefore(next, at);
    }
  }
  while (at) {
    const gone = at;
    at = at.nextSibling;
    gone.remove();
  }
}

function same(a, b) {
  return a.nodeType === b.nodeType && a.nodeName === b.nodeName && a.dataset?.key === b.dataset?.key;
}

function morph(from, to) {
  if (from.nodeType !== Node.ELEMENT_NODE) {
    if (from.data !== to.data) from.data = to.data;
    return;
  }
  for (const { name } of [...from.attributes]) {
    if (name !== "style" && !to.hasAttribute(name)) from.removeAttribute(name);
  }
  for (const { name, value } of to.attributes) {
    if (name !== "style" && from.getAttribute(name) !== value) from.setAttribute(name, value);
  }
  // By the object model: the content policy forbids style attributes.
  if (from.style && from.style.cssText !== to.style.cssText) from.style.cssText = to.style.cssText;
  if (from.nodeName !== "INPUT" && from.nodeName !== "SELECT") morphChildren(from, to);
}
