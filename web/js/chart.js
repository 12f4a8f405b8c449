/** The losses of a training while it runs: a line an expert, and the experts' intervals below. */

import { drawBand, intervalOf, numbersOf } from "./band.js";
import { THEME, colourOf } from "./colours.js";
import { Drawing, hint, label, note, shape } from "./drawing.js";
import { numberText, reach, smoothed, ticksOf, verticalAxis } from "./scales.js";
import { pressed, shortened, widthOf } from "./text_width.js";
import { word } from "./words.js";

const LEFT = 40;
const RIGHT = 12;
const TOP = 20;

/** The panel of the training nodes. */
export class LossChart extends Drawing {
  /** @param banded whether the model has experts, whose intervals are drawn. */
  constructor(banded) {
    super("chart", banded ? 190 : 150);
    this.banded = banded;
    this.show(null);
  }

  /**
   * @param state null, or `{run, steps, step, experts, timesteps, points}`: of each expert a list
   *   of `[step, loss]`.
   */
  show(state) {
    this.state = state;
    this.changed();
  }

  draw(svg, width, height) {
    const state = this.state;
    if (!state) {
      note(svg, width, height, word("The loss is drawn here while it trains"));
      return;
    }
    const box = {
      left: LEFT, top: TOP, width: Math.max(1, width - LEFT - RIGHT),
      height: height - TOP - (this.banded ? 58 : 20),
    };
    const lines = state.points.map(smoothed);
    const last = lines.map((line) => (line.length ? line[line.length - 1][1] : null));
    this.title(svg, width, state, last);
    const axis = verticalAxis(state.points, lines);
    const end = reach(state.steps, state.step);
    const x = (step) => box.left + (step / end) * box.width;
    const y = (loss) => box.top + (1 - axis.place(loss)) * box.height;
    frame(svg, box, axis, end, x, y);
    const clip = `quanttune-clip-${(LossChart.count = (LossChart.count ?? 0) + 1)}`;
    shape("rect", { x: box.left, y: box.top - 2, width: box.width + 6, height: box.height + 4 },
      shape("clipPath", { id: clip }, svg));
    const plot = shape("g", { "clip-path": `url(#${clip})`, fill: "none" }, svg);
    state.points.forEach((points, expert) => drawPoints(plot, points, expert, state.experts, x, y));
    lines.forEach((line, expert) => drawLine(plot, line, expert, state.experts, x, y));
    if (this.banded) this.legend(svg, box, state, last);
  }

  title(svg, width, state, last) {
    const now = this.banded || last[0] === null ? "" : `${word("loss")} ${numberText(last[0])} · `;
    const text = now + word("step {step} of {steps}", state);
    label(svg, width - RIGHT, 13, shortened(text, width - RIGHT), {
      "text-anchor": "end", fill: THEME.text,
    });
    const start = LEFT + widthOf(word("loss")) + 5;
    if (start + widthOf(text) <= width - RIGHT) label(svg, LEFT, 13, word("loss"));
    const name = shortened(String(state.run ?? ""), width - RIGHT - widthOf(text) - 12 - start);
    if (name) label(svg, start, 13, name);
    this.svg.setAttribute("aria-label", word("Loss of {run}: {text}", { run: state.run, text }));
  }

  /** The intervals, with each expert's number and present loss, and its timesteps below. */
  legend(svg, box, state, last) {
    const { experts, timesteps } = state;
    const top = box.top + box.height + 22;
    const losses = last.map((l, e) => (l === null ? `${e + 1}` : `${e + 1}: ${numberText(l)}`));
    drawBand(svg, { left: box.left, top, width: box.width, height: 18 }, experts, timesteps,
      [losses, numbersOf(experts)]);
    const name = word("expert");
    label(svg, box.left - 5, top + 13, name, {
      "text-anchor": "end", ...pressed(name, box.left - 5),
    });
    label(svg, box.left - 5, top + 30, "t", { "text-anchor": "end" });
    const width = box.width / experts;
    const texts = state.points.map((_, e) => intervalOf(e, experts, timesteps));
    const wide = texts.every(([a, b]) => 5.6 * `${b}–${a}`.length + 6 <= width);
    texts.forEach(([first, final], e) => {
      const right = box.left + box.width - e * width;
      if (wide) {
        label(svg, right - width / 2, top + 30, `${final}–${first}`, { "text-anchor": "middle" });
      } else if (e === 0) {
        label(svg, right, top + 30, `${first}`, { "text-anchor": "end" });
      } else if (e === experts - 1) {
        label(svg, box.left, top + 30, `${final}`);
      }
    });
  }
}

/** Axes, their labels, and lines across. */
function frame(svg, box, axis, end, x, y) {
  const { left, top, width, height } = box;
  for (const loss of axis.ticks) {
    const at = y(loss);
    shape("line", { x1: left, x2: left + width, y1: at, y2: at, stroke: THEME.line,
      "stroke-width": 1, opacity: 0.5 }, svg);
    label(svg, left - 5, at + 3.5, numberText(loss), { "text-anchor": "end" });
  }
  shape("path", { d: `M${left} ${top} v${height} h${width}`, fill: "none", stroke: THEME.faint,
    "stroke-width": 1 }, svg);
  const ticks = ticksOf(0, end, Math.max(1, Math.floor(width / 70)));
  ticks.forEach((step, i) => {
    const at = x(step);
    shape("line", { x1: at, x2: at, y1: top + height, y2: top + height + 3, stroke: THEME.faint },
      svg);
    label(svg, at, top + height + 13, i ? numberText(step) : word("step 0"), {
      "text-anchor": at > left + width - 8 ? "end" : i ? "middle" : "start",
    });
  });
}

/** The losses themselves, faint. */
function drawPoints(parent, points, expert, count, x, y) {
  if (!points.length) return;
  const d = points.map(([step, loss]) => `M${x(step).toFixed(1)} ${y(loss).toFixed(1)}h0`);
  shape("path", { d: d.join(""), stroke: colourOf(expert, count), "stroke-width": 2.6,
    "stroke-linecap": "round", opacity: 0.4, class: "quanttune-points",
    "data-expert": expert + 1 }, parent);
}

/** The smoothed losses, with a dot at the end. */
function drawLine(parent, line, expert, count, x, y) {
  if (!line.length) return;
  const d = line.map(([step, loss], i) =>
    `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(loss).toFixed(1)}`);
  const path = shape("path", { d: d.join(""), stroke: colourOf(expert, count), "stroke-width": 2,
    "stroke-linejoin": "round", "stroke-linecap": "round", class: "quanttune-line",
    "data-expert": expert + 1 }, parent);
  const [step, loss] = line[line.length - 1];
  const value = numberText(loss);
  hint(path, count > 1 ? word("Expert {expert}: {loss}", { expert: expert + 1, loss: value }) : value);
  shape("circle", { cx: x(step), cy: y(loss), r: 3, fill: colourOf(expert, count) }, parent);
}
