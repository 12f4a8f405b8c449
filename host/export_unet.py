"""A MODEL of any kind as an ordinary float UNet, for other programs or for the host's own nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import comfy.model_management
import torch
from comfy.utils import ProgressBar
from torch import Tensor

from ..quant import QuantizedCheckpoint, QuantTuneError
from ..quant.limits import is_finite
from ..quant.safe_file import FLOAT_UNET
from ..quant.whole_file import PART_SECONDS, unwritten, write_safetensors, written_whole
from .around import is_layer
from .build import adopt, build_model
from .describe import describe
from .diffusers_unet import diffusers_config, diffusers_names
from .float_weights import float_weights, scales_of
from .folders import output_path
from .int8 import OPTION as INT8
from .quantize import own_attributes
from .routing import OPTION as ROUTER
from .save import STOCK_PREFIX, mark_prediction

COMFYUI, DIFFUSERS, NOTHING = "ComfyUI file", "diffusers folder", "no file"
FORMATS = (COMFYUI, DIFFUSERS, NOTHING)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
INSTEAD = "choose the diffusers folder, for a pipeline whose scheduler says it, or no file"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def export_unet(patcher, form: str = COMFYUI, dtype: str = "float16",
                prefix: str = "diffusion_models/merged", interval: int = 0):
    """Write a MODEL's UNet as floats, its LoRAs and scales in the weights.

    Args:
        patcher: any MODEL, as in `float_weights.float_weights`, which is left as it is.
        form: of `FORMATS`. The ComfyUI file has the names of original checkpoints (LDM, sgm); the
            diffusers folder one folder ``unet`` that ``UNet2DConditionModel`` loads.
        dtype: a key of `DTYPES`.
        prefix: of the name in the output folder; a number is added.
        interval: as in `float_weights`.

    Returns:
        ``(MODEL, path, summary)``: the float MODEL with layers of the host's own, which its nodes
        save and merge; the path is empty with "no file".

    Raises:
        QuantTuneError: an unknown choice, values too large for the dtype, a UNet that diffusers
            has no names for, and what `float_weights` raises.
    """
    for value, known, what in ((form, FORMATS, "format"), (dtype, DTYPES, "dtype")):
        if value not in known:
            raise QuantTuneError(f"{what} is '{value}', but it has to be one of "
                                 f"{', '.join(known)}.")
    model = patcher.model
    scales_of(patcher, interval)  # says what is wrong before anything is computed
    names = diffusers_names(model) if form == DIFFUSERS else {}
    config = diffusers_config(model) if form == DIFFUSERS else {}
    state, norm = _collected(patcher, DTYPES[dtype], interval)
    if missing := sorted(state.keys() - names.keys()) if names else []:
        raise QuantTuneError(f"diffusers has no name for '{missing[0]}' of this UNet "
                             f"({len(missing)} such); choose the ComfyUI format.")
    path = ""
    if form == COMFYUI:
        path = output_path(prefix, example="diffusion_models/merged")
        tensors = {STOCK_PREFIX + name: value for name, value in state.items()}
        mark_prediction(model, tensors, INSTEAD)
        write_safetensors(path, tensors, _facts(patcher, interval), strings={"format": "pt"})
    elif form == DIFFUSERS:
        path = output_path(prefix, "", example="merged")
        with written_folder(path) as folder:
            unet = folder / "unet"
            unet.mkdir()
            write_json(unet / "config.json", config)
            write_safetensors(unet / WEIGHTS, {names[n]: v for n, v in state.items()},
                              _facts(patcher, interval), strings={"format": "pt"})
    return (_float_model(patcher, state, DTYPES[dtype]), path,
            _summary(patcher, state, path, dtype, interval, norm))


def _collected(patcher, dtype: torch.dtype, interval: int) -> tuple[dict[str, Tensor], float]:
    """The weights in ``dtype``, and the relative error of rounding to it."""
    state, squared_error, squared_norm = {}, 0.0, 0.0
    progress = ProgressBar(sum(is_layer(m) for m in patcher.model.diffusion_model.modules()))
    with torch.inference_mode(False), torch.no_grad():
        for name, value in float_weights(patcher, interval):
            comfy.model_management.throw_exception_if_processing_interrupted()
            if not value.is_floating_point():
                state[name] = value
                continue
            rounded = value.to(dtype, copy=True)
            if not is_finite(rounded):
                if not is_finite(value):
                    raise QuantTuneError(
                        f"'{name}' holds NaN or infinite values in this MODEL; load or download "
                        "the model again, and look at what was merged into it.")
                raise QuantTuneError(
                    f"'{name}' holds values of up to {value.abs().max():.3g}, too large for "
                    f"{str(dtype).removeprefix('torch.')}; choose bfloat16 or float32.")
            if name.endswith(".weight") and value.dim() > 1:
                squared_error += float((rounded.float() - value).square().sum())
                squared_norm += float(value.square().sum())
                progress.update(1)
            state[name] = rounded
    return state, (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0


def _float_model(patcher, state: dict[str, Tensor], dtype: torch.dtype):
    """A clone of a MODEL over float weights in the host's own layers, without its changes."""
    bare = patcher.clone()
    bare.patches = {}
    options = bare.model_options["transformer_options"]
    for option in (ROUTER, INT8):
        options.pop(option, None)
    for wrappers in options.get("wrappers", {}).values():
        wrappers.pop(ROUTER, None)
    device = comfy.model_management.get_torch_device()
    supported = list(patcher.model.model_config.supported_inference_dtypes)
    cast = comfy.model_management.unet_manual_cast(dtype, device, supported)
    checkpoint = QuantizedCheckpoint(describe(patcher.model, "the merged model", {}), {}, state)
    attributes, _ = own_attributes(patcher)
    built = build_model(checkpoint, "the merged model", (dtype, cast), attributes,
                        not patcher.is_dynamic(), operations=None)
    return adopt(bare, built, not patcher.is_dynamic())


def _facts(patcher, interval: int) -> dict:
    return {"format": FLOAT_UNET, "interval": interval,
            "family": type(patcher.model.model_config).__name__,
            "prediction": patcher.model.model_type.name}


def _summary(patcher, state, path: str, dtype: str, interval: int, error: float) -> str:
    size = sum(t.nbytes for t in state.values())
    lines = [f"Saved {path}" if path else "No file was written",
             f"{len(state)} tensors in {dtype}, {size / 2**20:.1f} MiB (rounding to it changes the "
             f"weights by {error:.2g})"]
    if patcher.patches:
        lines.append(f"{len(patcher.patches)} patched tensors (LoRAs, merges) are in the weights")
    router = patcher.model_options["transformer_options"].get(ROUTER)
    if router is not None:
        counts = max(s.num_experts for s, _ in router.entries)
        which = f", interval {interval} of {counts}" if counts > 1 else ""
        lines.append(f"The scales are in the weights{which}")
    if patcher.model.model_type.name != "EPS":
        lines.append(f"The model predicts {patcher.model.model_type.name}: other programs need a "
                     "scheduler that is told so")
    return "\n".join(lines)


def write_json(path: Path, value: dict) -> None:
    """Write an object as JSON, completely or not at all."""
    with written_whole(path) as file:
        file.write((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


@contextmanager
def written_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill that gets the name ``path`` when the block ends without an error.

    What a process that was killed here has left of another one beside it is deleted after a day.

    Raises:
        QuantTuneError: it exists already, or cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    _remove_old_parts(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            raise FileExistsError(f"{path} exists already")
        os.rename(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise unwritten(path, error) from error
        if isinstance(error, QuantTuneError) and str(temporary) in str(error):
            # The user knows the folder by its own name; the other one is gone.
            raise QuantTuneError(str(error).replace(str(temporary), str(path))) from error
        raise


def _remove_old_parts(path: Path) -> None:
    """Delete what `written_folder` never finished of folders that are numbered as ``path`` is."""
    numbered = re.fullmatch(r"(.*)_\d{5,}_", path.name)
    if numbered is None:
        return
    part = re.compile(rf"{re.escape(numbered[1])}_\d{{5,}}_\.\d+\.tmp")
    with suppress(OSError):  # one that cannot be read or deleted stays
        for left in path.parent.iterdir():
            if part.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
                if time.time() - left.stat().st_mtime > PART_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
