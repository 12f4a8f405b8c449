/** What QuantTune draws on its nodes: live losses, expert timelines, badges. */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { showBadge } from "./badge.js";
import { LossChart } from "./chart.js";
import { Memory, cleanExperts } from "./memory.js";
import { ExpertTimeline } from "./timeline.js";

const CHARTS = { QuantTuneTrainScales: true, QuantTuneLoraTrain: false, QuantTuneTrainQat: false };
const TIMELINE = "QuantTuneApplyScales";
const CONNECTED = "(connected scales)";
// Around an element, in the host's layout of widgets.
const MARGIN = 10;

const memory = new Memory();
const panels = new WeakMap();

function graph() {
  return app.rootGraph ?? app.graph;
}

/** Which graph is on screen; "" for one that has no id yet. */
function graphId() {
  const id = graph()?.id ?? "";
  return /^[0-]*$/.test(id) ? "" : id;
}

/** The node of an id of the server: "5", or "5:3" for node 3 within the subgraph node 5. */
function nodeOf(id) {
  const parts = String(id).split(":");
  let where = graph();
  for (const part of parts.slice(0, -1)) where = where?.getNodeById?.(part)?.subgraph;
  return where?.getNodeById?.(parts[parts.length - 1]);
}

/** Append a panel to a node as a widget that is neither saved nor sent. */
function addPanel(node, name, panel) {
  if (typeof node.addDOMWidget !== "function") return;
  const widget = node.addDOMWidget(name, name, panel.element, {
    serialize: false, hideOnZoom: false, margin: MARGIN,
    getMinHeight: () => panel.height + 2 * MARGIN,
    ...(panel instanceof ExpertTimeline && {
      getMaxHeight: () => panel.height + 2 * MARGIN,
    }),
    getValue: () => "", setValue: () => {},
  });
  if (widget) widget.serialize = false;
  panels.set(node, panel);
}

/** Draw what is known of a node. */
function draw(id) {
  const node = nodeOf(id);
  const known = memory.of(graphId(), id);
  if (!node || !known) return;
  const panel = panels.get(node);
  if (panel instanceof LossChart && known.losses) panel.show(known.losses);
  if (panel instanceof ExpertTimeline) panel.show({ ...fileOf.get(node), ...known });
  if (known.badge) showBadge(node, known.badge);
}

const fileOf = new WeakMap();

/** Ask the server for the experts in the chosen file of an *Apply TuneQDM Scales*. */
async function readFile(node) {
  const panel = panels.get(node);
  const name = node.widgets?.find((w) => w.name === "scale_name")?.value;
  if (!(panel instanceof ExpertTimeline) || fileOf.get(node)?.name === name) return;
  // What a former choice told is not of this one.
  const told = { name, ...(fileOf.has(node) && { experts: undefined, timesteps: undefined }) };
  fileOf.set(node, told);
  if (typeof name === "string" && name !== CONNECTED) {
    const answer = await api.fetchApi(`/quanttune/experts?name=${encodeURIComponent(name)}`);
    if (answer.ok) Object.assign(told, cleanExperts(await answer.json()));
  }
  if (fileOf.get(node) === told) panel.show({ ...panel.state, ...told });
}

/** Run `act`; what goes wrong is told in the console, and neither node nor page is the worse. */
function safely(act) {
  try {
    const result = act();
    result?.catch?.((error) => console.warn("QuantTune:", error));
  } catch (error) {
    console.warn("QuantTune:", error);
  }
}

function listen(event, act) {
  api.addEventListener?.(event, ({ detail }) => safely(() => act(detail)));
}

/** The sampler that timelines follow is done. */
function sampled(except) {
  for (const id of memory.sampled(graphId(), except)) draw(id);
}

app.registerExtension({
  name: "QuantTune",

  setup() {
    listen("execution_start", (told) => memory.placed(told?.prompt_id, graphId()));
    listen("quanttune.losses", (told) => {
      if (memory.losses(told, graphId())) draw(told.node);
    });
    listen("quanttune.experts", (told) => {
      for (const id of memory.experts(told, graphId())) draw(id);
    });
    listen("executed", (told) => {
      const id = told?.display_node ?? told?.node;
      if (memory.executed(id, told, graphId())) draw(id);
    });
    listen("executing", (node) => sampled(typeof node === "object" ? node?.node : node));
    for (const end of ["execution_success", "execution_error", "execution_interrupted"]) {
      listen(end, () => sampled(null));
    }
  },

  nodeCreated(node) {
    safely(() => {
      const kind = node.comfyClass ?? node.constructor?.comfyClass;
      if (kind in CHARTS) addPanel(node, "quanttune_chart", new LossChart(CHARTS[kind]));
      if (kind !== TIMELINE) return;
      addPanel(node, "quanttune_timeline", new ExpertTimeline());
      const chooser = node.widgets?.find((w) => w.name === "scale_name");
      if (!chooser) return;
      const before = chooser.callback;
      chooser.callback = function (...values) {
        const result = before?.apply(this, values);
        safely(() => readFile(node));
        return result;
      };
      // A node of a file gets its values after this.
      setTimeout(() => safely(() => readFile(node)));
    });
  },

  afterConfigureGraph() {
    // Another tab's graph, or this one opened again: its nodes are new, what they showed is known.
    safely(() => {
      if (!graphId()) memory.forget("");
      for (const id of memory.ids(graphId())) draw(id);
    });
  },

  loadedGraphNode(node) {
    safely(() => readFile(node));
  },
});
