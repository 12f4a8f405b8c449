"""What older releases of ComfyUI lack, asked of the host itself and not of its version number.

Everything that is done differently on an older host is here; the other modules of `host/` and
`nodes/` are written for the newest one.
"""

from __future__ import annotations

import contextlib
import inspect

import comfy.model_management
import comfy.quant_ops
from comfy.model_patcher import LowVramPatch


def set_inference_dtype(config, dtype, manual_cast_dtype, device) -> None:
    """``config.set_inference_dtype``, which in older hosts is not told the device.

    Args:
        config: a model config of the host (`comfy.supported_models_base.BASE`), changed in place.
        dtype: torch dtype of the weights.
        manual_cast_dtype: torch dtype they are cast to for computing; None computes in ``dtype``.
        device: torch device the model will be computed on.
    """
    known = inspect.signature(config.set_inference_dtype).parameters
    told = {"device": device} if "device" in known else {}
    config.set_inference_dtype(dtype, manual_cast_dtype, **told)


def is_weight_patch(function) -> bool:
    """Whether a weight function of a layer is the host's own patch (LoRA, merge) of that weight.

    Newer hosts mark these, since they have several kinds; older ones have one class.
    """
    return getattr(function, "is_lowvram_patch", isinstance(function, LowVramPatch))


def device_context(device) -> contextlib.AbstractContextManager:
    """The host's context that makes ``device`` the current GPU.

    Older hosts know one GPU, which is the current one: nothing to do there.
    """
    known = getattr(comfy.model_management, "cuda_device_context", None)
    return contextlib.nullcontext() if known is None else known(device)


def knows_stock_int8() -> bool:
    """Whether the host's own loader reads INT8 files (``int8_tensorwise``)."""
    return "int8_tensorwise" in comfy.quant_ops.QUANT_ALGOS


def kept_output() -> dict[str, bool]:
    """Arguments of ``io.Schema`` for a node with a ui output that is no output node.

    With them the host sends the ui output again when the node's result is cached, so that a page
    that was opened since shows it, too. Older hosts do so for output nodes alone.
    """
    from comfy_api.latest import io

    known = inspect.signature(io.Schema).parameters
    return {"has_intermediate_output": True} if "has_intermediate_output" in known else {}
