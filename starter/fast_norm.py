"""A group norm for training in bfloat16 on a CPU, several times faster than the stock one.

Statistics come from per-channel sums over pixels, then tiny group sums; the normalisation is one
scale and shift per image and channel. Same maths as Wu & He 2018, statistics in fp32.
"""

from __future__ import annotations

import torch


class FastGroupNorm(torch.autograd.Function):
    """y = (x - mean) / std * weight + bias over groups of channels; x is channels_last bf16."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        """x: (n, c, h, w); weight, bias: (c,) fp32; returns x's shape in bf16."""
        n, c, h, w = x.shape
        flat = x.to(torch.bfloat16).permute(0, 2, 3, 1).reshape(n, h * w, c)
        total = flat.sum(1, dtype=torch.float32)
        square = (flat * flat).sum(1, dtype=torch.float32)
        count = h * w * c // groups
        mean = total.view(n, groups, -1).sum(2) / count
        var = square.view(n, groups, -1).sum(2) / count - mean * mean
        inv = (var.clamp(min=0) + eps).rsqrt()
        mean, inv = (t.repeat_interleave(c // groups, 1) for t in (mean, inv))
        scale = inv * weight
        out = torch.addcmul(
            (bias - mean * scale).bfloat16()[:, None], flat, scale.bfloat16()[:, None]
        )
        ctx.save_for_backward(flat, mean, inv, weight)
        ctx.options = (groups, h, w)
        return out.view(n, h, w, c).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad):
        """Gradients of x (bf16), weight and bias (fp32)."""
        flat, mean, inv, weight = ctx.saved_tensors
        groups, h, w = ctx.options
        n, _, c = flat.shape
        grad = grad.to(torch.bfloat16).permute(0, 2, 3, 1).reshape(n, h * w, c)
        total = grad.sum(1, dtype=torch.float32)
        product = (grad * flat).sum(1, dtype=torch.float32)
        hat = (product - mean * total) * inv
        to_weight, to_bias = hat.sum(0), total.sum(0)
        count = h * w * c // groups
        one = (total * weight).view(n, groups, -1).sum(2) / count
        two = (hat * weight).view(n, groups, -1).sum(2) / count
        one, two = (t.repeat_interleave(c // groups, 1) for t in (one, two))
        # dx = inv * (g * weight - one - xhat * two) with xhat = (x - mean) * inv
        slope = -inv * inv * two
        constant = -inv * one - slope * mean
        to_x = torch.addcmul(constant.bfloat16()[:, None], grad, (inv * weight).bfloat16()[:, None])
        to_x.addcmul_(flat, slope.bfloat16()[:, None])
        return to_x.view(n, h, w, c).permute(0, 3, 1, 2), to_weight, to_bias, None, None


def install(model: torch.nn.Module) -> torch.nn.Module:
    """Make every group norm of a model train through `FastGroupNorm` (in place)."""
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = _forward_of(module)
    return model


def _forward_of(module: torch.nn.GroupNorm):
    def forward(x):
        return FastGroupNorm.apply(x, module.weight, module.bias, module.num_groups, module.eps)

    return forward
