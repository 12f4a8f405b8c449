"""``python -m quanttune convert``: models of other programs as files of our own, and back.

One row of `KINDS` for each kind of source: how to know it, and a function that writes the result
and says what it wrote.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

from ..quant import QuantTuneError, is_qdiffusion, load_qdiffusion, save_quantized_unet
from ..quant.safe_file import own_format, read_header
from ..quant.unet_metadata import UNET_FORMAT
from .command import start_host
from .convert_target import check_target

OPTIONS = {"bits": ("--bits", None), "range": ("--range", None),
           "symmetric": ("--symmetric", False), "keep": ("--keep", None),
           "split_shortcuts": ("--no-split-shortcuts", True), "scales": ("--scales", None),
           "base": ("--base", None)}
"""Options that not all kinds use: by name, how it is written, and its value if it is not."""


@dataclass(frozen=True)
class Kind:
    """A kind of source.

    Attributes:
        name: in messages.
        detect: whether the file or folder at a path is of this kind; never raises.
        convert: ``(path, options) -> str``: writes ``options.out`` and says what it wrote. The
            options are those of the command line.
        uses: which of `OPTIONS` it looks at; others are refused.
    """

    name: str
    detect: Callable[[str], bool]
    convert: Callable[[str, Namespace], str]
    uses: frozenset[str] = frozenset()


def convert(options: Namespace) -> int:
    """Convert as the options of the command line say; returns the exit status.

    Raises:
        QuantTuneError: no such source, one of no known kind or damaged, or a target that is there
            already or cannot be written.
    """
    source, out = options.source, options.out
    if not os.path.exists(source):
        raise QuantTuneError(f"The source {source!r} does not exist; give the path of a file.")
    if not os.path.isfile(source) and not os.path.isdir(source):  # a pipe would be waited for
        raise QuantTuneError(f"The source {source!r} is neither a file nor a folder; choose "
                             "another.")
    if os.path.exists(out):
        if os.path.samefile(source, out):
            raise QuantTuneError(f"Source and target are both {out!r}; give the target another "
                                 "name.")
        if not options.overwrite:
            raise QuantTuneError(f"The file {out!r} exists already; choose another name or add "
                                 "--overwrite.")
    start_host("cpu")
    kind = next((kind for kind in KINDS if kind.detect(source)), None)
    if kind is None:
        # A file that only looks like one of ours: its own reader says what is wrong with it.
        if os.path.isfile(source) and source.lower().endswith((".pth", ".pt", ".ckpt")):
            load_qdiffusion(source, options.bits)
        raise QuantTuneError(f"The source {source!r} is none that can be converted "
                             f"({', '.join(kind.name for kind in KINDS)}); choose another.")
    idle = [flag for name, (flag, unset) in OPTIONS.items()
            if name not in kind.uses and getattr(options, name) != unset]
    if idle:
        raise QuantTuneError(f"{idle[0]} does nothing for {kind.name}, which {source!r} is; leave "
                             "it away.")
    print(kind.convert(source, options))
    return 0


def convert_qdiffusion(path: str, options: Namespace) -> str:
    """Write a Q-Diffusion checkpoint as a quantized UNet, layer by layer.

    No more of it is in memory at once than a layer.
    """
    from .convert_inputs import check_apart
    from .import_qdiffusion import WHAT, check_complete, describe_qdiffusion, doubts

    check_target(options.out)
    check_apart(options.out, [path])
    state = load_qdiffusion(path, options.bits)
    metadata = describe_qdiffusion(state, path)
    if metadata.family not in WHAT:
        check_complete(state, metadata, os.path.basename(path))
    save_quantized_unet(options.out, state.layers, state.floats, metadata, options.overwrite)
    split = sum(layer.split is not None for layer in state.layers.values())
    lines = [f"Q-Diffusion, {state.bits} bits: {len(state.layers)} layers, {split} of them split.",
             f"Wrote {options.out} ({os.path.getsize(options.out) / 2**20:.1f} MiB, from "
             f"{os.path.getsize(path) / 2**20:.1f} MiB)."]
    if metadata.family in WHAT:
        lines.append(f"It holds {WHAT[metadata.family]}, which ComfyUI has no model for: for use "
                     "in Python (quanttune.quant.load_quantized_unet).")
    else:
        lines.append(f"Family {metadata.family}; 'Load Quantized UNet' reads it from "
                     "models/quanttune.")
    lines += [f"Careful: {line}" for line in doubts(state, path)]
    return "\n".join(lines)


def is_ours(path: str) -> bool:
    """Whether a file is one of *Save Quantized UNet*."""
    try:
        return own_format(read_header(path)[0]) == UNET_FORMAT
    except QuantTuneError:
        return False


def export_ours(path: str, options: Namespace) -> str:
    """Write a quantized UNet of ours, and ``options.scales``, as TuneQDM's authors do."""
    from .tuneqdm import export_tuneqdm

    return export_tuneqdm(path, options.out, options.scales, options.overwrite)


def _tuneqdm(path: str) -> bool:
    from .convert_tuneqdm import detect

    return detect(path)


def _convert_tuneqdm(path: str, options: Namespace) -> str:
    from .convert_tuneqdm import convert as convert_one

    return convert_one(path, options)


def _unet(path: str) -> bool:
    from .convert_unet import detect

    return detect(path)


def _convert_unet(path: str, options: Namespace) -> str:
    from .convert_unet import convert as convert_one

    return convert_one(path, options)


KINDS: tuple[Kind, ...] = (
    Kind("a checkpoint of Q-Diffusion", is_qdiffusion, convert_qdiffusion, frozenset({"bits"})),
    Kind("a quantized UNet of this pack", is_ours, export_ours, frozenset({"scales"})),
    Kind("a tuneqdm_state.pt", _tuneqdm, _convert_tuneqdm, frozenset({"scales", "base"})),
    Kind("a float UNet as a folder of diffusers or one file", _unet, _convert_unet,
         frozenset({"bits", "range", "symmetric", "keep", "split_shortcuts"})),
)
"""In this order: the first that knows a source converts it."""
