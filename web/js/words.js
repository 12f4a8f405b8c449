/** Texts that our scripts draw, in the language of the frontend: `locales/<language>/main.json`. */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

let languages = {};

app.registerExtension({
  name: "QuantTune.Words",

  // The host waits for this before it makes any node.
  async init() {
    try {
      const answer = await api.fetchApi("/i18n");
      if (answer.ok) languages = await answer.json();
    } catch (error) {
      console.warn("QuantTune: no translations,", error);
    }
  },
});

/**
 * A text in the frontend's language, or as it is where that has none.
 *
 * @param english the text, as a literal: `devtools/locales.py` collects what it finds in calls.
 * @param values what to put in the place of each `{name}` in it.
 */
export function word(english, values = {}) {
  const language = app.extensionManager?.setting?.get?.("Comfy.Locale");
  const text = languages[language]?.quanttune?.[english] ?? english;
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}
