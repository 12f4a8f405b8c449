/** Colours of the experts, the same in every drawing, readable on dark and on light. */

// From the clean end of the denoising process (expert 1) to the noisy one.
const STOPS = [
  [222, 84, 47],
  [207, 141, 9],
  [76, 159, 75],
  [24, 155, 176],
  [67, 121, 225],
  [152, 92, 219],
];

function mixed(place) {
  const at = place * (STOPS.length - 1);
  const low = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[low].map((v, i) => Math.round(v + (at - low) * (STOPS[low + 1][i] - v)));
}

function components(expert, count) {
  return count > 1 ? mixed(expert / (count - 1)) : STOPS[4];
}

/** CSS colour of an expert, counted from 0, of so many. */
export function colourOf(expert, count) {
  return `rgb(${components(expert, count).join(", ")})`;
}

/** CSS colour of text on `colourOf`. */
export function inkOn(expert, count) {
  const [r, g, b] = components(expert, count);
  return 0.299 * r + 0.587 * g + 0.114 * b > 132 ? "#101014" : "#ffffff";
}

/** The host's colours; the second ones are for a host that has no such variable. */
export const THEME = {
  text: "var(--fg-color, #dddddd)",
  faint: "var(--descrip-text, #999999)",
  line: "var(--border-color, #4e4e4e)",
  ground: "var(--comfy-menu-secondary-bg, var(--comfy-menu-bg, #303030))",
};
