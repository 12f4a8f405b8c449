/** What the server told of nodes, kept by graph, so that it outlives the nodes of a closed tab. */

const MOST = 200;

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

  /** Add to what is known of a node of a prompt; returns whether its graph is the one on screen. */
  add(prompt, id, facts, screen) {
    this.placed(prompt, screen);
    const graph = this.places.get(prompt) ?? screen;
    const key = `${graph}|${id}`;
    const before = this.known.get(key);
    this.known.delete(key);
    this.known.set(key, { ...before, ...facts });
    if (this.known.size > MOST) this.known.delete(this.known.keys().next().value);
    return graph === screen;
  }

  /** A message of a training: all points, or those since the last message. */
  losses(told, screen) {
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
    const facts = { at: told.at, sampler: told.sampler };
    if (told.steps) facts.steps = told.steps;
    return told.nodes.filter((id) => this.add(told.prompt, id, facts, screen));
  }

  /** The output of a node that is done; returns whether there is something to draw. */
  executed(id, told, screen) {
    const { quanttune_losses: losses, quanttune_experts: experts, quanttune_badge: badge } =
      told?.output ?? {};
    if (!losses && !experts && !badge) return false;
    const facts = { ...experts?.[0] };
    if (losses) facts.losses = losses[0];
    if (badge) facts.badge = String(badge[0]);
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
