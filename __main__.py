"""Command line of the pack: ``python -m quanttune COMMAND``; needs ComfyUI on the Python path."""

from __future__ import annotations

import argparse
import shlex
import sys


def _add_report(commands) -> None:
    """The options of ``report``; what is left away has a default for the kind of model."""
    report = commands.add_parser(
        "report", help="measure a float model in every precision; writes HTML and Markdown",
        description="Benchmark, layer sensitivity, a searched plan, the Pareto front and a check "
                    "of a float model, in one report. See docs/measure.md.")
    which = report.add_mutually_exclusive_group(required=True)
    which.add_argument("--starter", action="store_true", help="the starter model")
    which.add_argument("--checkpoint", metavar="FILE",
                       help="a checkpoint with model, text encoder and VAE")
    report.add_argument("--out", metavar="FOLDER", required=True, help="folder for the report")
    report.add_argument("--quick", action="store_true",
                        help="fewer runs: rough numbers, much sooner")
    report.add_argument("--prompts", nargs="+", metavar="TEXT",
                        help="prompts, or .txt files with one a line")
    report.add_argument("--latent", type=int, metavar="SIDE",
                        help="side of the latents, in latent pixels: 64 for 512 px")
    report.add_argument("--bits", type=int, nargs="+", choices=(8, 4, 3, 2),
                        help="widths to measure (8 4 2)")
    report.add_argument("--unit", choices=("layer", "group"),
                        help="quantize one layer at a time, or all of a kind (layer)")
    for name, told in (("forwards", "steps every error is measured on (8)"),
                       ("samples", "pictures that these are taken from (4)"),
                       ("timestep-buckets", "intervals of the heat maps (4)"),
                       ("pictures", "compared by SSIM with each candidate (0)"),
                       ("runs", "timed steps of each model (10)"),
                       ("steps", "of a picture (20)"), ("seed", "of all noise (0)")):
        report.add_argument(f"--{name}", type=int, help=told)
    report.add_argument("--cfg", type=float, help="guidance (5)")
    report.add_argument("--sampler", help="as in the KSampler (dpmpp_2m)")
    report.add_argument("--scheduler", help="as in the KSampler (karras)")
    report.add_argument("--title", help="what to call the model")
    report.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _add_convert(commands) -> None:
    """The options of ``convert``, which all kinds of sources share."""
    convert = commands.add_parser(
        "convert", help="write a model of another program as a file of ours, or the reverse",
        description="Reads a checkpoint of Q-Diffusion, a tuneqdm_state.pt, or a float UNet "
                    "(diffusers folder or single file), and writes a quantized UNet for 'Load "
                    "Quantized UNet'. A quantized UNet of ours becomes a tuneqdm_state.pt. See "
                    "docs/interop.md.")
    convert.add_argument("source", metavar="SOURCE", help="the file or folder to read")
    convert.add_argument("out", metavar="OUT",
                         help="the .safetensors file to write; .pt for a TuneQDM state")
    convert.add_argument("--bits", type=int, choices=(8, 4, 3, 2),
                         help="of a float UNet (4); where those of a Q-Diffusion checkpoint are "
                              "taken for others")
    convert.add_argument("--range", choices=("mse", "minmax"),
                         help="of a float UNet: how ranges are found (mse)")
    convert.add_argument("--symmetric", action="store_true", help="of a float UNet: no zero point")
    convert.add_argument("--keep", metavar="LAYERS",
                         help="of a float UNet: layers to keep in float, as in Quantize UNet "
                              "(none)")
    convert.add_argument("--no-split-shortcuts", dest="split_shortcuts", action="store_false",
                         help="of a float UNet: one range for both halves of a shortcut")
    convert.add_argument("--scales", metavar="FILE",
                         help="of a TuneQDM state: the scale file to write beside OUT, or, for one "
                              "that is written, to put into it")
    convert.add_argument("--base", metavar="SOURCE",
                         help="of a TuneQDM state: the float UNet that was trained")
    convert.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m quanttune", description=__doc__.split(":")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("train-scales", "TuneQDM scales"), ("train-lora", "a LoRA")):
        train = commands.add_parser(name, help=f"train {what} as CONFIG.toml says")
        train.add_argument("config", help="see docs/training.md")
    _add_report(commands)
    _add_convert(commands)
    options = parser.parse_args(argv)
    from .quant import QuantTuneError

    try:
        if options.command == "report":
            from .host.report_command import report

            words = sys.argv[1:] if argv is None else argv
            return report(options, f"python -m quanttune {shlex.join(words)}")
        if options.command == "convert":
            from .host.convert_command import convert

            return convert(options)
        if options.command == "train-lora":
            from .host.lora_command import train_lora

            return train_lora(options.config)
        from .host.command import train_scales

        return train_scales(options.config)
    except QuantTuneError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("comfy", "folder_paths"):
            raise
        print("Error: ComfyUI is not on the Python path; run this with `python dev.py python -m "
              "quanttune ...`, or set PYTHONPATH to ComfyUI's folder.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
