/** How wide texts are drawn, and what of them fits. */

// Chinese and Japanese letters, without those of Japanese that have half the width.
const WIDE = /[\u2e80-\uff60\uffe0-\uffff]|[\u{10000}-\u{10ffff}]/u;

/** About how wide a text is drawn, in pixels: Chinese and Japanese letters are twice as wide. */
export function widthOf(text) {
  return [...text].reduce((sum, sign) => sum + (WIDE.test(sign) ? 11 : 5.8), 0);
}

/** Attributes that press a text into so many pixels where it is wider. */
export function pressed(text, width) {
  return widthOf(text) <= width ? {} : { textLength: width, lengthAdjust: "spacingAndGlyphs" };
}

/** A text, or its beginning, in so many pixels; nothing where less than some letters fit. */
export function shortened(text, width) {
  if (widthOf(text) <= width) return text;
  const signs = [...text].slice(0, Math.max(0, Math.floor(width / 5.8)));
  while (signs.length && widthOf(`${signs.join("")}…`) > width) signs.pop();
  return signs.length > 3 ? `${signs.join("")}…` : "";
}

/** A text in lines of so many pixels, broken at spaces, or anywhere in letters that have none. */
export function wrapped(text, width) {
  const lines = [""];
  for (const part of text.match(/[\u2e80-\uffff]|[^\s\u2e80-\uffff]+|\s+/g) ?? []) {
    const longer = lines[lines.length - 1] + part;
    if (widthOf(longer.trimEnd()) <= width || !lines[lines.length - 1]) {
      lines[lines.length - 1] = longer;
    } else {
      lines.push(part.trimStart());
    }
  }
  return lines.map((line) => line.trim()).filter(Boolean);
}
