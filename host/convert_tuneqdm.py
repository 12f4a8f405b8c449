"""A TuneQDM state of the authors to files of ours, as the command line asks for it."""

from __future__ import annotations

import os
from pathlib import Path

from ..quant import QuantTuneError, save_quantized_unet, save_scale_set
from .convert_inputs import check_apart
from .convert_target import check_target
from .tuneqdm import is_tuneqdm, read_tuneqdm


def detect(path: str | os.PathLike[str]) -> bool:
    """Whether a source is a ``tuneqdm_state.pt``."""
    return Path(path).is_file() and is_tuneqdm(path)


def convert(path: str | os.PathLike[str], options) -> str:
    """Convert one state; returns what to tell the user.

    Args:
        path: of the state.
        options: with ``out``, the UNet's file to write, and, if they are there, ``scales`` (its
            scale set's file; by default beside it, "…-scales.safetensors"), ``base`` (see
            `tuneqdm.read_tuneqdm`) and ``overwrite`` (True).

    Raises:
        QuantTuneError: as `tuneqdm.read_tuneqdm`, or a file that exists or cannot be written.
    """
    out = Path(options.out)
    check_target(out)
    told = getattr(options, "scales", None)
    scales_out = Path(told) if told else out.with_name(f"{out.stem}-scales{out.suffix}")
    overwrite = getattr(options, "overwrite", None) is not False
    read = path, getattr(options, "base", None)
    check_apart(out, read)
    _check_scales_target(scales_out, out, read, overwrite)
    checkpoint, scales, lines = read_tuneqdm(path, getattr(options, "base", None))
    save_quantized_unet(out, checkpoint.layers, checkpoint.floats, checkpoint.metadata, overwrite)
    save_scale_set(scales_out, scales, overwrite)
    widths = {layer.bits for layer in checkpoint.layers.values()}
    bits = " and ".join(map(str, sorted(widths)))
    return "\n".join([
        f"Saved {out} ({out.stat().st_size / 2**20:.1f} MiB): {checkpoint.metadata.family}, "
        f"{len(checkpoint.layers)} layers in {bits} bits.",
        f"Saved {scales_out} ({scales_out.stat().st_size / 2**20:.2f} MiB): "
        f"{scales.num_experts} experts.", *lines])


def _check_scales_target(target: Path, unet: Path, read, overwrite: bool) -> None:
    """Refuse a place for the scales before anything is read: nothing is lost, or half done."""
    check_target(target, what="target of the scales")
    if os.path.realpath(unet) == os.path.realpath(target):
        raise QuantTuneError(f"The scales cannot be written to {target}, which is the target of "
                             "the UNet; choose another name.")
    check_apart(target, read)
    if os.path.exists(target) and not overwrite:
        raise QuantTuneError(f"The file {target} exists already; choose another name or add "
                             "--overwrite.")
