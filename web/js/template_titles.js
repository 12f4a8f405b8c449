/**
 * Gives the pack's workflows a title, one line each, and their order in the template browser.
 *
 * The host tells the frontend the file names of a pack's templates and nothing else, in the order of
 * the disk. The browser can show more, of ComfyUI's own templates. So ours are taken out of the list
 * of names and put, described, behind those; pictures and files still come from the pack's folder.
 * Where a frontend has no such lists, nothing is touched, and the file names are shown.
 */
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

/** File name without its ending, title, line; the titles and lines of the workflows' notes. */
export const TEMPLATES = [
  [
    "01-quantize-and-compare",
    "Quantize and compare",
    "Float, 8 bits and 4 bits side by side, from one seed.",
  ],
  [
    "02-timestep-routed-scales",
    "Timestep-routed scales",
    "A model in 4 bits, without and with a subject's scales.",
  ],
  [
    "03-personalise-a-subject",
    "Personalise a subject",
    "Six pictures become a scale file, with pictures while it learns.",
  ],
  [
    "04-two-subjects",
    "Two subjects in one scale set",
    "Two subjects, each with its own word, in one scale file.",
  ],
  [
    "05-train-on-a-folder",
    "Train on a whole folder",
    "A folder without captions: a style, a collection.",
  ],
  [
    "06-switch-subjects",
    "Switch subjects",
    "One base in memory, several scale files, and blends of them.",
  ],
  [
    "07-lora-train",
    "Train a LoRA",
    "A LoRA from six pictures on a model in 4 bits, for any tool.",
  ],
  [
    "08-lora-on-4-bit",
    "LoRA on a 4-bit model",
    "A LoRA on packed integers, with scales, and merged into them.",
  ],
  [
    "09-upscale-an-image",
    "Upscale an image",
    "A picture four times as large, beside bicubic interpolation.",
  ],
  [
    "10-paper-pipeline",
    "LoRA, dynamic INT8, x4 upscale",
    "A whole pipeline: a LoRA, pictures drawn in 8 bits, upscaled.",
  ],
  [
    "11-compare-precisions",
    "Compare precisions",
    "What 8 and 4 bits lose and cost, measured on this machine.",
  ],
  [
    "12-sensitivity-and-pareto",
    "Sensitivity and mixed precision",
    "Bits where they matter: at the size of 4 bits, a fifth of the error.",
  ],
  [
    "13-dynamic-int8",
    "Dynamic INT8",
    "Float, integers of 8 bits, and those on a base of 4 bits with scales.",
  ],
  [
    "14-calibrate-and-compare",
    "Calibrate and compare",
    "Static 8 bits, and 4 bits rounded to nearest and with GPTQ.",
  ],
  [
    "15-qat",
    "Quantization-aware training",
    "A model in 4 bits, before and after it learns to answer as float.",
  ],
  [
    "16-import-qdiffusion",
    "Import a Q-Diffusion checkpoint",
    "A published checkpoint of 4 bits as it is, and with scales.",
  ],
];

/** The name the host has for this pack: that of its folder, as in `/extensions/<name>/js/…`. */
const PACK = decodeURIComponent(new URL("..", import.meta.url).pathname.split("/").at(-2));

/** Our templates as the index of ComfyUI's own describes them; files we know nothing of come last. */
function described(names) {
  const known = new Map(TEMPLATES.map(([name, ...text]) => [name, text]));
  return [...names].sort().map((name) => {
    const [title, line] = known.get(name) ?? [name, name];
    return {
      name,
      title: known.has(name) ? `${name.slice(0, 2)} ${title}` : title,
      description: line,
      mediaType: "image",
      mediaSubtype: "jpg",
    };
  });
}

function install() {
  const ofPacks = api.getWorkflowTemplates;
  const ofComfy = api.getCoreWorkflowTemplates;
  if (typeof ofPacks !== "function" || typeof ofComfy !== "function") return;
  let ours = [];
  api.getWorkflowTemplates = async function () {
    const { [PACK]: names = [], ...others } = await ofPacks.apply(this, arguments);
    ours = names;
    return others;
  };
  api.getCoreWorkflowTemplates = async function () {
    const groups = await ofComfy.apply(this, arguments);
    if (!Array.isArray(groups) || !ours.length) return groups;
    const group = { moduleName: PACK, title: "QuantTune", type: "image" };
    return [...groups, { ...group, templates: described(ours) }];
  };
}

app.registerExtension({ name: "QuantTune.TemplateTitles", init: install });
