/**
 * Opens the pack's templates where their note can be read.
 *
 * The host shows a template from so far away that all of it is seen. Most of ours are then below the
 * size at which its canvas draws texts, and the note, the nodes' names and their values are blank.
 * Such a one is shown as its file says instead: from the note on, at a size that can be read.
 */
import { app } from "../../../scripts/app.js";
import { TEMPLATES } from "./template_titles.js";

/** Where a template of ours says that it is looked at from; null for every other graph. */
function viewOf(graph, name, options) {
  if (options?.openSource !== "template" || !TEMPLATES.some(([ours]) => ours === name)) return null;
  const { scale, offset } = graph?.extra?.ds ?? {};
  return scale > 0 && offset?.length === 2 ? { scale, offset: [...offset] } : null;
}

/** Look at the graph on screen from there, if its texts are not drawn from where it is seen. */
function look({ scale, offset }) {
  const { canvas } = app;
  if (!canvas?.low_quality || scale <= canvas.ds.scale) return;
  canvas.ds.scale = scale;
  canvas.ds.offset = offset;
  canvas.setDirty(true, true);
}

function install() {
  const load = app.loadGraphData;
  if (typeof load !== "function") return;
  app.loadGraphData = async function (graph, clean, restore, name, options) {
    const view = viewOf(graph, name, options); // the host changes what it is given
    const result = await load.apply(this, arguments);
    if (view) look(view);
    return result;
  };
}

app.registerExtension({ name: "QuantTune.TemplateView", init: install });
