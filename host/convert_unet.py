"""From a float UNet of any form to a quantized file, one layer in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..quant import QuantSpec, QuantTuneError
from ..quant.safe_file import own_format, read_header
from ..quant.stream_checkpoint import stream_quantized_unet
from ..quant.tensor_file import PICKLED, SAFETENSORS, load_unpickled
from .convert_inputs import check_apart
from .convert_target import check_target
from .diffusers_files import is_index
from .load_unet import plan_quantization
from .unet_names import find_unet
from .unet_source import open_unet


def detect(path: str | os.PathLike[str]) -> bool:
    """Whether this converter is the one for a source: a diffusers folder, or a file with a UNet.

    A file that is damaged, or a folder that is not whole, is its own too, so that `convert` says
    what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        return any((path / name).exists() for name in ("model_index.json", "config.json", "unet"))
    if is_index(path):
        return True
    try:
        if path.suffix.lower() in SAFETENSORS:
            strings, shapes = read_header(path)
            return own_format(strings) is None and find_unet(shapes) is not None
        if path.suffix.lower() in PICKLED:
            found = load_unpickled(path)
            found = found.get("state_dict", found) if isinstance(found, dict) else {}
            return isinstance(found, dict) and find_unet(map(str, found)) is not None
    except QuantTuneError:
        return path.suffix.lower() in (*SAFETENSORS, *PICKLED)
    return False


def convert(path: str | os.PathLike[str], options) -> str:
    """Convert one source as the command line says; returns what to tell the user.

    Args:
        path: the source, see `detect`.
        options: with ``out``, the file to write, and, if they are there, ``bits`` (4), ``range``
            ("mse"), ``symmetric``, ``keep`` ("none"), ``split_shortcuts`` and ``overwrite`` (True).

    Raises:
        QuantTuneError: a source that is not whole or another model, or a file that exists or
            cannot be written.
    """
    def option(name, default):
        value = getattr(options, name, None)
        return default if value is None else value

    spec = QuantSpec(option("bits", 4), option("symmetric", False), option("range", "mse"))
    return convert_unet(path, options.out, spec, option("keep", "none"),
                        option("split_shortcuts", True), option("overwrite", True))


def convert_unet(path: str | os.PathLike[str], out: str | os.PathLike[str], spec: QuantSpec,
                 keep: str = "none", split_shortcuts: bool = True, overwrite: bool = True,
                 progress: Callable[[int, int], None] = lambda done, total: None) -> str:
    """Quantize a UNet from its folder or file into a file for *Load Quantized UNet*.

    What is in memory is never more than one layer, in float and quantized, beside the programs
    themselves: the file is written while the source is read.

    Args:
        path: as for `unet_source.open_unet`.
        out: the safetensors file to write.
        spec, keep, split_shortcuts: as in `quantize.quantize_model`.
        overwrite: False refuses to replace a file.
        progress: called with the number of layers done and of all.

    Returns:
        What was done, in words.

    Raises:
        QuantTuneError: as `convert`.
    """
    out = os.fspath(out)
    check_target(out)
    check_apart(out, [path])
    plan = plan_quantization(open_unet(path), spec, keep, split_shortcuts)
    done = 0

    def layer(name):
        nonlocal done
        made = plan.layer(name)
        done += 1
        progress(done, len(plan.layers))
        return made

    metadata = stream_quantized_unet(out, plan.layers, plan.floats, layer, plan.source.read,
                                     plan.metadata, overwrite)
    return (f"Saved {out} ({os.path.getsize(out) / 2**20:.1f} MiB): {metadata.family}, "
            f"{len(plan.layers)} layers in {spec.bits} bits, {len(plan.floats)} tensors in float.")
