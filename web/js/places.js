/** Which workflow is on screen, and from which one a prompt was queued. */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const MOST = 100;
const MOST_QUEUED = 1000;

/** Ids of graphs that have none. */
const NO_ID = /^[0-]*$/;

/** What tells open workflows apart: of each, by the ids that its graph had. */
const names = new WeakMap();
/** The same of those that were open before the page was loaded again: by id and tab, all three. */
const before = new Map();
/** Names with a tab in them that were given once. */
const closed = new Set();
/** Places of prompts, the newest last. */
const prompts = new Map();
/** Prompts that are not done. */
const running = new Set();
/** Those of them of which messages may have been missed. */
const missed = new Set();
/** Places of prompts that the server has not answered yet. */
const waiting = [];

/** The graph on screen, or that around the subgraph on screen. */
export function rootGraph() {
  return app.rootGraph ?? app.graph;
}

/** Where the frontend keeps the workflow on screen; the workflow's name for tabs. */
export function tab() {
  return String(app.extensionManager?.workflow?.activeWorkflow?.path ?? "");
}

function opened() {
  return [...(app.extensionManager?.workflow?.openWorkflows ?? [])];
}

/**
 * What tells an open workflow from all others, as long as it is open: the id of its graph; with the
 * name that its tab had first, where another tab has that id already, or it is none.
 */
function nameOf(workflow, id) {
  const own = names.get(workflow) ?? new Map();
  names.set(workflow, own);
  if (own.has(id)) return own.get(id);
  const taken = new Set(opened().flatMap((one) => [...(names.get(one)?.values() ?? [])]));
  const former = before.get(`${id}|${workflow.path}`)?.[2];
  let name = former ?? (NO_ID.test(id) ? `${id}|${workflow.path}` : id);
  if (taken.has(name)) name = `${id}|${workflow.path}`;
  // A tab's name may come again, for another graph that has no id either.
  while (taken.has(name) || (name !== former && closed.has(name))) name += "'";
  if (name.includes("|")) closed.add(name);
  own.set(id, name);
  return name;
}

/** The graph of an id, which is on screen if several have it. */
function place(id) {
  const all = opened();
  const shown = all.find(({ path }) => path === tab());
  // The graph is there before its tab is.
  const own = NO_ID.test(id) || shown?.activeState?.id === id;
  const owner = own ? shown : all.find(({ activeState }) => activeState?.id === id);
  return owner ? nameOf(owner, id) : id;
}

/** The type of a node of an open workflow, as it was when that was last on screen, or undefined. */
export function typeOf(where, id) {
  const there = opened().find((one) => [...(names.get(one)?.values() ?? [])].includes(where));
  const { nodes, definitions } = there?.activeState ?? {};
  let [within, type] = [nodes, undefined];
  for (const part of String(id).split(":")) {
    type = within?.find?.((node) => String(node.id) === part)?.type;
    within = definitions?.subgraphs?.find?.((graph) => graph.id === type)?.nodes;
  }
  return type;
}

/** What tells the workflow on screen from all others. */
export function screen() {
  return place(String(rootGraph()?.id ?? ""));
}

function remember(prompt, where) {
  prompts.delete(prompt);
  prompts.set(prompt, where);
  if (prompts.size <= MOST) return;
  // Of a long queue, the oldest are those that run next.
  const done = [...prompts.keys()].find((one) => one !== prompt && !running.has(one));
  if (done === undefined && prompts.size <= MOST_QUEUED) return;
  const oldest = done ?? prompts.keys().next().value;
  for (const list of [prompts, running, missed]) list.delete(oldest);
}

/** The workflow of a prompt, as `screen` tells it; null where none is known. */
export function placeOf(prompt) {
  if (prompts.has(prompt)) return prompts.get(prompt);
  // The server may begin before it answers, and answers in the order it was asked.
  if (waiting.length) return waiting[0];
  // Queued by something else than the page: of the only workflow there is, or of none.
  if (prompt == null || opened().length > 1) return null;
  remember(prompt, screen());
  return prompts.get(prompt);
}

/** Learn from now on which prompts are queued from which workflow. */
export function follow() {
  const queue = api.queuePrompt;
  if (typeof queue !== "function") return;
  api.queuePrompt = async function (number, data, ...others) {
    const where = place(String(data?.workflow?.id ?? rootGraph()?.id ?? ""));
    waiting.push(where);
    try {
      const answer = await queue.call(this, number, data, ...others);
      if (answer?.prompt_id) remember(answer.prompt_id, where);
      if (answer?.prompt_id) running.add(answer.prompt_id);
      return answer;
    } finally {
      waiting.splice(waiting.indexOf(where), 1);
    }
  };
}

/** A prompt is done. */
export function ended(prompt) {
  running.delete(prompt);
}

/** The page did not listen for a while. */
export function wasAway() {
  for (const prompt of [...running].slice(0, MOST)) missed.add(prompt);
}

/** An answer of the server; null where it gives none that can be read. */
async function ask(route) {
  try {
    const answer = await api.fetchApi(route);
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

/** Ids of the prompts that run or wait; null where the server does not tell. */
async function queued() {
  const told = await ask("/queue");
  const [now, next] = [told?.queue_running, told?.queue_pending];
  return Array.isArray(now) && Array.isArray(next)
    ? new Set([...now, ...next].map((item) => item?.[1])) : null;
}

/**
 * Ask the server what came of prompts while the page did not listen: `[prompt, outputs]` of each.
 *
 * What it knows nothing of is lost (it was started again, or told to forget) and not asked for
 * again. The queue comes first, since a prompt goes from there to what is done.
 */
export async function catchUp() {
  const told = [];
  const open = missed.size ? await queued() : null;
  for (const prompt of [...missed]) {
    if (open?.has(prompt)) continue;
    const answer = await ask(`/history/${encodeURIComponent(prompt)}`);
    const entry = answer?.[prompt];
    if (!answer || (!entry && !open) || !missed.delete(prompt)) continue;
    running.delete(prompt);
    if (entry) told.push([prompt, entry.outputs ?? {}]);
  }
  return told;
}

/** What `restore` takes: prompts, and of each workflow id, tab and what it is told apart by. */
export function kept() {
  const tabs = opened().flatMap((one) => {
    const id = one.activeState?.id;
    const name = names.get(one)?.get(id);
    // Tabs that were not looked at since they were there again are as they were.
    return name ? [[id, one.path, name]] : [...before.values()].filter(([, path]) => path === one.path);
  });
  const all = [...prompts].map(([prompt, where]) => [prompt, where, running.has(prompt)]);
  return {
    // Of those that are not done, the ones that run next.
    prompts: [
      ...all.filter(([, , open]) => !open).slice(-20),
      ...all.filter(([, , open]) => open).slice(0, MOST),
    ],
    tabs,
  };
}

/** Take what `kept` gave before the page was loaded again. */
export function restore(told) {
  for (const [id, path, name] of told?.tabs ?? []) {
    if (name) before.set(`${id}|${path}`, [id, path, name]);
  }
  for (const [prompt, where, open] of told?.prompts ?? []) {
    remember(prompt, where);
    if (open) running.add(prompt);
  }
  wasAway();
}
