/** A panel with an SVG drawing in it that follows its size; sharp at any zoom and pixel density. */

import { THEME } from "./colours.js";
import { wrapped } from "./text_width.js";

const SVG = "http://www.w3.org/2000/svg";

/** An SVG element with attributes, in a parent if one is given. */
export function shape(name, attributes, parent) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes ?? {})) element.setAttribute(key, value);
  parent?.appendChild(element);
  return element;
}

/** Text in the drawing; `content` never becomes markup. */
export function label(parent, x, y, content, attributes) {
  const element = shape("text", { x, y, fill: THEME.faint, ...attributes }, parent);
  element.textContent = content;
  return element;
}

/** A text in the middle of a drawing, in as many lines as it takes. */
export function note(parent, width, height, content) {
  const lines = wrapped(content, width - 8);
  lines.forEach((line, index) => {
    label(parent, width / 2, height / 2 + 3.5 + 12 * (index - (lines.length - 1) / 2), line, {
      "text-anchor": "middle",
    });
  });
}

/** What a pointer that rests on an element is told. */
export function hint(element, content) {
  shape("title", {}, element).textContent = content;
}

/**
 * A panel of at least `height` pixels.
 *
 * A subclass gives `draw(svg, width, height)`; it is called for the next frame after `changed()`
 * and whenever the size changes. What goes wrong there leaves the panel as it is.
 */
export class Drawing {
  constructor(kind, height) {
    this.height = height;
    this.element = document.createElement("div");
    this.element.className = `quanttune-${kind}`;
    Object.assign(this.element.style, {
      position: "relative",
      overflow: "hidden",
      boxSizing: "border-box",
      minHeight: `${height}px`,
      borderRadius: "6px",
      border: `1px solid ${THEME.line}`,
      background: THEME.ground,
      pointerEvents: "auto",
    });
    this.svg = shape("svg", { role: "img", "font-size": 10, "font-family": "Inter, sans-serif" });
    Object.assign(this.svg.style, {
      position: "absolute", inset: "0", width: "100%", height: "100%",
    });
    this.element.appendChild(this.svg);
    if (typeof ResizeObserver === "function") {
      new ResizeObserver(() => this.changed()).observe(this.element);
    }
    this.waiting = false;
  }

  /** Draw again, once, before the next frame. */
  changed() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      const { clientWidth: width, clientHeight: height } = this.element;
      if (width < 40 || height < 20) return;
      const fresh = document.createDocumentFragment();
      try {
        this.draw(fresh, width, height);
      } catch (error) {
        console.warn("QuantTune could not draw", error);
        return;
      }
      this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.svg.replaceChildren(fresh);
    });
  }
}
