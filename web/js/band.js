/** The denoising process as a band of coloured intervals, one an expert; noise on the left. */

import { colourOf, inkOn } from "./colours.js";
import { hint, label, shape } from "./drawing.js";
import { widthOf } from "./text_width.js";
import { word } from "./words.js";

/** The expert, from 0 on, that serves a timestep given as a share of T. */
export function expertAt(share, count) {
  return Math.min(count - 1, Math.max(0, Math.floor(share * count + 1e-9)));
}

/** First and last timestep of an expert. */
export function intervalOf(expert, count, timesteps) {
  const first = Math.ceil((expert * timesteps) / count);
  return [first, Math.max(first, Math.ceil(((expert + 1) * timesteps) / count) - 1)];
}

/** The experts' numbers as texts. */
export function numbersOf(count) {
  return Array.from({ length: count }, (_, expert) => `${expert + 1}`);
}

/** Where a share of T lies between `left` and `left + width`. */
export function placeOf(share, left, width) {
  return left + (1 - share) * width;
}

/**
 * Draw the band.
 *
 * @param parent what it is put into.
 * @param box `{left, top, width, height}` in pixels.
 * @param count N.
 * @param timesteps T.
 * @param texts what may stand in the intervals, each a list of one text an expert; of the first
 *   list that fits.
 * @param active the only expert in full colour, or null for all.
 */
export function drawBand(parent, box, count, timesteps, texts, active = null) {
  const group = shape("g", { class: "quanttune-band" }, parent);
  const width = box.width / count;
  const gap = width > 6 ? 1 : 0;
  const fitting = texts.find((list) => list.every((text) => widthOf(text) + 3 <= width));
  for (let expert = 0; expert < count; expert++) {
    const left = placeOf((expert + 1) / count, box.left, box.width);
    const part = shape("rect", {
      x: left + gap / 2, y: box.top, width: width - gap, height: box.height,
      rx: Math.min(3, width / 3), fill: colourOf(expert, count), "data-expert": expert + 1,
      opacity: active === null || active === expert ? 1 : 0.4,
    }, group);
    const [first, last] = intervalOf(expert, count, timesteps);
    hint(part, word("Expert {expert} of {count}: timesteps {first} to {last}",
      { expert: expert + 1, count, first, last }));
    if (fitting?.[expert]) {
      label(group, left + width / 2, box.top + box.height / 2 + 3.5, fitting[expert], {
        "text-anchor": "middle", fill: inkOn(expert, count), "font-weight": 600,
        "pointer-events": "none",
      });
    }
  }
}
