/**
 * Shows in a node what it had to say.
 *
 * Many of the pack's nodes answer with a text beside their outputs (`ui.PreviewText`): sizes, errors,
 * what fits. The frontend draws such pictures, but such texts only on its own *Preview Any*. Here the
 * text becomes a read-only field under the node's widgets, once there is one.
 */
import { app } from "../../../scripts/app.js";

const PREFIX = "QuantTune";
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

/** Put the text of `output`, what the server said of a finished node, into `node`. */
function show(node, output) {
  const text = output?.text;
  if (!text?.length) return;
  field(node).value = Array.isArray(text) ? text.join("\n\n") : String(text);
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.setDirtyCanvas?.(true, true);
}

/** Every node of the graph and of its subgraphs, by the name the server uses. */
function nodeOf(id) {
  return String(id)
    .split(":")
    .reduce(
      (at, part) => (at?.subgraph ?? at)?.getNodeById?.(Number(part)) ?? null,
      app.rootGraph ?? app.graph,
    );
}

app.registerExtension({
  name: "QuantTune.ReportText",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith(PREFIX)) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      show(this, output);
    };
  },

  // Going back to a tab restores the outputs without running the nodes again.
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs ?? {})) {
      const node = nodeOf(id);
      if (node?.type?.startsWith(PREFIX)) show(node, output);
    }
  },
});
