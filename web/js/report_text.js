/**
 * Shows in a node what it had to say.
 *
 * Many of the pack's nodes answer with a text beside their outputs (`ui.PreviewText`): sizes, errors,
 * what fits. The frontend draws such pictures, but such texts only on its own *Preview Any*. Here the
 * text becomes a read-only field under the node's widgets, once there is one.
 */

const WIDGET = "quanttune_report";
const MIN_HEIGHT = 64;

/** The field of `node`, made on the first call; it is saved neither with workflows nor prompts. */
function field(node) {
  const found = node.widgets?.find((widget) => widget.name === WIDGET);
  if (found) return found;
  const element = document.createElement("textarea");
  element.className = "comfy-multiline-input quanttune-report";
  element.readOnly = true;
  element.spellcheck = false;
  element.setAttribute("aria-label", "Report");
  const widget = node.addDOMWidget(WIDGET, "customtext", element, {
    getValue: () => element.value,
    setValue: (value) => {
      element.value = value ?? "";
    },
    getMinHeight: () => MIN_HEIGHT,
    serialize: false,
  });
  widget.serialize = false;
  return widget;
}

/** Put `text` into `node`, in place of what it said before. */
export function showReport(node, text) {
  if (typeof node.addDOMWidget !== "function") return;
  const widget = field(node);
  if (widget.value === text) return;
  widget.value = text;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.setDirtyCanvas?.(true, true);
}
