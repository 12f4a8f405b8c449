"""A float MODEL of any size around given tensors, by the host's own classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from ..quant import QuantTuneError
from ..quant.limits import is_finite
from ..quant.paging import give_back_after
from .compat import set_inference_dtype
from .lora_keys import brief


def float_model(config, construct: Callable, state: dict[str, Tensor], where: str,
                disable_dynamic: bool = False):
    """The host's MODEL with these weights.

    Args:
        config: the host's model configuration; its dtypes are set here, as its own loaders do.
        construct: makes the host's model on a device, or where None says.
        state: every tensor by its name in the host; emptied.
        where: what to call it in messages, "The UNet in …".
        disable_dynamic: keep the host from streaming its weights.

    Raises:
        QuantTuneError: tensors that do not fit, or a description that the host cannot build.
    """
    management = comfy.model_management
    try:
        load_device = management.get_torch_device()
        offload_device = management.unet_offload_device()
        supported = list(config.supported_inference_dtypes)
        dtype = management.unet_dtype(
            model_params=comfy.utils.calculate_parameters(state), supported_dtypes=supported,
            weight_dtype=comfy.utils.weight_dtype(state))
        cast = management.unet_manual_cast(dtype, load_device, supported)
        set_inference_dtype(config, dtype, cast, load_device)
        skeleton = construct("meta").diffusion_model
    except Exception as error:  # the host's classes meet what may be a hostile description
        raise unbuilt(where, error) from error
    check_fits(skeleton, {key: value.shape for key, value in state.items()}, where)
    model = construct(None)
    give_back_after(model)
    patchers = comfy.model_patcher
    make = patchers.ModelPatcher if disable_dynamic else patchers.CoreModelPatcher
    patcher = make(model, load_device=load_device, offload_device=offload_device)
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(state, "", assign=patcher.is_dynamic())
    return patcher


def check_fits(skeleton: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]],
               where: str) -> None:
    """Refuse tensors that do not fit before any memory is taken for the model they are of.

    Args:
        skeleton: the model, on the meta device.
        shapes: of the tensors, by name.
        where: what to call them in messages.
    """
    expected = {key: tuple(value.shape) for key, value in skeleton.state_dict().items()}
    for keys, what in ((expected.keys() - shapes.keys(), "lacks the"),
                       (shapes.keys() - expected.keys(), "has an unknown")):
        if keys:
            raise QuantTuneError(f"{where} {what} tensor '{min(keys)}' ({len(keys)} such); "
                                 "download or save it again.")
    for key, shape in expected.items():
        if tuple(shapes[key]) != shape:
            raise QuantTuneError(
                f"{where} does not fit its own configuration: {key} has the shape "
                f"{list(shapes[key])}, not {list(shape)}; download or save it again.")


def check_numbers(tensors: Mapping[str, Tensor], where: str,
                  advice: str = "download or save it again.") -> None:
    """Refuse tensors that cannot be a float network's: whole numbers, NaN and infinite ones.

    Args:
        tensors: by name; each is read once, nothing of its size is allocated.
        where: what to call them in messages.
        advice: the end of the message.
    """
    for key, value in tensors.items():
        if not value.is_floating_point():
            raise QuantTuneError(f"{where} holds {str(value.dtype).removeprefix('torch.')} in "
                                 f"'{brief(key)}' where a float network has fractions; {advice}")
        if value.device.type != "meta" and not is_finite(value):
            raise QuantTuneError(
                f"{where} holds NaN or infinite values in '{brief(key)}'; {advice}")


def unbuilt(where: str, error: Exception) -> QuantTuneError:
    """The error for a description that the host's classes do not build."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return QuantTuneError(f"{where} describes a network that ComfyUI cannot build "
                          f"({reason[:100]}); download or save it again.")
