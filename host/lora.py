"""Stock LoRAs on packed weights without requantization, however the host loads the model."""

from __future__ import annotations

import comfy.utils
from comfy.model_patcher import LowVramPatch
from comfy.patcher_extension import CallbacksMP

from .layout import is_uniform
from .ops import scaled_layers

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


def _is_patch(function) -> bool:
    return getattr(function, "is_lowvram_patch", False)


class _Functions(list):
    """Weight functions of a layer, at most one of them the host's patch, which acts first.

    The host appends its patch again when it unloads a layer that has one already.
    """

    def append(self, function):
        if _is_patch(function):
            self[:] = [function, *(f for f in self if not _is_patch(f))]
        else:
            super().append(function)


def _unbake(patcher, device_to, *_):
    for name, module in scaled_layers(patcher.model).items():
        key = f"{name}.weight"
        baked = key in patcher.backup
        original = patcher.backup[key].weight if baked else module.weight
        if not is_uniform(original):
            continue
        if baked:
            comfy.utils.set_attr_param(patcher.model, key, original.to(device=device_to))
            if not patcher.is_dynamic():
                del patcher.backup[key]
        if getattr(module, "weight_lowvram_function", None) is not None:
            # Dynamic VRAM would write the patched weight back, rounded, over the integers.
            module.weight_lowvram_function = None
        rest = [f for f in module.weight_function if not _is_patch(f)]
        patch = [LowVramPatch(key, patcher.patches)] if key in patcher.patches else []
        module.weight_function = _Functions([*patch, *rest])
        module.quanttune_unbaked = True


def _forget(patcher, unpatch_all):
    if not unpatch_all:
        return
    for module in patcher.model.modules():
        if getattr(module, "quanttune_unbaked", False):
            module.weight_function = []
            del module.quanttune_unbaked
