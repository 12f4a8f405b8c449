/** What the server told of nodes, kept by workflow, so that it outlives the nodes of a closed tab. */

const MOST_GRAPHS = 50;
const MOST_NODES = 200;
const MOST_EXPERTS = 1000;
const MOST_LETTERS = 20_000;
const MOST_NAME = 200;
/** Of all experts together; the server sends a quarter of it. */
const MOST_POINTS = 2048;
/** No loss in float32 is larger, and sums of such are numbers. */
const LARGEST = 3.5e38;

function whole(value, low, high, otherwise) {
  return Number.isInteger(value) && value >= low && value <= high ? value : otherwise;
}

function share(value) {
  return Number.isFinite(value) && value >= 0 && value <= 1;
}

/** A point that can be drawn: `[step, loss]`. */
function isPoint(told) {
  return Array.isArray(told) && Number.isFinite(told[0]) && Math.abs(told[1]) <= LARGEST &&
    typeof told[1] === "number";
}

/** Points of one of so many experts, evenly left out where there are too many to draw. */
function thinned(points, experts) {
  const every = Math.ceil(points.length / Math.max(8, MOST_POINTS / experts));
  return every > 1 ? points.filter((_, index) => index % every === 0) : points;
}

/** A message of losses with nothing in it that could not be drawn; null if nothing is left. */
function cleanLosses(told) {
  const experts = whole(told?.experts, 1, MOST_EXPERTS, 0);
  if (!experts || !Array.isArray(told.points) || told.points.length !== experts) return null;
  const points = told.points.map(
    (own) => thinned((Array.isArray(own) ? own : []).filter(isPoint), experts));
  return {
    ...told, experts, points, run: String(told.run ?? "").slice(0, MOST_NAME),
    steps: whole(told.steps, 1, Infinity, 1), step: whole(told.step, 0, Infinity, 0),
    timesteps: whole(told.timesteps, 1, Infinity, 1000),
  };
}

/** N and T, as far as they can be drawn. */
export function cleanExperts(told) {
  const experts = whole(told?.experts, 1, MOST_EXPERTS, 0);
  return experts ? { experts, timesteps: whole(told.timesteps, 1, Infinity, 1000) } : {};
}

/** What can be drawn of the output of a node that is done. */
function factsOf(output) {
  const { quanttune_losses: [losses] = [], quanttune_experts: [experts] = [],
    quanttune_badge: [badge] = [], text } = output ?? {};
  const facts = cleanExperts(experts);
  const all = cleanLosses(losses);
  if (all) facts.losses = all;
  if (badge) facts.badge = String(badge).slice(0, 60);
  if (text?.length) {
    facts.text = (Array.isArray(text) ? text.join("\n\n") : String(text)).slice(0, MOST_LETTERS);
  }
  return facts;
}

function newest(map, most) {
  if (map.size > most) map.delete(map.keys().next().value);
}

/** Workflows are told apart by any text ("places.js" has them), null for those nobody knows. */
export class Memory {
  constructor() {
    this.graphs = new Map();
    this.wrong = new Set();
  }

  /** All that is known of a node, or undefined. */
  of(graph, id) {
    return this.graphs.get(graph)?.get(String(id));
  }

  /** Ids of a graph's nodes of which something is known. */
  ids(graph) {
    return [...(this.graphs.get(graph)?.keys() ?? [])];
  }

  /** Add to what is known of a node of a prompt. */
  add(graph, id, facts, prompt) {
    const nodes = this.graphs.get(graph) ?? new Map();
    this.graphs.delete(graph);
    this.graphs.set(graph, nodes);
    newest(this.graphs, MOST_GRAPHS);
    const key = String(id);
    const before = nodes.get(key);
    // A tab's name may come again, for another graph that has no id either.
    const same = !graph?.includes("|") || before?.prompt === prompt;
    nodes.delete(key);
    nodes.set(key, { ...(same && before), ...facts, prompt });
    newest(nodes, MOST_NODES);
  }

  /** A message of a training: all points, or those since the last message; whether it tells. */
  losses(message, graph) {
    const told = cleanLosses(message);
    if (!told) return false;
    const before = this.of(graph, told.node)?.losses;
    if (!told.whole) {
      // Without a beginning, the next whole message has to be waited for.
      if (before?.run !== told.run || before.points.length !== told.points.length) return false;
      told.points = before.points.map(
        (own, e) => thinned([...own, ...told.points[e]], told.experts));
    }
    this.add(graph, told.node, { losses: told }, told.prompt);
    return true;
  }

  /** A message of a sampling; returns the ids of the nodes that have changed. */
  experts(told, graph) {
    if (!Array.isArray(told?.nodes) || !share(told.at)) return [];
    const facts = { at: told.at, sampler: String(told.sampler ?? "") };
    if (Array.isArray(told.steps)) facts.steps = told.steps.filter(share);
    for (const id of told.nodes) this.add(graph, id, facts, told.prompt);
    return told.nodes;
  }

  /** The output of a node that is done, and its type if known; whether there is something to draw. */
  executed(id, told, graph, type) {
    const facts = factsOf(told?.output);
    if (!Object.keys(facts).length) return false;
    this.add(graph, id, type ? { ...facts, type } : facts, told.prompt_id);
    return true;
  }

  /** The frontend took the output of another workflow's node for that of this node. */
  mistaken(graph, id) {
    this.wrong.add(`${graph}:${id}`);
  }

  /** An output that the frontend had kept. */
  found(id, output, graph, type) {
    if (this.of(graph, id) || this.wrong.has(`${graph}:${id}`)) return;
    this.executed(id, { output }, graph, type);
  }

  /** No timeline shows a present step any more, unless its sampler is `except`; where they are. */
  sampled(except) {
    const changed = [];
    for (const [graph, nodes] of this.graphs) {
      for (const [id, known] of nodes) {
        if (known.at == null || (except != null && String(except) === known.sampler)) continue;
        known.at = null;
        changed.push([graph, id]);
      }
    }
    return changed;
  }

  /** What `restore` takes, the newest of it, in about so many letters. */
  kept(letters) {
    const list = [];
    for (const graph of [...this.graphs.keys()].reverse()) {
      for (const id of this.ids(graph).reverse()) {
        const entry = [graph, id, { ...this.of(graph, id), at: null }];
        letters -= JSON.stringify(entry).length;
        if (letters < 0) return list.reverse();
        list.push(entry);
      }
    }
    return list.reverse();
  }

  /** Take what `kept` gave before the page was loaded again. */
  restore(list) {
    for (const [graph, id, { prompt, ...facts }] of list ?? []) this.add(graph, id, facts, prompt);
  }
}
