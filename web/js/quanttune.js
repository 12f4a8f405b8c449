/** What QuantTune draws on its nodes: live losses, expert timelines, badges, reports. */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { showBadge } from "./badge.js";
import { LossChart } from "./chart.js";
import { Memory, cleanExperts } from "./memory.js";
import {
  catchUp, ended, follow, kept, placeOf, restore, rootGraph, screen, tab, typeOf, wasAway,
} from "./places.js";
import { showReport } from "./report_text.js";
import { ExpertTimeline } from "./timeline.js";

const CHARTS = { QuantTuneTrainScales: true, QuantTuneLoraTrain: false, QuantTuneTrainQat: false };
const PREFIX = "QuantTune";
const TIMELINE = "QuantTuneApplyScales";
const CONNECTED = "(connected scales)";
// Around an element, in the host's layout of widgets.
const MARGIN = 10;

// In the page's own storage, of which the frontend's unsaved workflows need most.
const KEPT = "quanttune.drawn";
const LETTERS = 300_000;

const memory = new Memory();
const panels = new WeakMap();
/** Ids and tabs of the workflows that were open before the page was loaded again. */
const reloaded = new Set();

/** The node of an id of the server: "5", or "5:3" for node 3 within the subgraph node 5. */
function nodeOf(id) {
  const parts = String(id).split(":");
  let where = rootGraph();
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

function isOurs(type) {
  return Boolean(type?.startsWith?.(PREFIX));
}

/** Learn the output of a node; whether there is something to draw. That of other packs' is not. */
function learn(id, told, where) {
  const type = where === screen() ? nodeOf(id)?.type : typeOf(where, id);
  // Of a workflow that is not open any more, nobody knows.
  return (type == null || isOurs(type)) && memory.executed(id, told, where, type);
}

/** Draw what is known of nodes of the workflow on screen; nothing of one that is `where` else. */
function draw(ids = memory.ids(screen()), where = screen()) {
  if (where === screen()) for (const id of ids) drawNode(id);
}

function drawNode(id) {
  const node = nodeOf(id);
  const known = memory.of(screen(), id);
  if (!known || !isOurs(node?.type)) return;
  // The graph was emptied, and its ids begin anew.
  if (known.type && known.type !== node.type) return;
  const panel = panels.get(node);
  if (panel instanceof LossChart && known.losses) panel.show(known.losses);
  if (panel instanceof ExpertTimeline) panel.show({ ...fileOf.get(node), ...known });
  if (known.badge) showBadge(node, known.badge);
  if (known.text) showReport(node, known.text);
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
  for (const [where, id] of memory.sampled(except)) draw([id], where);
}

/** Draw what came of prompts while the page did not listen. */
async function drawMissed() {
  for (const [prompt_id, outputs] of await catchUp()) {
    const where = placeOf(prompt_id);
    for (const [id, output] of Object.entries(outputs)) {
      if (learn(id, { output, prompt_id }, where)) draw([id], where);
    }
  }
}

/** Keep what is drawn for when the page is loaded again; less of it where there is no room. */
function keep() {
  const { prompts, tabs } = kept();
  // What was kept before is not of now.
  sessionStorage.removeItem(KEPT);
  for (const letters of [LETTERS, LETTERS / 10, 0]) {
    const told = JSON.stringify({ prompts, tabs, nodes: memory.kept(letters) });
    try {
      return sessionStorage.setItem(KEPT, told);
    } catch (error) {
      if (!letters) throw error;
    }
  }
}

function takeUp() {
  const told = JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
  if (!told) return;
  restore(told);
  memory.restore(told.nodes);
  for (const [id, path] of told.tabs) reloaded.add(`${id}|${path}`);
}

/** Draw a workflow that was there before the page was loaded, once its tab is the one on screen. */
function drawReloaded(turns = 100) {
  const id = String(rootGraph()?.id ?? "");
  if (reloaded.delete(`${id}|${tab()}`)) {
    draw();
  } else if (turns && [...reloaded].some((one) => one.startsWith(`${id}|`))) {
    setTimeout(() => safely(() => drawReloaded(turns - 1)), 100);
  }
}

app.registerExtension({
  name: "QuantTune",

  init() {
    safely(takeUp);
    safely(follow);
    window.addEventListener("pagehide", () => safely(keep));
  },

  setup() {
    listen("quanttune.losses", (told) => {
      const where = placeOf(told?.prompt);
      if (memory.losses(told, where)) draw([told.node], where);
    });
    listen("quanttune.experts", (told) => {
      const where = placeOf(told?.prompt);
      draw(memory.experts(told, where), where);
    });
    listen("executed", (told) => {
      const id = told?.display_node ?? told?.node;
      const where = placeOf(told?.prompt_id);
      // The frontend gives it to the graph on screen, whichever that is.
      if (where !== screen()) memory.mistaken(screen(), id);
      if (learn(id, told, where)) draw([id], where);
    });
    listen("executing", (told) => {
      const node = typeof told === "object" ? told?.node : told;
      sampled(node);
      // Only now has the server written down what came of a prompt.
      return node == null ? drawMissed() : null;
    });
    for (const end of ["execution_success", "execution_error", "execution_interrupted"]) {
      listen(end, (told) => {
        ended(told?.prompt_id);
        sampled(null);
      });
    }
    listen("reconnected", () => {
      wasAway();
      return drawMissed();
    });
    safely(drawMissed);
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
    // The graph is there before its tab is.
    safely(drawReloaded);
  },

  onNodeOutputsUpdated(outputs) {
    // Back at another tab, after an undo, or from the list of jobs: its nodes are new.
    safely(() => {
      for (const [id, output] of Object.entries(outputs ?? {})) {
        const type = nodeOf(id)?.type;
        if (isOurs(type)) memory.found(id, output, screen(), type);
      }
      draw();
    });
  },

  loadedGraphNode(node) {
    safely(() => readFile(node));
  },
});
