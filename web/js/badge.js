/** A badge above a node: bits and size of the model that it gave. */

/** What draws badges on the canvas; older and newer frontends have it in different places. */
function makerOf(node) {
  const known = globalThis.LGraphBadge ?? globalThis.LiteGraph?.LGraphBadge;
  if (typeof known === "function") return known;
  const other = plain(node.badges?.[0]);
  return typeof other?.draw === "function" ? other.constructor : null;
}

function plain(badge) {
  return typeof badge === "function" ? badge() : badge;
}

/** Show `text` on a node, in place of what it showed before. */
export function showBadge(node, text) {
  if (!Array.isArray(node.badges)) return;
  if (node.quanttuneBadge) {
    node.quanttuneBadge.text = text;
  } else {
    const Badge = makerOf(node);
    if (!Badge) return;
    const badge = new Badge({ text });
    Object.defineProperty(node, "quanttuneBadge", { value: badge, enumerable: false });
    const neighbour = node.badges[0];
    node.badges.push(() => {
      // The host's badges know the theme's colours.
      const other = plain(neighbour);
      if (other?.fgColor) badge.fgColor = other.fgColor;
      if (other?.bgColor) badge.bgColor = other.bgColor;
      return badge;
    });
  }
  // What draws nodes as page elements looks again when it is told.
  node.graph?.trigger?.("node:property:changed", {
    type: "node:property:changed", nodeId: node.id, property: "badges",
    oldValue: node.badges, newValue: node.badges,
  });
  node.setDirtyCanvas?.(true, true);
}
