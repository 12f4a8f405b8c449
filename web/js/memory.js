/** What the server told of nodes, kept by graph, so that it outlives the nodes of a closed tab. */

const MOST = 200;
const MOST_EXPERTS = 1000;

function whole(value, low, high, otherwise) {
  return Number.isInteger(value) && value >= low && value <= high ? value : otherwise;
}

function share(value) {
  return Number.isFinite(value) && value >= 0 && value <= 1;
}

/** A message of losses with nothing in it that could not be drawn; null if nothing is left. */
function cleanLosses(told) {
  const experts = whole(told?.experts, 1, MOST_EXPERTS, 0);
  if (!experts || !Array.isArray(told.points) || told.points.length !== experts) return null;
  const points = told.points.map((own) => (Array.isArray(own) ? own : []).filter(
    (p) => Array.isArray(p) && Number.isFinite(p[0]) && Number.isFinite(p[1])));
  return {
    ...told, experts, points, run: String(told.run ?? ""),
    steps: whole(told.steps, 1, Infinity, 1), step: whole(told.step, 0, Infinity, 0),
    timesteps: whole(told.timesteps, 1, Infinity, 1000),
  };
}

/** N and T, as far as they can be drawn. */
export function cleanExperts(told) {
  const experts = whole(told?.experts, 1, MOST_EXPERTS, 0);
  return experts ? { experts, timesteps: whole(told.timesteps, 1, Infinity, 1000) } : {};
}

export class Memory {
  constructor() {
    this.known = new Map();
    this.places = new Map();
  }

  /** A prompt began, most likely of the graph on screen. */
  placed(prompt, graph) {
    if (!prompt || this.places.has(prompt)) return;
    this.places.set(prompt, graph);
    if (this.places.size > MOST) this.places.delete(this.places.keys().next().value);
  }

  /** All that is known of a node, or undefined. */
  of(graph, id) {
    return this.known.get(`${graph}|${id}`);
  }

  /** Ids of a graph's nodes of which something is known. */
  ids(graph) {
    const start = `${graph}|`;
    const keys = [...this.known.keys()].filter((key) => key.startsWith(start));
    return keys.map((key) => key.slice(start.length));
  }

  /** Nothing is known of a graph any more. */
  forget(graph) {
    for (const id of this.ids(graph)) this.known.delete(`${graph}|${id}`);
  }

  /** Add to what is known of a node of a prompt; returns whether its graph is the one on screen. */
  add(prompt, id, facts, screen) {
    this.placed(prompt, screen);
    const graph = this.places.get(prompt) ?? screen;
    const key = `${graph}|${id}`;
    const before = this.known.get(key);
    // Two graphs that have no id yet are not to be taken for one.
    const same = graph || before?.prompt === prompt;
    this.known.delete(key);
    this.known.set(key, { ...(same && before), ...facts, prompt });
    if (this.known.size > MOST) this.known.delete(this.known.keys().next().value);
    return graph === screen;
  }

  /** A message of a training: all points, or those since the last message. */
  losses(message, screen) {
    const told = cleanLosses(message);
    if (!told) return false;
    const graph = this.places.get(told.prompt) ?? screen;
    const before = this.of(graph, told.node)?.losses;
    if (told.whole) return this.add(told.prompt, told.node, { losses: told }, screen);
    // Without a beginning, the next whole message has to be waited for.
    if (before?.run !== told.run || before.points.length !== told.points.length) return false;
    const points = before.points.map((own, e) => [...own, ...told.points[e]]);
    return this.add(told.prompt, told.node, { losses: { ...told, points } }, screen);
  }

  /** A message of a sampling; returns the ids of the nodes that have changed. */
  experts(told, screen) {
    if (!Array.isArray(told?.nodes) || !share(told.at)) return [];
    const facts = { at: told.at, sampler: String(told.sampler ?? "") };
    if (Array.isArray(told.steps)) facts.steps = told.steps.filter(share);
    return told.nodes.filter((id) => this.add(told.prompt, id, facts, screen));
  }

  /** The output of a node that is done; returns whether there is something to draw. */
  executed(id, told, screen) {
    const { quanttune_losses: [losses] = [], quanttune_experts: [experts] = [],
      quanttune_badge: [badge] = [] } = told?.output ?? {};
    const facts = cleanExperts(experts);
    const all = cleanLosses(losses);
    if (all) facts.losses = all;
    if (badge) facts.badge = String(badge).slice(0, 60);
    if (!Object.keys(facts).length) return false;
    return this.add(told.prompt_id, id, facts, screen);
  }

  /** Timelines show no present step any more, unless their sampler is `except`; their ids. */
  sampled(graph, except) {
    return this.ids(graph).filter((id) => {
      const known = this.of(graph, id);
      if (known.at == null || (except != null && String(except) === known.sampler)) return false;
      known.at = null;
      return true;
    });
  }
}
