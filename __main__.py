"""Command line of the pack: ``python -m quanttune COMMAND``; needs ComfyUI on the Python path."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m quanttune", description=__doc__.split(":")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train-scales", help="train TuneQDM scales as CONFIG.toml says")
    train.add_argument("config", help="see docs/training.md")
    options = parser.parse_args(argv)
    from .quant import QuantTuneError

    try:
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
