"""Scales around layers of a MODEL that are not ours: float, fp8, GGUF, bitsandbytes, the host's.

Hooks on each Linear and Conv2d multiply what goes in and what comes out
(``quant.diagonal``), whatever class the layer is of and however it holds its weight. They do
nothing in the forward of a clone without scales.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..quant import LayerScales, QuantTuneError, shortcut_splits
from ..quant.diagonal import only_first, scale_input, scale_output
from ..quant.functional import CONV2D_CHANNELS, LINEAR_CHANNELS
from .layout import QuantizedTensor
from .ops import _ScaledOp

SCALES = "quanttune_around"
"""Attribute of a layer: the scales of the forward under way, or None."""
SPLIT = "quanttune_joined_at"
"""Attribute of a layer: input channels of the first of two joined feature maps, or None."""


def layers_around(module: nn.Module) -> dict[str, nn.Module]:
    """Name to module of every Linear and Conv2d that is not ours, of whatever class."""
    return {name: m for name, m in module.named_modules()
            if name and not isinstance(m, _ScaledOp) and is_layer(m)}


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a Linear or Conv2d of any class, ours included."""
    return _is_linear(module) or _is_conv(module)


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """``(out, in / groups, ...)``, which a packed weight itself need not have."""
    if _is_conv(layer):
        return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size
    return layer.out_features, layer.in_features


def weight_shapes(patcher) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of a MODEL's or CLIP's patcher by its name in the host.

    GGUF layers tell the host how many bytes they take; here is what those stand for.
    """
    shapes = {}
    for key, value in patcher.model_state_dict().items():
        shapes[key] = tuple(value.shape)
        name, _, leaf = key.rpartition(".")
        if leaf not in ("weight", "bias"):
            continue
        try:
            layer = patcher.model.get_submodule(name)
        except AttributeError:  # such as the room for the largest weight, which is no layer's
            continue
        if is_layer(layer) and callable(getattr(layer, "get_weight", None)):
            shapes[key] = weight_shape(layer)[:1 if leaf == "bias" else None]
    return shapes


def _is_conv(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d)


def _is_linear(layer: nn.Module) -> bool:
    """Some of the host's own Linear layers are of no class of PyTorch's."""
    return isinstance(layer, nn.Linear) or (
        type(layer).__name__ == "Linear" and hasattr(layer, "in_features")
        and hasattr(layer, "out_features"))


def joined_inputs(layers: dict[str, nn.Module]) -> dict[str, int]:
    """Layer name to the channels of its first input, of shortcuts that join two feature maps."""
    return shortcut_splits({name: weight_shape(layer) for name, layer in layers.items()})


def put_around(name: str, layer: nn.Module, split: int | None) -> None:
    """Make a layer follow what `set_scales` says from now on; safe to call again."""
    if SPLIT in layer.__dict__:
        return
    layer.__dict__[SPLIT], layer.__dict__[SCALES] = split, None
    channel_dim = CONV2D_CHANNELS if _is_conv(layer) else LINEAR_CHANNELS
    outputs = weight_shape(layer)[0]

    def before(module, args):
        scales = module.__dict__[SCALES]
        if scales is None:
            return None
        return scale_input(args[0], scales, channel_dim), *args[1:]

    def after(module, args, output):
        scales = module.__dict__[SCALES]
        if scales is None:
            return None
        first = None
        if scales.r_out.shape[1] != outputs:
            def first():
                # Not by a call, which would scale again.
                return module.forward(only_first(args[0], split, channel_dim), *args[1:])
        return scale_output(output, added_at_the_end(name, module, output), scales, channel_dim,
                            first)

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


def set_scales(layer: nn.Module, scales: LayerScales | None) -> None:
    """Of the next forward of a layer that `put_around` has seen."""
    layer.__dict__[SCALES] = scales


def added_at_the_end(name: str, layer: nn.Module, like: Tensor) -> Tensor | None:
    """The bias as the layer adds it: patched, and in the dtype and on the device of ``like``.

    Raises:
        QuantTuneError: a bias that cannot be read.
    """
    bias = getattr(layer, "bias", None)
    if bias is None:
        return None
    own = getattr(layer, "get_weight", None)
    if callable(own):  # GGUF layers: quantized or not, and with patches of their own
        bias = own(bias.to(like.device), like.dtype)
    else:
        bias = bias.to(like.device)
        if isinstance(bias, QuantizedTensor):
            bias = bias.dequantize()
        bias = bias.to(like.dtype)
        patches = [getattr(layer, "bias_lowvram_function", None),
                   *getattr(layer, "bias_function", ())]
        for patch in filter(None, patches):
            # What a patch is added to is its own.
            bias = patch(bias.clone())
    if tuple(bias.shape) != (weight_shape(layer)[0],):
        raise QuantTuneError(
            f"The layer '{name}' ({type(layer).__name__}) has a bias of shape {list(bias.shape)} "
            f"in place of {[weight_shape(layer)[0]]}, so that scales cannot act on it; quantize "
            "the float model with 'Quantize UNet' instead.")
    return bias.to(like.dtype)
