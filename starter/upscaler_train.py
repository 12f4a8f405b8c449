"""Train the small upscaler from nothing: `python starter/upscaler_train.py STAGE [options]`.

Stages: pictures, vae, unet, export; `all` runs them in this order. Each is seeded, keeps its state
in the work folder and goes on where it stopped. Needs the starter's own files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

if __package__ in (None, ""):
    import runpy

    runpy.run_module("quanttune.starter.upscaler_train", run_name="__main__", alter_sys=True)
    raise SystemExit

STAGES = ("pictures", "vae", "unet", "export")
MINUTES = {"vae": 20.0, "unet": 25.0}
"""Default budgets with two workers."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    from .upscaler_config import FILE

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--minutes", type=float, help="time budget of the stage")
    parser.add_argument("--work", type=Path, default=Path(__file__).resolve().parent / "work")
    parser.add_argument("--pictures", type=int, default=1000, help="scenes to learn from")
    parser.add_argument("--busy", type=int, default=150, help="pictures of many objects")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="one-threaded processes on a CPU")
    parser.add_argument("--out", type=Path, default=FILE, help="where export writes the file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the stages asked for."""
    args = arguments(argv)
    import torch

    torch.set_num_threads(1)
    from .common import Run, prepare_host

    prepare_host(args.device)
    from . import upscaler_export, upscaler_unet, upscaler_vae
    from .upscaler_data import pictures

    data = pictures(args.work, args.pictures, args.busy)

    def run_of(stage):
        return Run(args.work, f"upscaler-{stage}", args.minutes or MINUTES[stage], args.device)

    for stage in STAGES if args.stage == "all" else [args.stage]:
        if stage == "vae":
            upscaler_vae.train(run_of(stage), data, args.workers)
        elif stage == "unet":
            vae = upscaler_vae.finished(args.work).to(args.device)
            encoded = upscaler_vae.latents(args.work, data, vae)
            upscaler_unet.train(run_of(stage), data, encoded["latents"], args.workers)
        elif stage == "export":
            upscaler_export.export(args.work, data, args.out)


if __name__ == "__main__":
    main()
