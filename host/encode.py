"""Pictures and captions as the diffusion model's own input, computed once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch

from ..quant import QuantTuneError
from ..quant.limits import is_finite
from ..quant.safe_file import read_safetensors
from ..quant.whole_file import write_safetensors
from ..training.data import EmptyCaptions, TrainingImages, TrainingSet
from .patches import injections_digest

LATENT, CONDITIONS = "quanttune.latent", "quanttune.conditions"
"""What cache files of pictures and of captions say they are."""


def encode(images: TrainingImages, patcher, clip, vae, cache: Path | None = None) -> TrainingSet:
    """Latents and conditions of pictures, each computed once.

    Args:
        images: pictures and captions.
        patcher: the MODEL that will be trained.
        clip, vae: the host's.
        cache: folder of what was encoded before, or None.

    Raises:
        QuantTuneError: a picture that the VAE turns into something else than finite numbers.
    """
    with torch.inference_mode():
        identity = identity_of(patcher, vae)
        bar = comfy.utils.ProgressBar(len(images.images))
        latents = []
        for index, picture in enumerate(images.images):
            comfy.model_management.throw_exception_if_processing_interrupted()
            latents.append(_latent(picture, patcher, vae, identity, cache, index))
            bar.update(1)
        reader = None if cache is None else reader_of(patcher, clip)
        conditions = [_kept_conditions(patcher, clip, caption, latent, reader, cache)
                      for caption, latent in zip(images.captions, latents)]
    # Out of inference mode, since autograd will meet them.
    with torch.inference_mode(False):
        latents = tuple(t.clone() for t in latents)
        conditions = tuple({k: v.clone() for k, v in c.items()} for c in conditions)
    return TrainingSet(latents, conditions, images.prior, images.captions,
                       _fingerprint(latents, conditions, images.prior))


def encode_empty(patcher, clip, data: TrainingSet) -> EmptyCaptions:
    """Conditions of an empty caption for each shape of latents, for caption dropout.

    Some families are told the size of the picture beside the caption (SDXL).
    """
    found = {}
    with torch.inference_mode():
        [embedding, extra], *_ = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        for latent in data.latents:
            if latent.shape not in found:
                found[latent.shape] = _conditions(patcher, embedding, extra, latent)
    with torch.inference_mode(False):
        return {shape: {k: v.clone() for k, v in row.items()} for shape, row in found.items()}


def conditions_of(patcher, clip, caption: str, latent: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the diffusion model is given for a caption, by argument name, as when sampling."""
    [embedding, extra], *_ = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
    return _conditions(patcher, embedding, extra, latent)


def _kept_conditions(patcher, clip, caption: str, latent: torch.Tensor, reader: str | None,
                     cache: Path | None) -> dict[str, torch.Tensor]:
    """`conditions_of`, from the disk if this text encoder has read the caption before."""
    if reader is None:
        return conditions_of(patcher, clip, caption, latent)
    # The tokens rather than the words: an embedding that a word names is part of them.
    key = repr((reader, clip.tokenize(caption), tuple(latent.shape)))
    path = Path(cache) / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.safetensors"
    found = _read(path, CONDITIONS)
    if found is None:
        found = conditions_of(patcher, clip, caption, latent)
        _keep(path, found, CONDITIONS)
    return found


def reader_of(patcher, clip) -> str:
    """A key for what turns captions into conditions: the text encoder as set up, the family."""
    patches = clip.patcher.patches_uuid if clip.patcher.patches else ""
    setup = (type(patcher.model).__name__, type(clip.tokenizer).__name__, str(patches),
             clip.layer_idx, clip.tokenizer_options, injections_digest(clip.patcher))
    return repr(setup) + _weights_key(clip.cond_stage_model)


def _conditions(patcher, embedding, extra, latent) -> dict[str, torch.Tensor]:
    found = {name: value.detach().float().cpu()
             for name, value in model_arguments(patcher, embedding, extra, latent).items()}
    if not all(map(is_finite, found.values())):
        raise QuantTuneError("The conditioning holds NaN or infinite values; check the text "
                             "encoder and what makes the conditioning.")
    return found


def model_arguments(patcher, embedding, extra, latent) -> dict[str, torch.Tensor]:
    """What the host gives the diffusion model for one caption, by argument name.

    Args:
        patcher: the MODEL.
        embedding, extra: as a conditioning holds them; differentiable if they are.
        latent: ``[C, H, W]`` that it is for.
    """
    device = patcher.load_device
    scale = 8
    arguments = {**extra, "cross_attn": embedding, "device": device, "noise": latent[None],
                 "width": latent.shape[-1] * scale, "height": latent.shape[-2] * scale,
                 "prompt_type": "positive"}
    found = {}
    for name, cond in patcher.model.extra_conds(**arguments).items():
        value = getattr(cond, "cond", None)
        if isinstance(value, torch.Tensor):
            found[name] = value[:1]
    return found


def from_latents(latents: Mapping, conditioning: Sequence, patcher) -> TrainingSet:
    """Examples from the host's LATENT and CONDITIONING, a row of captions for each sample.

    Raises QuantTuneError when their numbers differ (one conditioning serves for all).
    """
    samples = latents["samples"]
    if samples.dim() != 4:
        raise QuantTuneError(f"The latents have shape {list(samples.shape)}; only pictures, of "
                             "four dimensions, can be trained on.")
    if len(conditioning) == 1:
        conditioning = list(conditioning) * len(samples)
    if len(conditioning) != len(samples):
        raise QuantTuneError(f"There are {len(samples)} latents and {len(conditioning)} "
                             "conditionings; connect one for each, or a single one for all.")
    if not is_finite(samples):
        raise QuantTuneError("The connected latents hold NaN or infinite values; check what makes "
                             "them.")
    channels = patcher.get_model_object("latent_format").latent_channels
    if samples.shape[1] != channels:
        raise QuantTuneError(f"The latents have {samples.shape[1]} channels, but this model's have "
                             f"{channels}; connect latents that were made for it.")
    with torch.inference_mode(False):
        rows = tuple(patcher.model.process_latent_in(s[None].float().clone())[0] for s in samples)
        conditions = tuple(
            {k: v.clone() for k, v in _conditions(patcher, c[0], c[1], row).items()}
            for c, row in zip(conditioning, rows))
    prior = (False,) * len(rows)
    return TrainingSet(rows, conditions, prior, ("",) * len(rows),
                       _fingerprint(rows, conditions, prior))


def _latent(picture, patcher, vae, identity: str, cache: Path | None, index: int) -> torch.Tensor:
    key = hashlib.sha256(identity.encode())
    key.update(repr(tuple(picture.shape)).encode() + picture.contiguous().numpy().tobytes())
    path = None if cache is None else Path(cache) / f"{key.hexdigest()[:40]}.safetensors"
    found = None if path is None else _read(path, LATENT)
    if found is not None and "latent" in found and found["latent"].dim() == 3:
        return found["latent"]
    latent = patcher.model.process_latent_in(vae.encode(picture[None]))[0].float().cpu()
    if not is_finite(latent):
        raise QuantTuneError(f"The VAE makes NaN of image {index + 1}; use another VAE, or start "
                             "ComfyUI with --fp32-vae.")
    if path is not None:
        _keep(path, {"latent": latent}, LATENT)
    return latent


def _read(path: Path, kind: str) -> dict[str, torch.Tensor] | None:
    """Tensors of a cache file; None, and no file any more, if it is not what `_keep` writes."""
    if not path.exists():
        return None
    try:
        told, tensors = read_safetensors(path)
        if told == {"format": kind} and tensors and all(
                t.dtype == torch.float32 and is_finite(t) for t in tensors.values()):
            return {name: t.clone() for name, t in tensors.items()}
    except QuantTuneError:
        pass
    path.unlink(missing_ok=True)
    return None


def _keep(path: Path, tensors: Mapping[str, torch.Tensor], kind: str) -> None:
    try:
        write_safetensors(path, tensors, {"format": kind})
    except QuantTuneError:
        pass  # without a cache it is computed again next time


def identity_of(patcher, vae) -> str:
    """A key for the VAE and the latent format: a few of its weights and their names."""
    return type(patcher.model.latent_format).__name__ + _weights_key(vae.first_stage_model)


def _weights_key(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _fingerprint(latents, conditions, prior) -> str:
    digest = hashlib.sha256(repr(prior).encode())
    for latent, row in zip(latents, conditions):
        digest.update(repr(tuple(latent.shape)).encode() + latent.contiguous().numpy().tobytes())
        for name in sorted(row):
            digest.update(name.encode() + row[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
