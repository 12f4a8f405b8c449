"""The state of TuneQDM's authors as a quantized UNet and a scale set of the host's, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import comfy.utils
import torch

from ..quant import (
    QuantizedCheckpoint,
    QuantTuneError,
    ScaleSet,
    UNetMetadata,
    fingerprint,
    load_quantized_unet,
    load_scale_set,
)
from ..quant.limits import is_finite
from ..quant.tensor_file import PICKLED, open_tensors
from ..quant.tuneqdm_convert import find_base, from_state, to_state
from ..quant.tuneqdm_state import TuneqdmState, is_state, load_unpickled, read_state
from ..quant.whole_file import written_whole
from .convert_inputs import check_apart
from .convert_target import STATE, check_target
from .describe import model_config
from .diffusers_files import ModelFolder
from .float_model import check_fits
from .lora_keys import brief
from .unet_names import LDM, detect, find_unet, host_names
from .unet_source import UNetSource, is_unet, open_unet, unet_metadata

UNET = "unet"
"""Key of a state's note of ours: the metadata of the UNet."""
NOTED = ("family", "unet_config", "model_type", "latent_format", "sampling_settings")


def is_tuneqdm(path: str | os.PathLike[str]) -> bool:
    """Whether a file is the state of a TuneQDM training; a damaged one is not."""
    if Path(path).suffix.lower() not in PICKLED:
        return False
    try:
        return is_state(load_unpickled(path, plain=False))
    except QuantTuneError:
        return False


def read_tuneqdm(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
                 ) -> tuple[QuantizedCheckpoint, ScaleSet, list[str]]:
    """A state as a quantized UNet and the scales for it.

    Args:
        path: of the state.
        base: a folder or file with what the state lacks, the weights of the norms. By default the
            folder of the pipeline that the training saved beside it. When it is the float model
            that the training began with, its own quantization scales are found again: every
            subject trained on it then shares one base.

    Returns:
        The UNet, the scales, and what to tell the user.

    Raises:
        QuantTuneError: as `quant.tuneqdm_state.read_state`, or no base.
    """
    path = Path(path)
    state = read_state(path)
    names = _names(state, path)
    given = None if base is None else _base(Path(base))
    state, lines = _with_float_base(state, names, given, path)
    layers, scales = from_state(state, _layer_names(state, names), path.name)
    shapes = {names[name]: shape for name, shape in state.shapes.items()}
    floats = {names[name]: value for name, value in state.floats.items()}
    metadata = _metadata(state, shapes, floats, path, given)
    skeleton = _skeleton(metadata, shapes, path.name)
    missing = sorted(skeleton.state_dict().keys() - floats.keys()
                     - {f"{name}.weight" for name in layers})
    if missing:
        floats |= _norms(missing, {ours: name for name, ours in names.items()}, path, given)
    found = {f"{name}.weight": tuple(layer.shape) for name, layer in layers.items()}
    found |= {name: tuple(value.shape) for name, value in floats.items()}
    check_fits(skeleton, found, f"The TuneQDM state {path}")
    metadata = replace(metadata, provenance={
        "source": path.name, "bits": state.width, "symmetric": all(
            w.symmetric for w in layers.values()), "tuneqdm": scales.metadata.extra["tuneqdm"]})
    return QuantizedCheckpoint(metadata, layers, floats), scales, lines


def read_scales(path: str | os.PathLike[str]) -> ScaleSet:
    """A scale set, from a file of ours or from the state of a TuneQDM training.

    Raises:
        QuantTuneError: as `quant.load_scale_set` and `quant.tuneqdm_state.read_state`.
    """
    if Path(path).suffix.lower() not in PICKLED:
        return load_scale_set(path)
    state = read_state(path)
    names = _layer_names(state, _names(state, Path(path)))
    return from_state(state, names, Path(path).name)[1]


def export_tuneqdm(unet: str | os.PathLike[str] | QuantizedCheckpoint,
                   out: str | os.PathLike[str],
                   scales: str | os.PathLike[str] | ScaleSet | None = None,
                   overwrite: bool = True) -> str:
    """Write a quantized UNet and its scales as a state that the authors' code loads.

    Args:
        unet: a file of *Save Quantized UNet*, or what is in it.
        out: the file to write, ``….pt``.
        scales: a scale set, its file, or None for the base alone.
        overwrite: False refuses to replace a file.

    Returns:
        What was done, in words.

    Raises:
        QuantTuneError: layers that their form cannot hold, another model family, or a file that
            exists or cannot be written.
    """
    out = Path(out)
    check_target(out, STATE, "target, a state of TuneQDM,")
    check_apart(out, [given for given in (unet, scales) if isinstance(given, (str, os.PathLike))])
    if not overwrite and out.exists():
        raise QuantTuneError(f"The file {out} exists already; choose another name or allow "
                             "overwriting.")
    if not isinstance(unet, QuantizedCheckpoint):
        unet = load_quantized_unet(unet)
    if scales is not None and not isinstance(scales, ScaleSet):
        scales = read_scales(scales)
    names = _diffusers_names(unet)
    note = {UNET: {key: value for key, value in asdict(unet.metadata).items() if key in NOTED}}
    state = to_state(unet.layers, unet.floats, scales, names, note)
    with written_whole(out) as file:
        torch.save(state, file)
    lines = [f"Saved {out} ({out.stat().st_size / 2**20:.1f} MiB): {len(unet.layers)} layers, "
             f"{scales.num_experts if scales else 1} experts."]
    if scales and scales.metadata.base_fingerprint not in ("", _fingerprint(unet)):
        lines.append("The scales were trained on another base, so the result may look different.")
    return "\n".join(lines)


def _fingerprint(unet: QuantizedCheckpoint) -> str:
    return unet.metadata.fingerprint or fingerprint(unet.layers)


def _names(state: TuneqdmState, path: Path) -> dict[str, str]:
    """Name in diffusers to name in the host of every tensor that the state tells of."""
    own = {**dict.fromkeys(f"{name}.weight" for name in state.layers), **state.shapes}
    names = host_names(own)
    unknown = sorted(own.keys() - names.keys())
    if unknown or not find_unet(own):
        what = f"has a tensor '{brief(unknown[0])}'" if unknown else "lacks layers"
        raise QuantTuneError(f"The TuneQDM state {path} {what} and is of no UNet that ComfyUI has; "
                             "choose the state of an SD1.x, SD2.x or SDXL model.")
    return {name: names[name] for name in own}


def _layer_names(state: TuneqdmState, names: Mapping[str, str]) -> dict[str, str]:
    return {name: names[f"{name}.weight"].removesuffix(".weight") for name in state.layers}


def _base(path: Path) -> UNetSource | Path:
    """A base that was given: a float model, or a pipeline that the authors' training saved."""
    if os.path.isdir(path):
        part = "" if is_unet(path) else "unet"
        files = ModelFolder(path, "base folder").weight_files(part)
        if any(name.endswith(".weight_int") for name in open_tensors(files[0]).shapes):
            return path
    return open_unet(path)


def _with_float_base(state: TuneqdmState, names: Mapping[str, str],
                     given: UNetSource | Path | None, path: Path
                     ) -> tuple[TuneqdmState, list[str]]:
    """The state with the scales of its float base, where one was given."""
    if not isinstance(given, UNetSource):
        return state, []
    layers, found = {}, 0
    symmetric = state.config.get("symmetric") is True
    for name, layer in state.layers.items():
        ours = names[f"{name}.weight"]
        shape = given.shapes.get(ours)
        if shape is None or shape[0] != layer.s_out.shape[1] or (
                layer.integers is not None and shape != tuple(layer.integers.shape)):
            raise QuantTuneError(f"{given.where} is not the base of {path}: its layer '{ours}' is "
                                 f"{list(shape or ())}; give the model that was trained on.")
        known = layer if layer.s0 is not None else find_base(layer, given.read(ours), symmetric,
                                                             state.width)
        found += known.s0 is not None
        layers[name] = known
    rest = "." if found == len(layers) else "; the others take the mean of their experts."
    line = f"{found} of {len(layers)} layers were quantized from {given.name}{rest}"
    return replace(state, layers=layers), [line]


def _metadata(state: TuneqdmState, shapes: Mapping[str, tuple[int, ...]],
              floats: Mapping[str, torch.Tensor], path: Path,
              given: UNetSource | Path | None) -> UNetMetadata:
    """What the UNet is: as our note says, or its base, or the folder that the state lies in."""
    noted = state.ours.get(UNET)
    kinds = dict(zip(NOTED, (str, dict, str, str, dict)))
    if isinstance(noted, dict) and all(isinstance(noted.get(k), kind) for k, kind in kinds.items()):
        return UNetMetadata(**{key: noted[key] for key in NOTED})
    if isinstance(given, UNetSource):
        return given.metadata
    pipeline = given or path.parent
    unet = pipeline / "unet"
    if is_unet(pipeline):
        pipeline, unet = pipeline.parent, pipeline
    config = ModelFolder(unet).json("config.json") if is_unet(unet) else None
    family, unet_config = detect(shapes, f"The UNet in {path}", config)
    return unet_metadata(shapes, family, unet_config, dict(floats), config, unet, pipeline)


def _skeleton(metadata: UNetMetadata, shapes: Mapping, name: str) -> torch.nn.Module:
    """The host's UNet, on the meta device."""
    config = model_config(QuantizedCheckpoint(metadata, {}, dict.fromkeys(shapes)), name)
    config.set_inference_dtype(torch.float32, None)
    try:
        return config.get_model({}, "", device="meta").diffusion_model
    except Exception as error:  # the host's classes meet what may be a hostile description
        raise QuantTuneError(f"The TuneQDM state '{name}' describes a network that ComfyUI cannot "
                             f"build ({brief(error)}); save it again.") from error


def _norms(missing: list[str], theirs: Mapping[str, str], path: Path,
           given: UNetSource | Path | None) -> dict[str, torch.Tensor]:
    """The tensors that the state lacks, from its base."""
    if isinstance(given, UNetSource):
        lacking = [name for name in missing if name not in given.shapes]
        if not lacking:
            return {name: given.read(name) for name in missing}
        raise QuantTuneError(f"{given.where} lacks '{lacking[0]}' as the state {path} does; give "
                             "the model that was trained on.")
    folder = given or path.parent
    part = "" if is_unet(folder) else "unet"
    if not is_unet(folder / part):
        raise QuantTuneError(
            f"The TuneQDM state {path} holds no '{missing[0]}' ({len(missing)} such), as no state "
            "does, and there is no 'unet' folder beside it; put it into the folder of the pipeline "
            "that its training saved, or give that folder or the model it was trained on as base.")
    files = [open_tensors(p) for p in
             ModelFolder(folder, "pipeline folder").weight_files(part)]
    places = {key: file for file in files for key in file.shapes}
    found = {}
    for name in missing:
        key = theirs.get(name, name)
        if key not in places:
            raise QuantTuneError(f"The folder {folder / part} lacks '{brief(key)}', which the "
                                 f"TuneQDM state {path} does not hold either; give the model that "
                                 "was trained on as base.")
        value = places[key].read(key)
        if not value.is_floating_point() or not is_finite(value):
            raise QuantTuneError(f"The folder {folder / part} has NaN or infinite values in "
                                 f"'{brief(key)}'; save or download it again.")
        found[name] = value
    return found


def _diffusers_names(unet: QuantizedCheckpoint) -> dict[str, str]:
    """Name in the host to name in diffusers, of all tensors of a UNet."""
    own = {f"{name}.weight" for name in unet.layers} | unet.floats.keys()
    if (find_unet(own) or ("", ""))[1] != LDM:
        raise QuantTuneError(f"A {unet.metadata.family} model has no state of TuneQDM; only UNets "
                             "of SD1.x, SD2.x and SDXL can be exported.")
    # As text: the host's function takes lists apart, and what is here may come from a file.
    config = json.loads(json.dumps(dict(unet.metadata.unet_config)))
    try:
        names = comfy.utils.unet_to_diffusers(config)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise QuantTuneError(f"The configuration of this {unet.metadata.family} model is damaged "
                             f"({brief(error)}); quantize and save it again.") from error
    found: dict[str, str] = {}
    embedding = "class_embedding" if "Unclip" in unet.metadata.family else "add_embedding"
    for theirs, ours in names.items():
        if not ours.startswith("label_emb") or theirs.startswith(embedding):
            found[ours] = theirs
    return found
