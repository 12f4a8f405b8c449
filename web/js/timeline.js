/** Which expert acts in which step of a sampling. */

import { drawBand, expertAt, numbersOf, placeOf } from "./band.js";
import { THEME, colourOf } from "./colours.js";
import { Drawing, label, note, shape } from "./drawing.js";
import { shortened, widthOf } from "./text_width.js";
import { word } from "./words.js";

const EDGE = 8;

/** The panel of *Apply TuneQDM Scales*: intervals, a tick a step, a mark at the present one. */
export class ExpertTimeline extends Drawing {
  constructor() {
    super("timeline", 50);
    this.show({});
  }

  /**
   * @param state `{experts, timesteps, steps, at}`: N and T; shares of T of the last sampling's
   *   steps; that of the present step. All may be missing.
   */
  show(state) {
    this.state = state;
    this.changed();
  }

  draw(svg, width, height) {
    const { experts, timesteps = 1000, steps = [], at = null } = this.state;
    if (!experts) {
      note(svg, width, height, word("The experts are shown after the first run"));
      return;
    }
    const inner = width - 2 * EDGE;
    const active = at === null ? null : expertAt(at, experts);
    const box = { left: EDGE, top: 6, width: inner, height: Math.max(14, height - 34) };
    const texts = [numbersOf(experts).map((expert) => word("expert {expert}", { expert })), numbersOf(experts)];
    drawBand(svg, box, experts, timesteps, texts, active);
    const under = box.top + box.height + 2;
    steps.forEach((share, index) => {
      const x = placeOf(share, EDGE, inner);
      shape("line", {
        x1: x, x2: x, y1: under, y2: under + 6, "stroke-width": 1.5, "data-step": index + 1,
        stroke: colourOf(expertAt(share, experts), experts), "stroke-linecap": "round",
      }, svg);
    });
    if (at !== null) {
      const x = placeOf(at, EDGE, inner);
      shape("path", {
        d: `M${x} ${under - 1} l4 7 h-8 z`, fill: THEME.text, class: "quanttune-now",
      }, svg);
      shape("line", {
        x1: x, x2: x, y1: box.top, y2: under, stroke: THEME.text, "stroke-width": 1.5,
      }, svg);
    }
    const base = height - 7;
    const text = caption(experts, steps, at, active);
    label(svg, width / 2, base, shortened(text, width), {
      "text-anchor": "middle", fill: THEME.text,
    });
    // In a narrow node the step is worth more than the names of the ends.
    const [noise, image] = [word("noise"), word("image")];
    if (inner - widthOf(text) >= 2 * Math.max(widthOf(noise), widthOf(image)) + 8) {
      label(svg, EDGE, base, noise);
      label(svg, width - EDGE, base, image, { "text-anchor": "end" });
    }
    this.svg.setAttribute("aria-label", word("Expert timeline: {text}", { text }));
  }
}

/** Below the band: how far the sampling is, or how its steps are shared out. */
function caption(experts, steps, at, active) {
  if (at !== null) {
    const distances = steps.map((share) => Math.abs(share - at));
    const step = distances.indexOf(Math.min(...distances)) + 1;
    return (step ? `${word("step {step} of {steps}", { step, steps: steps.length })} · ` : "") +
      word("expert {expert}", { expert: active + 1 });
  }
  if (!steps.length) {
    return experts === 1 ? word("one expert for all steps") : word("{count} experts", { count: experts });
  }
  const all = word("{count} steps", { count: steps.length });
  if (experts === 1) return all;
  const counts = Array(experts).fill(0);
  for (const share of steps) counts[expertAt(share, experts)]++;
  const shared = experts <= 6 ? `: ${counts.reverse().join(" + ")}` : "";
  return all + shared;
}
