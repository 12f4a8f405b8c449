"""Train the starter model from nothing: `python starter/train.py STAGE [options]`.

Stages: data, vae, text, unet, decoder, classifier, export; `all` runs them in this order. Each is
seeded, keeps its state in the work folder and goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

if __package__ in (None, ""):
    import runpy

    runpy.run_module("quanttune.starter.train", run_name="__main__", alter_sys=True)
    raise SystemExit

STAGES = ("data", "vae", "text", "unet", "decoder", "classifier", "export")
MINUTES = {"vae": 15.0, "text": 2.0, "unet": 150.0, "decoder": 15.0, "classifier": 5.0}
"""Default budgets on two CPU cores."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--minutes", type=float, help="time budget of the stage")
    parser.add_argument("--work", type=Path, default=Path(__file__).resolve().parent / "work")
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="one-threaded processes on a CPU")
    parser.add_argument(
        "--start",
        choices=["random", "shipped"],
        default="random",
        help="what unet and vae start from when the work folder has no state of theirs yet",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the stages asked for."""
    args = arguments(argv)
    import torch

    torch.set_num_threads(1)
    from .common import Run, prepare_host

    prepare_host(args.device)
    for stage in STAGES if args.stage == "all" else [args.stage]:
        minutes = args.minutes or MINUTES.get(stage, 0)
        run = Run(args.work, stage, minutes, args.device)
        from . import stage_data

        data = stage_data.pictures(args.work, args.pictures)
        if stage == "vae":
            from . import stage_vae

            start = stage_vae.finished(args.work) if args.start == "shipped" else None
            model = stage_vae.train(run, data, args.workers, start)
            stage_vae.latents(args.work, data, model, run.device, args.workers)
        elif stage == "text":
            from . import stage_text

            stage_text.train(run, args.workers)
        elif stage == "unet":
            from . import stage_unet, stage_vae

            model = stage_vae.finished(args.work).to(run.device)
            stage_vae.latents(args.work, data, model, run.device, args.workers)
            stage_unet.train(run, args.pictures, args.workers, args.start == "shipped")
        elif stage == "decoder":
            from . import stage_vae

            stage_vae.train(run, data, args.workers, stage_vae.finished(args.work), True)
        elif stage == "classifier":
            from . import stage_classifier

            stage_classifier.train(run, args.workers)
        elif stage == "export":
            from . import stage_export

            stage_export.export(args.work)


if __name__ == "__main__":
    main()
