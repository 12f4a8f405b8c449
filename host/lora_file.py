"""LoRA files: written for ComfyUI and kohya's tools, read from whoever wrote them."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ..quant import QuantTuneError
from ..quant.limits import is_finite
from ..quant.safe_file import read_with_strings
from ..quant.whole_file import write_safetensors
from ..training.lora_layer import LoraLayer
from .around import weight_shapes
from .folders import output_path
from .lora_fit import check_tensors, fit_lora
from .lora_keys import ALPHA, DOWN, KOHYA, MAGNITUDE, UP, brief, by_layer, file_names
from .lora_metadata import describe, on_saving
from .lora_peft import CONFIG_FILE, CONFIG_KEY, WRAPPER

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class LoraWeights(dict):
    """The host's LORA_MODEL: names as stock files have them, and tensors.

    Attributes:
        metadata: names and texts of a file's header.
        name: what to call it in messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor] = (),
                 metadata: Mapping[str, str] | None = None, name: str = "the LoRA"):
        super().__init__(tensors)
        self.metadata, self.name = dict(metadata or {}), name


def export_lora(layers: Mapping[str, LoraLayer], model, clip=None,
                metadata: Mapping[str, object] | None = None) -> LoraWeights:
    """A trained LoRA under the names of stock files.

    Args:
        layers: by the names of the host's state dicts without ``.weight``:
            ``diffusion_model.input_blocks.1.1.proj_in``, and of text encoders
            ``clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj``.
        model: MODEL it was trained on; any with the same layers does.
        clip: CLIP, if layers of text encoders are among them.
        metadata: facts for the file's header, see `lora_metadata.describe`.

    Raises:
        QuantTuneError: no layers, or one that the host would not find.
    """
    if not layers:
        raise QuantTuneError("The LoRA has no layers; choose layers to train.")
    names = file_names(layers, model, clip)
    tensors = {}
    for layer, lora in layers.items():
        values = {DOWN: lora.down, UP: lora.up, ALPHA: torch.tensor(lora.alpha),
                  MAGNITUDE: lora.dora_scale}
        tensors |= {f"{names[layer]}.{KOHYA[role]}": value for role, value in values.items()
                    if value is not None}
    return LoraWeights(tensors, describe(layers, model, metadata))


def import_lora(lora: Mapping[str, Tensor], model, clip=None,
                name: str = "", notes: bool = True, train: bool = True
                ) -> dict[str, LoraLayer]:
    """The layers of a LoRA by the host's names, to train on or to look at.

    Reads plain LoRA and DoRA under every name that ComfyUI knows, and those of peft's and
    diffusers' savers. What else is in the file (changes of norms and biases, layers this model
    has not) is left out with a warning in the log. A layer whose parts have a LoRA each (queries,
    keys and values in one weight) gets one of the sum of their ranks.

    Args:
        lora: a `LoraWeights` or the host's own LORA_MODEL.
        model: MODEL.
        clip: CLIP or None; without one layers of text encoders are left out.
        name: for messages; by default the LoRA's own.
        notes: whether the log says that layers of text encoders are left out.
        train: whether it is to be trained on, and more rank than a layer has is refused.

    Raises:
        QuantTuneError: as `lora_fit.fit_lora`; and adapters that are no LoRA, or more rank than
            the layer has.
    """
    name = name or getattr(lora, "name", "the LoRA")
    fit = fit_lora(lora, model, clip, name)
    shapes = _shapes(model, clip)
    pieces = defaultdict(list)
    for target, patch in fit.patches.items():
        key = target if isinstance(target, str) else target[0]
        if isinstance(patch, LoRAAdapter):
            pieces[key].append((target, patch))
        elif not isinstance(patch, tuple):
            raise QuantTuneError(
                f"'{name}' holds a {patch.name} adapter for the layer "
                f"'{key.removesuffix('.weight')}', which cannot be trained further; use it with "
                "'Load LoRA', or choose a plain LoRA.")
    layers = {}
    with torch.inference_mode(False), torch.no_grad():
        for key, parts in pieces.items():
            layer = key.removesuffix(".weight")
            try:
                layers[layer] = _joined([_plain(*part, shapes[key]) for part in parts])
                if train:
                    layers[layer].check_rank()
            except QuantTuneError as error:
                raise QuantTuneError(f"'{name}', layer '{layer}': {error}") from error
    if not layers:
        raise QuantTuneError(f"'{name}' holds no plain LoRA that could be trained further; use it "
                             "with 'Load LoRA'.")
    for note in (fit if notes else replace(fit, encoders=0)).notes():
        logging.warning(note)
    if others := len(fit.patches) - sum(map(len, pieces.values())):
        logging.warning("'%s' also changes %d norms and biases, which are left out.", name, others)
    return layers


def _shapes(model, clip) -> dict[str, tuple[int, ...]]:
    states = [weight_shapes(p) for p in (model, clip and clip.patcher) if p is not None]
    return {key: shape for state in states for key, shape in state.items()}


def _plain(target, patch: LoRAAdapter, shape: tuple[int, ...]) -> LoraLayer:
    """An adapter of the host for a whole weight, wherever it acts."""
    up, down, alpha, mid, dora_scale, reshape = patch.weights
    if reshape is not None:
        raise QuantTuneError("It changes the shape of the layer, which cannot be trained further; "
                             "use it with 'Load LoRA'.")
    up, down = up.float().flatten(1).cpu(), down.float().cpu()
    rank = down.shape[0]
    if mid is not None:
        # LyCORIS' Tucker form: what lies between is part of the way down.
        down = torch.einsum("mn...,ni->mi...", mid.float().cpu(), down.flatten(1))
    down = down.reshape(rank, *shape[1:])
    part, function = (None, None) if isinstance(target, str) else (
        target[1], target[2] if len(target) > 2 else None)
    if part is not None:
        whole = up.new_zeros(shape[0], rank)
        whole.narrow(*part).copy_(up)
        up = whole
    if function is not None:
        up = function(up)
    if dora_scale is not None and not isinstance(target, str):
        raise QuantTuneError("It is a DoRA of a part of the layer, which cannot be trained "
                             "further; use it with 'Load LoRA'.")
    ones = [1] * (len(shape) - 2)
    if dora_scale is not None:
        sides = (shape[0], 1) if dora_scale.shape[0] == shape[0] else (1, shape[1])
        dora_scale = dora_scale.float().reshape(*sides, *ones).clone()
    return LoraLayer(down.clone(), up.reshape(shape[0], rank, *ones).clone(),
                     rank if alpha is None else alpha, dora_scale)


def _joined(parts: list[LoraLayer]) -> LoraLayer:
    """The sum of LoRAs of one layer as one, whose alpha is its rank."""
    if len(parts) == 1:
        return parts[0]
    down = torch.cat([p.down for p in parts])
    up = torch.cat([p.up * (p.alpha / p.rank) for p in parts], dim=1)
    return LoraLayer(down, up, down.shape[0])


def read_lora(path: str | os.PathLike[str]) -> LoraWeights:
    """Map a LoRA file, whoever wrote it; its tensors are views of the mapped file.

    Of a file from peft's saver, ``adapter_config.json`` beside it is read too.

    Raises:
        QuantTuneError: missing, empty, truncated, damaged or pickled files, and NaN in them.
    """
    path = Path(path)
    metadata, tensors = read_with_strings(path)
    config = path.with_name(CONFIG_FILE)
    if CONFIG_KEY not in metadata and any(k.startswith(WRAPPER) for k in tensors) and (
            config.is_file()):
        try:
            metadata[CONFIG_KEY] = config.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise QuantTuneError(f"The file {config} cannot be read ({brief(error)}); remove it, "
                                 "or save the LoRA again.") from error
    lora = LoraWeights(tensors, metadata, path.name)
    check_tensors(lora, path.name)
    return lora


def save_lora(path: str | os.PathLike[str], lora: Mapping[str, Tensor],
              dtype: torch.dtype | None = None) -> Path:
    """Write a LoRA, completely or not at all.

    Args:
        path: of the file.
        lora: a `LoraWeights`, or the host's own LORA_MODEL, which has no metadata.
        dtype: of the matrices, or None to leave them as they are. Alphas keep theirs.

    Returns:
        The path.

    Raises:
        QuantTuneError: no LoRA, NaN, values too large for ``dtype``, or a file that cannot be
            written.
    """
    path = Path(path)
    check_tensors(lora, getattr(lora, "name", "the LoRA"))
    tensors = {key: as_dtype(value, dtype, key) for key, value in lora.items()}
    texts, own = on_saving(getattr(lora, "metadata", {}), tensors, path)
    write_safetensors(path, tensors, own, strings=texts)
    return path


def save_to_output(lora: Mapping[str, Tensor], prefix: str, dtype: str) -> tuple[str, str]:
    """Write a LoRA into the output folder under a new numbered name.

    Args:
        lora, dtype: as `save_lora`, the latter a key of `DTYPES`.
        prefix: of the name; files under ``loras/`` appear in ComfyUI's *Load LoRA*.

    Returns:
        ``(path, summary)``.
    """
    if dtype not in DTYPES:
        raise QuantTuneError(f"dtype is '{dtype}', but it has to be one of {', '.join(DTYPES)}.")
    path = save_lora(output_path(prefix, example="loras/my_subject"), lora, DTYPES[dtype])
    layers = sum(len({DOWN, UP} & roles.keys()) == 2 for roles in by_layer(lora).values())
    return str(path), (f"Saved {path} ({os.path.getsize(path) / 2**20:.2f} MiB), {layers} layers "
                       f"in {dtype}")


def as_dtype(tensor: Tensor, dtype: torch.dtype | None, key: str) -> Tensor:
    """A tensor on the CPU in ``dtype``; single numbers and integers stay as they are.

    Raises:
        QuantTuneError: values too large for it; ``key`` names them.
    """
    tensor = tensor.detach().cpu()
    if dtype is None or not tensor.is_floating_point() or tensor.numel() == 1:
        return tensor
    converted = tensor.to(dtype)
    if not is_finite(converted):
        raise QuantTuneError(f"'{brief(key)}' holds values of up to {tensor.abs().max():.3g}, too "
                             "large for float16; save it as bfloat16 or float32.")
    return converted
