"""peft's DoRA, whose product with the frozen weight is that of the layer itself.

Imports peft, which takes its time: import it where DoRA is asked for.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from peft.tuners.lora.dora import DoraConv2dLayer, DoraLinearLayer
from torch import Tensor, nn

EIGHT_BIT_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)


def added_to(weight: Tensor) -> Tensor:
    """``weight``, in a dtype that can be added to: PyTorch adds nothing to floats of 8 bits."""
    return weight.to(torch.float32) if weight.dtype in EIGHT_BIT_FLOATS else weight


class _OwnProduct:
    """With dropout peft multiplies by ``base_layer.weight`` itself.

    That may be packed, kept in another dtype than is computed in, and would be held for the
    backward pass as floats. The layer knows how to do better.
    """

    def forward(self, x: Tensor, *, base_layer: nn.Module, base_result: Tensor | None = None,
                **matrices) -> Tensor:
        if base_result is None:
            base_result = base_layer(x)  # peft takes the bias off again, as without dropout
        bias = base_layer.bias
        if bias is not None and bias.dtype in EIGHT_BIT_FLOATS:
            shape = (-1, *[1] * (base_result.dim() - 2)) if base_layer.weight.dim() > 2 else (-1,)
            base_result = base_result - bias.to(base_result.dtype).view(shape)
            base_layer = SimpleNamespace(weight=base_layer.weight, bias=None)
        return super().forward(x, base_layer=base_layer, base_result=base_result, **matrices)

    def get_weight_norm(self, weight: Tensor, *args, **matrices) -> Tensor:
        return super().get_weight_norm(added_to(weight), *args, **matrices)


class _Linear(_OwnProduct, DoraLinearLayer):
    pass


class _Conv2d(_OwnProduct, DoraConv2dLayer):
    pass


def magnitude_of(base: nn.Module, down: Tensor, up: Tensor, scaling: float) -> nn.Module:
    """peft's module that holds the magnitudes of ``base``'s weight with ``scaling * up @ down``.

    base: a Linear or Conv2d layer.
    """
    made = (_Conv2d if isinstance(base, nn.Conv2d) else _Linear)(fan_in_fan_out=False)
    made.update_layer(base_layer=base, lora_A=down, lora_B=up, scaling=scaling)
    return made
