/** Which workflow is on screen, and from which one a prompt was queued. */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const MOST = 100;
const MOST_QUEUED = 1000;

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

/** The id of a graph; with its tab, where other tabs have that id, or it is none. */
function place(id) {
  const same = opened().filter((workflow) => workflow?.activeState?.id === id);
  return /^[0-]*$/.test(id) || same.length > 1 ? `${id}|${tab()}` : id;
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
  if (opened().length > 1) return null;
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

/** Ask the server what came of prompts while the page did not listen: `[prompt, outputs]` of each. */
export async function catchUp() {
  const told = [];
  for (const prompt of missed) {
    const answer = await api.fetchApi(`/history/${encodeURIComponent(prompt)}`);
    const entry = answer.ok && (await answer.json())[prompt];
    if (!entry || !missed.delete(prompt)) continue;
    running.delete(prompt);
    told.push([prompt, entry.outputs ?? {}]);
  }
  return told;
}

/** What `restore` takes: prompts, and the tab of each workflow. */
export function kept() {
  const tabs = opened().map(({ path, activeState }) => [activeState?.id, path]);
  const all = [...prompts].map(([prompt, where]) => [prompt, where, running.has(prompt)]);
  return {
    // Of those that are not done, the ones that run next.
    prompts: [
      ...all.filter(([, , open]) => !open).slice(-20),
      ...all.filter(([, , open]) => open).slice(0, MOST),
    ],
    tabs: tabs.filter(([id]) => id),
  };
}

/** Take what `kept` gave before the page was loaded again. */
export function restore(told) {
  for (const [prompt, where, open] of told?.prompts ?? []) {
    remember(prompt, where);
    if (open) running.add(prompt);
  }
  wasAway();
}
