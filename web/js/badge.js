/** A badge on a node: bits and size of the model that it gave. */

import { THEME } from "./colours.js";

const shown = new WeakMap();

/** Whether the frontend draws nodes as elements of the page, not on the canvas. */
function asElements() {
  return Boolean(globalThis.LiteGraph?.vueNodesMode);
}

function plain(badge) {
  return typeof badge === "function" ? badge() : badge;
}

/** The frontend's class of badges; older and newer ones have it in different places. */
function classOf(node) {
  const known = globalThis.LGraphBadge ?? globalThis.LiteGraph?.LGraphBadge;
  if (typeof known === "function") return known;
  const other = plain(node.badges[0]);
  return typeof other?.draw === "function" ? other.constructor : null;
}

/** Above the title of a node on the canvas. */
function addAbove(node, known) {
  const Badge = Array.isArray(node.badges) ? classOf(node) : null;
  if (!Badge) return;
  const badge = new Badge({ text: known.text });
  const neighbour = node.badges[0];
  node.badges.push(() => {
    badge.text = asElements() ? "" : known.text;
    // The host's own badges have the theme's colours.
    const other = plain(neighbour);
    if (other?.fgColor) badge.fgColor = other.fgColor;
    if (other?.bgColor) badge.bgColor = other.bgColor;
    return badge;
  });
}

/** In a node that is an element: its badges are read once, before any is known. */
function addWithin(node) {
  if (typeof node.addDOMWidget !== "function") return null;
  const line = document.createElement("div");
  line.className = "quanttune-badge";
  Object.assign(line.style, {
    color: THEME.faint, fontSize: "11px", textAlign: "right", overflow: "hidden",
    whiteSpace: "nowrap",
  });
  const height = () => (asElements() ? 20 : 0);
  const widget = node.addDOMWidget("quanttune_badge", "quanttune_badge", line, {
    serialize: false, getValue: () => "", setValue: () => {},
    getMinHeight: height, getMaxHeight: height,
  });
  if (widget) widget.serialize = false;
  return line;
}

/** Show `text` on a node, in place of what it showed before. */
export function showBadge(node, text) {
  let known = shown.get(node);
  if (!known) {
    shown.set(node, (known = { text, line: null }));
    addAbove(node, known);
  }
  known.text = text;
  if (asElements()) known.line ??= addWithin(node);
  if (known.line) known.line.textContent = text;
  node.setDirtyCanvas?.(true, true);
}
