"""A UNet of any file or folder people have, in the host's names, one tensor at a time.

Diffusers' folders and files, checkpoints in the original names with or without a prefix, shards,
.safetensors and PyTorch's own form, and fp32, fp16, bf16 and fp8 weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.supported_models
import torch
from torch import Tensor

from ..quant import QuantTuneError, UNetMetadata
from ..quant.limits import is_finite
from ..quant.safe_file import own_format
from ..quant.tensor_file import TensorFile, open_tensors
from .diffusers_config import UNET_FIXED, Settings
from .diffusers_files import ModelFolder, fault, incomplete, is_index, shards
from .fp8 import Fp8, take_scales
from .lora_keys import brief
from .stock_int8 import PREDICTION_MARKS
from .unet_names import DIFFUSERS, detect, find_unet, host_names

UNET_CLASS = "UNet2DConditionModel"
SCHEDULER = "scheduler/scheduler_config.json"
STATE, SCB = ".weight.quant_state.bitsandbytes__", ".SCB"
"""In the names of what bitsandbytes keeps beside a weight of 4 bits, and of int8."""
AGAIN = "download it again or choose another file"
CANNOT = "which ComfyUI's UNet cannot be; load the model with diffusers, or choose another one"
SD_SCHEDULE = {"linear_start": 0.00085, "linear_end": 0.012}
"""Of Stable Diffusion, and what the host assumes where nothing is said."""
V_SIGN = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
"""By whose values the host tells an SD2 that predicts v from one that predicts the noise."""
OTHER_PIPELINES = ("FlowMatch", "VQ", "Karras", "Score", "IPNDM", "RePaint", "UnCLIP")
"""How the classes of schedulers begin whose noise is none of Stable Diffusion's."""


@dataclass
class UNetSource:
    """A UNet that has been looked at and not been read yet.

    Attributes:
        where: what to call it in messages, "The UNet in …".
        name: what to call it in files made from it.
        metadata: what a quantized file says of it; layers and floats are empty.
        shapes: name in the host to shape, in the file's order.
    """

    where: str
    name: str
    metadata: UNetMetadata
    shapes: dict[str, tuple[int, ...]]
    _places: dict[str, tuple[TensorFile, str]] = field(default_factory=dict, repr=False)
    _scales: dict[str, Fp8] = field(default_factory=dict, repr=False)

    def dtype(self, name: str) -> torch.dtype:
        """What `read` gives: the stored type; for fp8 float16, or float32 where it has scales."""
        file, key = self._places[name]
        stored = file.dtypes[key]
        if name in self._scales:
            return torch.float32
        if stored.itemsize == 1:
            return torch.float16  # exact for both kinds of fp8
        return torch.float32 if stored == torch.float64 else stored

    def read(self, name: str, mapped: bool = False) -> Tensor:
        """One tensor in float.

        Args:
            name: in the host.
            mapped: it may be a view of the mapped file, which takes no memory but is slower to
                let go of.

        Raises:
            QuantTuneError: NaN or infinite values, or a file that cannot be read any more.
        """
        file, key = self._places[name]
        value = file.view(key) if mapped else file.read(key)
        if name in self._scales:
            value = self._scales[name].to_float(value)
        value = value.to(self.dtype(name))
        if not is_finite(value):
            raise QuantTuneError(
                f"{self.where} has NaN or infinite values in '{brief(key)}'; {AGAIN}.")
        return value


def open_unet(path: Path | str, name: str | None = None) -> UNetSource:
    """Look at a UNet: the folder of a diffusers pipeline or of its UNet, or a file.

    Args:
        path: folder, model file, or the index of shards (``….index.json``, ``….index.fp16.json``).
        name: what to call it in files made from it; by default the file's or folder's name.

    Raises:
        QuantTuneError: nothing there, a folder or file that is not whole, another kind of model,
            or a UNet that the host cannot build.
    """
    path = Path(path)
    name = name or path.name
    if os.path.isdir(path):  # False, too, of a name that no file can have
        return _of_folder(path, name)
    where = f"The UNet in {path}"
    if is_index(path):
        files, trouble = shards(path)
        if trouble := trouble or incomplete(path, files):
            raise QuantTuneError(f"The shards of {path} are not whole: {trouble}; {AGAIN}.")
    else:
        if what := fault(path):
            raise QuantTuneError(f"The file {path} {what}; {AGAIN}.")
        files = [path]
    config = settings_beside(path.parent)
    pipeline = path.parent.parent if path.parent.name == "unet" else None
    return _of_files(files, name, where, config, path.parent, pipeline)


def _of_folder(path: Path, name: str) -> UNetSource:
    if is_unet(path):
        folder, part, pipeline = ModelFolder(path, "UNet folder"), "", path.parent
        pipeline = pipeline if path.name == "unet" else None
    else:
        folder, part, pipeline = ModelFolder(path, "diffusers folder"), "unet", path
    prefix = f"{part}/" if part else ""
    config = folder.json(f"{prefix}config.json")
    if config.get("_class_name", UNET_CLASS) != UNET_CLASS:
        raise QuantTuneError(
            f"The folder {path} holds a {brief(config['_class_name'], 60)} where a {UNET_CLASS} is "
            "needed; choose the folder of an SD1.x, SD2.x or SDXL model.")
    files = folder.weight_files(part)
    return _of_files(files, name, f"The UNet in {path / part}", config, path / part, pipeline)


def settings_beside(folder: Path) -> dict | None:
    """The settings of the UNet in a folder; None where there are none, or those of another model.

    Raises:
        QuantTuneError: a ``config.json`` that cannot be read, so that nobody knows.
    """
    if not (folder / "config.json").exists():
        return None
    config = ModelFolder(folder).json("config.json")
    return config if config.get("_class_name") == UNET_CLASS else None


def is_unet(folder: Path) -> bool:
    """Whether a folder is diffusers' of a UNet alone."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        return config.get("_class_name") == UNET_CLASS
    except (OSError, ValueError, RecursionError, AttributeError):
        return False


def _of_files(paths: list[Path], name: str, where: str, config: dict | None, folder: Path,
              pipeline: Path | None) -> UNetSource:
    files = [open_tensors(path) for path in paths]
    for file in files:
        if own_format(file.strings) is not None:
            raise QuantTuneError(f"The file {file.path} was written by QuantTune; load it with "
                                 "'Load Quantized UNet' or 'Load TuneQDM Scales'.")
    places = {key: (file, key) for file in files for key in file.shapes}
    twice = next((k for file in files for k in file.shapes if places[k][0] is not file), None)
    if twice is not None:
        raise QuantTuneError(f"{where} has '{brief(twice)}' in two of its files; {AGAIN}.")
    if any(key.endswith(".weight_int") for key in places):
        raise QuantTuneError(f"{where} holds the integers of TuneQDM; choose the file "
                             "tuneqdm_state.pt that lies beside it.")
    if any(STATE in key or key.endswith(SCB) for key in places):
        raise QuantTuneError(f"{where} holds layers of bitsandbytes; load it with 'Load Quantized "
                             "UNet', or choose an fp32, fp16, bf16 or fp8 file of the model.")
    found = find_unet(places)
    if found is None:
        raise QuantTuneError(f"{where.replace('The UNet in', 'The file')} holds no Stable "
                             "Diffusion UNet; choose the folder or file of an SD1.x, SD2.x or "
                             "SDXL model.")
    prefix, kind = found
    marks = {m: places[p + m] for m in PREDICTION_MARKS for p in ("", prefix) if p + m in places}
    own = {k.removeprefix(prefix): v for k, v in places.items() if k.startswith(prefix)}
    own = {k: v for k, v in own.items() if k not in PREDICTION_MARKS}
    if prefix == "":  # a file whose UNet has no prefix may hold other models that have one
        own = {k: v for k, v in own.items() if not k.startswith(("first_stage_model.",
                                                                 "cond_stage_model."))}
    scales = take_scales(own, files, prefix, where)
    if kind == DIFFUSERS:
        names = host_names(own)
        scales = {names.get(k, k): v for k, v in scales.items()}
        own = _renamed(own, names, where)
    for file, stored in own.values():
        if not file.dtypes[stored].is_floating_point:
            raise QuantTuneError(
                f"{where} holds '{brief(stored)}' as {file.dtypes[stored]}, so it is quantized "
                "already by another program; choose an fp32, fp16, bf16 or fp8 file of the model.")
    shapes = {key: file.shapes[stored] for key, (file, stored) in own.items()}
    family, unet_config = detect(shapes, where, config)
    source = UNetSource(where, name, UNetMetadata(""), shapes, own, scales)
    told = {mark: file.read(key) for mark, (file, key) in marks.items()}
    if V_SIGN in shapes and issubclass(family, comfy.supported_models.SD20):
        told[V_SIGN] = source.read(V_SIGN)
    source.metadata = unet_metadata(shapes, family, unet_config, told, config, folder, pipeline)
    return source


def _renamed(own: dict, names: Mapping[str, str], where: str) -> dict:
    if unknown := sorted(own.keys() - names.keys()):
        raise QuantTuneError(
            f"{where} holds a tensor '{brief(unknown[0])}' ({len(unknown)} such) that no UNet of "
            "ComfyUI has; choose the folder or file of an SD1.x, SD2.x or SDXL model.")
    return {names[key]: value for key, value in own.items()}


def unet_metadata(shapes: Mapping[str, tuple[int, ...]], family: type, unet_config: dict,
                  told: dict[str, Tensor], config: dict | None = None, folder: Path = Path(),
                  pipeline: Path | None = None) -> UNetMetadata:
    """What a file says of a UNet so that the host can build it.

    Args:
        shapes: by name in the host.
        family, unet_config: of `unet_names.detect`.
        told: marks and tensors that tell what it predicts, by name.
        config: of diffusers, from ``folder``.
        pipeline: the folder whose scheduler says what the UNet predicts, if there is one.

    Raises:
        QuantTuneError: settings that the host cannot follow.
    """
    host = family(unet_config)
    prediction = host.model_type(told, "").name  # may also set the two below
    latents, sampling = type(host.latent_format).__name__, dict(host.sampling_settings)
    described = {k: v for k, v in host.unet_config.items() if not isinstance(v, torch.dtype)}
    if config is not None:
        described |= _told(Settings(config, f"The file {folder / 'config.json'}", CANNOT),
                           shapes)
    if pipeline is not None and (pipeline / SCHEDULER).exists():
        settings = Settings(ModelFolder(pipeline, "diffusers folder").json(SCHEDULER),
                            f"The file {pipeline / SCHEDULER}", CANNOT)
        prediction, sampling, latents = _schedule(settings, family, latents)
    return UNetMetadata(family=family.__name__, unet_config=described, model_type=prediction,
                        latent_format=latents, sampling_settings=sampling)


def _told(settings: Settings, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """What a UNet's ``config.json`` says beside the shapes."""
    settings.expect(UNET_FIXED)
    widths = settings.numbers("block_out_channels", None)
    first = shapes["input_blocks.0.0.weight"]
    if widths[0] != first[0] or settings.values.get("in_channels", first[1]) != first[1]:
        raise QuantTuneError(f"{settings.where} is not of the weights beside it, whose first "
                             f"convolution is {list(first)}; {AGAIN}.")
    kind = settings.values.get("class_embed_type")
    if kind not in (None, "projection") or settings.values.get("addition_embed_type") not in (
            None, "text_time"):
        raise settings.wrong("class_embed_type", kind)
    cross = settings.values.get("only_cross_attention") or False
    told = settings.heads(widths)
    if cross is not False:
        cross = [cross] * len(widths) if isinstance(cross, bool) else cross
        if not isinstance(cross, list) or len(cross) != len(widths) or not all(
                isinstance(only, bool) for only in cross):
            raise settings.wrong("only_cross_attention", cross)
        told["disable_self_attentions"] = cross
    return told


def _schedule(settings: Settings, family: type, latents: str) -> tuple[str, dict, str]:
    """Prediction type, settings of the noise and latent format that a scheduler's file says."""
    kind = str(settings.values.get("_class_name", ""))
    if kind.startswith(OTHER_PIPELINES):
        raise settings.wrong("_class_name", kind)
    if kind.startswith("EDM"):  # Playground v2.5, whose latents have a scale of their own
        sampling = {"sigma_data": 0.5, "sigma_max": 80.0, "sigma_min": 0.002}
        playground = comfy.latent_formats.SDXL_Playground_2_5.__name__
        return "EDM", sampling, playground if family.__name__ == "SDXL" else latents
    prediction, sampling = settings.schedule()
    extra = {k: v for k, v in sampling.items() if SD_SCHEDULE.get(k) != v}
    return prediction, extra, latents
