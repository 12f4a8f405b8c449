"""A quantized UNet file written layer by layer: no more than one layer is ever in memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import BinaryIO

import torch
from torch import Tensor

from .checkpoint import SUFFIXES
from .errors import QuantTuneError
from .fingerprint import add_layer
from .packing import packed_shape
from .paging import let_go
from .safe_file import METADATA_KEY
from .unet_metadata import UNetMetadata, complete_metadata, layer_facts
from .weight import QuantizedWeight
from .whole_file import stored_header, stored_order, stored_places, tensor_bytes, written_whole

UNKNOWN = "0" * 64
"""Takes the place of the fingerprint until all layers are written."""


@dataclass(frozen=True)
class LayerPlan:
    """What a layer's quantized weight will look like.

    Attributes:
        shape: logical, ``(out, in / groups, *kernel)``.
        bits: 2, 3, 4 or 8.
        symmetric, split: as in `QuantizedWeight`.
    """

    shape: tuple[int, ...]
    bits: int
    symmetric: bool = False
    split: int | None = None


def stream_quantized_unet(
    path: str | os.PathLike[str],
    layers: Mapping[str, LayerPlan],
    floats: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    layer: Callable[[str], QuantizedWeight],
    value: Callable[[str], Tensor],
    metadata: UNetMetadata,
    overwrite: bool = True,
) -> UNetMetadata:
    """Write a quantized UNet whose tensors are made one after the other.

    The file is the same, byte for byte, as that of `checkpoint.save_quantized_unet` with all of
    them at once. It appears under its name when it is whole.

    Args:
        path: target file.
        layers: layer name to `LayerPlan`.
        floats: name to shape and dtype of every other tensor.
        layer: makes the quantized weight of a layer; called once a layer, in the order of names.
        value: gives one of ``floats``; called once each, in the order of names, after all layers.
        metadata: as for `checkpoint.save_quantized_unet`.
        overwrite: False refuses to replace an existing file.

    Returns:
        The metadata as written.

    Raises:
        QuantTuneError: as `checkpoint.save_quantized_unet`, and when ``layer`` or ``value`` gives
            something else than was announced.
    """
    path = os.fspath(path)
    if not layers:
        raise QuantTuneError(f"There are no layers to quantize for {path}; keep fewer in float.")
    if not overwrite and os.path.exists(path):
        raise QuantTuneError(
            f"The file {path} exists already; choose another name or allow overwriting."
        )
    announced = _announced(layers, floats)
    facts = {n: layer_facts(p.shape, p.bits, p.symmetric, p.split) for n, p in layers.items()}
    names = stored_order(announced)
    metadata, described = complete_metadata(metadata, facts, floats, UNKNOWN)

    def header(fingerprint: str) -> bytes:
        text = json.dumps({**described, "fingerprint": fingerprint}, allow_nan=False)
        return stored_header(names, announced, {METADATA_KEY: text})

    first = header(UNKNOWN)
    places = {n: len(first) + at for n, at in stored_places(names, announced).items()}
    digest = hashlib.sha256()
    size = len(first) + sum(t.numel() * t.element_size() for t in announced.values())
    with written_whole(path, size) as file:
        file.write(first)
        for name in sorted(layers):
            made = layer(name)
            add_layer(digest, name, made)
            for suffix, tensor in zip(SUFFIXES, (made.packed, made.scale, made.zero_point)):
                _put(file, f"{name}.{suffix}", tensor, announced, places)
            let_go(made.nbytes)
        for name in sorted(floats):
            _put(file, name, value(name), announced, places)
        mark = digest.hexdigest()
        file.seek(0)
        file.write(header(mark))
    return replace(metadata, fingerprint=mark)


def _announced(layers: Mapping[str, LayerPlan], floats) -> dict[str, Tensor]:
    """Every tensor of the file, without its data."""
    tensors = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, (shape, dtype) in floats.items()
    }
    for name, plan in layers.items():
        columns = math.prod(plan.shape[1:])
        parts = 1 if plan.split is None else 2
        scale = torch.empty((plan.shape[0], parts), dtype=torch.float32, device="meta")
        packed = torch.empty(
            packed_shape(plan.shape[0], columns, plan.bits), dtype=torch.uint8, device="meta"
        )
        for suffix, tensor in zip(SUFFIXES, (packed, scale, scale)):
            key = f"{name}.{suffix}"
            if key in tensors:
                raise QuantTuneError(
                    f"The tensor {key} is both quantized and float; leave one of them out."
                )
            tensors[key] = tensor
    return tensors


def _put(file: BinaryIO, name: str, tensor: Tensor, announced, places) -> None:
    tensor = tensor.detach().cpu().contiguous()
    wanted = announced[name]
    if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
        raise QuantTuneError(
            f"The tensor {name} came out as {list(tensor.shape)} {tensor.dtype} where "
            f"{list(wanted.shape)} {wanted.dtype} was announced; this is a fault of the program, "
            "please report it."
        )
    file.seek(places[name])
    file.write(tensor_bytes(tensor))
