"""``python -m quanttune report``: a report on a float model, from the command line."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

from ..metrics.report import save_report
from ..quant import QuantTuneError
from .command import load_float, make_folder, start_host

NAME = "report"
STARTER = {
    "prompts": ("a red striped star on a blue background",
                "a small green circle on the left, white background",
                "a purple heart on a yellow gradient background",
                "a large black moon on an orange background with rays"),
    "latent": 16}
CHECKPOINT = {
    "prompts": ("a photo of a red fox in the snow, morning light",
                "a bowl of fruit on a wooden table, oil painting",
                "a city street at night in the rain, neon signs",
                "portrait of an old fisherman, black and white photograph"),
    "latent": 64}
"""What is not told, by the kind of model."""
QUICK = {"unit": "group", "forwards": 2, "timestep_buckets": 2, "samples": 2, "runs": 3,
         "steps": 10}
"""Instead of the defaults of `ReportSettings`: minutes become seconds, numbers become rough."""
TOLD = ("latent", "bits", "unit", "forwards", "timestep_buckets", "samples", "pictures", "runs",
        "steps", "cfg", "sampler", "scheduler", "seed")


def report(options: Namespace, command: str = "") -> int:
    """Measure as the options of the command line say, and write HTML and Markdown.

    Nothing is written before everything is measured. Ctrl-C ends it at once; returns 130 then.
    """
    folder = Path(options.out)
    if options.checkpoint is not None and not options.checkpoint.strip():
        raise QuantTuneError("The option --checkpoint is empty; give the path of a file with "
                             "model, text encoder and VAE, or --starter in its place.")
    words = {**(STARTER if options.starter else CHECKPOINT), **(QUICK if options.quick else {})}
    words.update({name: value for name in TOLD if (value := getattr(options, name)) is not None})
    if options.prompts:
        words["prompts"] = tuple(line for word in options.prompts for line in read_prompts(word))
    if options.bits:
        words["bits"] = tuple(dict.fromkeys(options.bits))
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        start_host(options.device)
        return _measure(options, words, folder, command)
    except KeyboardInterrupt:
        print("Stopped; no report was written.", file=sys.stderr)
        return 130
    finally:
        # Those that are empty, where nothing was written.
        with suppress(OSError):
            for path in new:
                path.rmdir()


def _measure(options: Namespace, words: dict, folder: Path, command: str) -> int:
    import comfy.samplers
    import comfy.utils
    import torch

    from .report import ReportSettings, report_on

    if options.prompts and options.samples is None:
        # Each has its turn.
        words["samples"] = max(words.get("samples", ReportSettings.samples), len(words["prompts"]))
    how = ReportSettings(**words)
    for name, known in (("sampler", comfy.samplers.KSampler.SAMPLERS),
                        ("scheduler", comfy.samplers.KSampler.SCHEDULERS)):
        if getattr(how, name) not in known:
            raise QuantTuneError(f"There is no {name} '{getattr(how, name)}'; choose one of "
                                 f"{', '.join(known)}.")
    make_folder(folder, "of --out")
    console = Console()
    comfy.utils.set_progress_bar_global_hook(console.progress)
    try:
        with torch.inference_mode():
            model, clip, vae, name = load_float(
                {"starter": options.starter, "checkpoint": options.checkpoint})
            made = report_on(model, clip, vae, options.title or name, how, command, console.part)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    written = save_report(made, folder / NAME)
    print(made.sections[-2].text)
    for path in written:
        print(f"Saved {path}")
    return 0


def read_prompts(word: str) -> list[str]:
    """The lines of a file, or the text itself.

    Raises QuantTuneError for a text file that cannot be read or holds nothing.
    """
    path = Path(word)
    if path.suffix.lower() not in (".txt", ".csv", ".md"):
        return [word]
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise QuantTuneError(f"The prompts {word} cannot be read ({reason}); give a text file "
                             "with a prompt a line, or the prompt itself.") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise QuantTuneError(f"The file {word} holds no prompt; write one a line.")
    return found


class Console:
    """Says what is measured, and now and then how far it is."""

    def __init__(self, every: float = 5.0):
        self.every, self.parts, self.last, self.start = every, 0, 0.0, 0.0

    def part(self, text: str) -> None:
        """A part begins."""
        self.parts += 1
        self.start = self.last = time.monotonic()
        print(f"{self.parts}. {text}", flush=True)

    def progress(self, value, total, preview=None, node_id=None) -> None:
        """The host's hook; bars inside a part (of a quantization, say) are not marked."""
        now = time.monotonic()
        if node_id is None or now - self.last < self.every or not 0 < value < total:
            return
        self.last = now
        left = int((now - self.start) / value * (total - value))
        print(f"      {value} of {total}, about {left // 60}:{left % 60:02d} left", flush=True)
