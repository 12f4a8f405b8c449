"""Stock LoRAs on packed weights without requantization, however the host loads the model."""

from __future__ import annotations

import comfy.utils
from comfy.model_patcher import LowVramPatch
from comfy.patcher_extension import CallbacksMP

from .layout import is_uniform
from .ops import _ScaledOp

KEY = "quanttune_lora"


def keep_integers_under_patches(patcher) -> None:
    """Make ``patcher`` (and its clones) apply weight patches in the forward, not in the weight.

    The host bakes patches into the weights of a fully loaded model, which for integers means
    either another rounding or a float copy. After each load, every baked layer gets its integers
    back and the patch as a weight function: exactly what the host itself does for the layers of
    a partially loaded model.
    """
    patcher.remove_callbacks_with_key(CallbacksMP.ON_LOAD, KEY)
    patcher.remove_callbacks_with_key(CallbacksMP.ON_DETACH, KEY)
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, _unbake)
    patcher.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, _forget)


def _unbake(patcher, device_to, *_):
    for key in [k for k in patcher.backup if k.endswith(".weight")]:
        original = patcher.backup[key].weight
        module = comfy.utils.get_attr(patcher.model, key.removesuffix(".weight"))
        if not (is_uniform(original) and isinstance(module, _ScaledOp)):
            continue
        comfy.utils.set_attr_param(patcher.model, key, original.to(device=device_to))
        del patcher.backup[key]
        module.weight_function = [LowVramPatch(key, patcher.patches), *module.weight_function]
        # Without this the host would leave the functions of a fully loaded layer in place when
        # the model is handed to a clone with other patches.
        module.quanttune_unbaked = True


def _forget(patcher, unpatch_all):
    if not unpatch_all:
        return
    for module in patcher.model.modules():
        if getattr(module, "quanttune_unbaked", False):
            module.weight_function = []
            del module.quanttune_unbaked
