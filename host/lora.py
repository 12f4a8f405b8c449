"""Stock LoRAs on packed weights without requantization, however the host loads the model."""

from __future__ import annotations

import math
from functools import partial

import comfy.utils
import torch
from comfy.model_patcher import LowVramPatch
from comfy.patcher_extension import CallbacksMP
from comfy.weight_adapter import LoRAAdapter

from ..quant import LowRank, QuantTuneError
from ..quant.limits import is_finite
from .compat import is_weight_patch
from .layout import is_packed
from .ops import scaled_layers
from .patches import note_patches

KEY = "quanttune_lora"


def keep_integers_under_patches(patcher) -> None:
    """Make ``patcher`` (and its clones) apply weight patches in the forward, not in the weight.

    The host bakes patches into the weights of a fully loaded model, which for integers means
    either another rounding or a float copy. After each load, every baked layer gets its integers
    back. Plain LoRAs, however many, become one low-rank term of the layer (`quant.LowRank`), which
    costs next to nothing. Any other patch (DoRA, LoHa, a merge) becomes a weight function: exactly
    what the host itself does for the layers of a partially loaded model.
    """
    patcher.remove_callbacks_with_key(CallbacksMP.ON_LOAD, KEY)
    patcher.remove_callbacks_with_key(CallbacksMP.ON_DETACH, KEY)
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, _unbake)
    patcher.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, _forget)
    # A bypass LoRA comes and goes without another load.
    for call, injected in ((CallbacksMP.ON_INJECT_MODEL, True),
                           (CallbacksMP.ON_EJECT_MODEL, False)):
        patcher.remove_callbacks_with_key(call, KEY)
        patcher.add_callback_with_key(call, KEY, partial(note_patches, injected=injected))


def hold_patches(patcher, dora: bool = False) -> None:
    """Make the patches of a loaded MODEL part of its layers, for as long as it exists.

    While adapters of a training stand around its layers, the host cannot find these by the names
    that patches have: unloading would lose the patches, or fail. Only for a MODEL of its own.

    dora: whether magnitudes will be learnt, which are of the weight alone.

    Raises QuantTuneError for patches that packed integers cannot hold.
    """
    packed = [name for name, module in scaled_layers(patcher.model).items()
              if f"{name}.weight" in patcher.patches and is_packed(module.weight)]
    if packed and dora:
        raise QuantTuneError("DoRA cannot be trained on a quantized MODEL that carries a LoRA; "
                             "train it on the model from before the LoRA, or set dora to false.")
    for name in packed:
        module = patcher.model.get_submodule(name)
        if any(is_weight_patch(function) for function in module.weight_function):
            raise QuantTuneError(
                f"This quantized MODEL carries a patch on '{name}' that is no plain LoRA (DoRA, "
                "LoHa, a merge), which nothing can be trained on; train on the model from before "
                "it, or use 'Merge LoRA into Quantized UNet' first.")
    patcher.remove_callbacks_with_key(CallbacksMP.ON_LOAD, KEY)
    patcher.remove_callbacks_with_key(CallbacksMP.ON_DETACH, KEY)
    patcher.patches, patcher.backup = {}, {}


class _Functions(list):
    """Weight functions of a layer, at most one of them the host's patch, which acts first.

    The host appends its patch again when it unloads a layer that has one already, also where a
    low-rank term stands for it (``replaced``).
    """

    def __init__(self, functions, replaced: bool):
        super().__init__(functions)
        self.replaced = replaced

    def append(self, function):
        if not is_weight_patch(function):
            super().append(function)
        elif not self.replaced:
            self[:] = [function, *(f for f in self if not is_weight_patch(f))]


def _unbake(patcher, device_to, *_):
    note_patches(patcher)
    device = device_to or patcher.load_device
    for name, module in scaled_layers(patcher.model).items():
        key = f"{name}.weight"
        baked = key in patcher.backup
        original = patcher.backup[key].weight if baked else module.weight
        if not is_packed(original):
            continue
        if baked:
            comfy.utils.set_attr_param(patcher.model, key, original.to(device=device_to))
            if not patcher.is_dynamic():
                del patcher.backup[key]
        if getattr(module, "weight_lowvram_function", None) is not None:
            # Dynamic VRAM would write the patched weight back, rounded, over the integers.
            module.weight_lowvram_function = None
        rest = [f for f in module.weight_function if not is_weight_patch(f)]
        patches = patcher.patches.get(key, [])
        # What wraps a weight wants to see it patched.
        terms = None if rest else _plain_loras(patches, original.shape)
        _set_low_rank(module, patches if terms else [], terms, device)
        patch = [LowVramPatch(key, patcher.patches)] if patches and terms is None else []
        module.weight_function = _Functions([*patch, *rest], terms is not None)
        module.quanttune_unbaked = True


def _plain_loras(patches, shape) -> list[tuple[torch.Tensor, torch.Tensor, float]] | None:
    """``(up, down, factor)`` of each patch of a weight of ``shape``; None unless all are LoRAs
    that do nothing but add ``factor * up @ down``."""
    terms = []
    for strength, adapter, model_strength, offset, function, *_ in patches:
        if type(adapter) is not LoRAAdapter or model_strength != 1.0:
            return None
        up, down, alpha, *special = adapter.weights
        # A Tucker core, DoRA's magnitudes, another shape of the weight.
        if offset is not None or function is not None or any(s is not None for s in special):
            return None
        factor = strength * (1.0 if alpha is None else float(alpha) / down.shape[0])
        if (up.shape[0] != shape[0] or up[0].numel() != down.shape[0]
                or down[0].numel() != math.prod(shape[1:])):
            return None
        if not math.isfinite(factor) or not (is_finite(up) and is_finite(down)):
            return None
        if factor:
            terms.append((up, down, factor))
    return terms


def _set_low_rank(module, patches: list, terms: list | None, device: torch.device) -> None:
    """Give a layer the low-rank term of ``terms``; the one it has if that is of the same patches.

    The host loads a model anew before every sampling unless all of it stayed in place.
    """
    source = (device, module.weight.dtype, *patches)
    known = module.__dict__.get("quanttune_low_rank_source", ())
    if len(known) == len(source) and known[:2] == source[:2] and all(
            a is b for a, b in zip(known[2:], source[2:])):
        return
    module.low_rank = LowRank.join(terms, module.weight.dtype, device) if terms else None
    module.quanttune_low_rank_source = source


def _forget(patcher, unpatch_all):
    if not unpatch_all:
        return
    for module in patcher.model.modules():
        if getattr(module, "quanttune_unbaked", False):
            module.weight_function = []
            module.low_rank = None
            del module.quanttune_unbaked, module.quanttune_low_rank_source
