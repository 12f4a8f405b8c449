"""The starter model as the host's own MODEL, CLIP and VAE. The only library file here that needs
the host."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.clip_model
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch

from ..host.compat import set_inference_dtype
from ..host.float_model import check_fits, check_numbers
from ..quant.errors import QuantTuneError
from ..quant.limits import is_finite
from ..quant.paging import give_back_after
from ..quant.safe_file import read_with_strings
from .config import CLIP, TOKENS, VOCABULARY_SIZE

FOLDER = Path(__file__).resolve().parent
UNUSED = ("logit_scale", "text_projection.weight", "text_projection")
"""Parts of a text encoder that compare texts with pictures, which nothing here does."""


def load_starter(
    embedding_directory=None, model_options: dict | None = None, folder: Path | str | None = None
):
    """Load the three parts of the starter model.

    embedding_directory: the host's folders of textual-inversion embeddings, or None.
    model_options: as for the host's loaders; `dtype` and `custom_operations` act on the UNet.
    folder: another place to read the three files from (the recipe's tests use it).

    Returns (ModelPatcher of an SD15 `BaseModel`, `comfy.sd.CLIP`, `comfy.sd.VAE`). Call it inside
    `torch.inference_mode()` as the host's executor does. Raises QuantTuneError when a file is
    missing or damaged.
    """
    folder = Path(folder or FOLDER)
    with whole("unet.safetensors"):
        model = load_unet(str(folder / "unet.safetensors"), model_options or {})
    with whole("clip.safetensors"):
        clip = load_clip(str(folder / "clip.safetensors"), embedding_directory)
    with whole("vae.safetensors"):
        return model, clip, load_vae(str(folder / "vae.safetensors"))


@contextmanager
def whole(name: str) -> Iterator[None]:
    """Tell of a file whose tensors are not those of its network, whatever the host makes of it."""
    try:
        yield
    except (QuantTuneError, MemoryError):
        raise
    except Exception as error:
        raise QuantTuneError(
            f"The starter model's file {name} describes another network than it holds; install "
            "the pack again, or restore the file from its repository."
        ) from error


def read(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of one of the starter's files, checked."""
    try:
        metadata, state = read_with_strings(path)
    except QuantTuneError as error:
        raise QuantTuneError(
            f"The starter model's file {Path(path).name} is missing or damaged; "
            "install the pack again, or restore the file from its repository."
        ) from error
    if not all(map(is_finite, state.values())):
        raise QuantTuneError(
            f"The starter model's file {Path(path).name} has NaN or infinite values; "
            "install the pack again, or restore the file from its repository."
        )
    return state, metadata


def check_names(path: str, names: Iterable[str], module: torch.nn.Module, prefix: str = "") -> None:
    """Raise QuantTuneError when a file lacks tensors, which the host would leave unset.

    names: of the file's tensors; prefix: what stands before them in the module.
    """
    wanted = {name for name in module.state_dict() if not name.endswith(UNUSED)}
    if missing := wanted - {prefix + name for name in names}:
        raise QuantTuneError(
            f"The starter model's file {Path(path).name} lacks {len(missing)} tensors, "
            f"{min(missing)} for one; install the pack again, or restore the file from its "
            "repository."
        )


def load_unet(path: str, model_options: dict, disable_dynamic: bool = False):
    """The diffusion model as a ModelPatcher; also the factory the host reloads it with."""
    state, metadata = read(path)
    if "unet_config" not in metadata:
        raise QuantTuneError(
            f"{Path(path).name} carries no `unet_config`, so it is not the starter model; "
            "restore the file from the pack's repository."
        )
    names = list(state)
    config = comfy.supported_models.SD15(json.loads(metadata["unet_config"]))
    patcher = patcher_of(config, state, model_options, disable_dynamic)
    check_names(path, names, patcher.model.diffusion_model)
    patcher.cached_patcher_init = (load_unet, (path, model_options))
    return patcher


def patcher_of(config, state: dict, model_options: dict, disable_dynamic: bool = False):
    """A ModelPatcher of a model configuration of the host and its diffusion model's tensors.

    model_options: as for the host's loaders; `dtype`, `custom_operations`, `load_device` and
    `offload_device` are used.
    """
    management = comfy.model_management
    load_device = model_options.get("load_device", management.get_torch_device())
    offload_device = model_options.get("offload_device", management.unet_offload_device())
    supported = list(config.supported_inference_dtypes)
    dtype = model_options.get("dtype") or management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state),
        supported_dtypes=supported,
        weight_dtype=comfy.utils.weight_dtype(state),
    )
    cast = management.unet_manual_cast(dtype, load_device, supported)
    set_inference_dtype(config, dtype, cast, load_device)
    config.custom_operations = model_options.get("custom_operations")
    patchers = comfy.model_patcher
    make = patchers.ModelPatcher if disable_dynamic else patchers.CoreModelPatcher
    model = config.get_model(state, "")
    give_back_after(model)
    patcher = make(model, load_device=load_device, offload_device=offload_device)
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(state, "", assign=patcher.is_dynamic())
    return patcher


def load_clip(path: str, embedding_directory=None, disable_dynamic: bool = False):
    """The text encoder as the host's CLIP with the ordinary tokenizer.

    The file holds the embedding rows of the words the model knows; every other token gets the
    shared unknown row. Prompts are tokenized into pieces of `config.TOKENS`.
    """
    state, _ = read(path)
    check_text(path, state)
    rows, ids = state.pop("token_rows"), state.pop("token_ids").long()
    table = rows[:1].expand(VOCABULARY_SIZE, -1).clone()
    table[ids] = rows[1:]
    state["text_model.embeddings.token_embedding.weight"] = table
    names = list(state)
    target = comfy.supported_models_base.ClipTarget(
        comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel
    )
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=embedding_directory,
        tokenizer_data={"clip_l_max_length": TOKENS},
        parameters=comfy.utils.calculate_parameters(state),
        state_dict=[state],
        model_options={"clip_l_model_config": CLIP},
        disable_dynamic=disable_dynamic,
    )
    check_names(path, names, clip.cond_stage_model, "clip_l.transformer.")
    clip.patcher.cached_patcher_init = (load_clip_patcher, (path, embedding_directory))
    return clip


def check_text(path: str, state: dict[str, torch.Tensor]) -> None:
    """Raise QuantTuneError unless these are the tensors of the starter's text encoder."""
    where = f"The starter model's text encoder {Path(path).name}"
    repair = "restore the file from the pack's repository."
    skeleton = comfy.clip_model.CLIPTextModel(CLIP, torch.float32, "meta", comfy.ops.manual_cast)
    table = "text_model.embeddings.token_embedding.weight"
    rows, ids = state.get("token_rows"), state.get("token_ids")
    if rows is None or ids is None:
        raise QuantTuneError(
            f"{where} has no 'token_rows' or 'token_ids', so it is another file; {repair}"
        )
    width = CLIP["hidden_size"]
    fit = ids.ndim == 1 and len(ids) and tuple(rows.shape) == (len(ids) + 1, width)
    if not fit or ids.is_floating_point() or not 0 <= ids.min() <= ids.max() < VOCABULARY_SIZE:
        raise QuantTuneError(
            f"{where} has token_rows of {list(rows.shape)} and token_ids of {list(ids.shape)} that "
            f"do not belong together; {repair}"
        )
    rest = {k: v for k, v in state.items() if k not in ("token_rows", "token_ids")}
    shapes = {k: v.shape for k, v in rest.items()}
    check_fits(skeleton, {**shapes, table: (VOCABULARY_SIZE, width)}, where)
    check_numbers({**rest, "token_rows": rows}, where, repair)


def load_clip_patcher(path: str, embedding_directory=None, disable_dynamic: bool = False):
    """The text encoder's patcher alone; the factory the host reloads it with."""
    return load_clip(path, embedding_directory, disable_dynamic).patcher


def load_vae(path: str):
    """The picture autoencoder as the host's VAE (its TAESD form)."""
    state, metadata = read(path)
    names = list(state)
    vae = comfy.sd.VAE(sd=state, metadata=metadata)
    check_names(path, names, vae.first_stage_model)
    vae.throw_exception_if_invalid()
    vae.patcher.cached_patcher_init = (load_vae_patcher, (path,))
    return vae


def load_vae_patcher(path: str, disable_dynamic: bool = False):
    """The picture autoencoder's patcher alone; the factory the host reloads it with."""
    return load_vae(path).patcher
