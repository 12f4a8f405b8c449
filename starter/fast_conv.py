"""A convolution for training in bfloat16 on a CPU.

The stock weight gradient runs many times slower than the forward on processors with tile
instructions. Here it is nine (for 3x3) plain matrix products over shifted views of the padded
input, which cost about as much as the forward. The forward and the input gradient stay stock.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def weight_gradient(x: torch.Tensor, grad: torch.Tensor, k: int, stride: int) -> torch.Tensor:
    """Gradient of a k x k convolution's weight with padding k // 2.

    x: (n, ci, h, w) and grad: (n, co, h / stride, w / stride), both channels_last;
    returns (co, ci, k, k) in fp32.
    """
    n, ci, h, w = x.shape
    co = grad.shape[1]
    x, grad = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
    if k == 1 and stride == 1:
        return (grad.reshape(-1, co).T @ x.reshape(-1, ci)).float().view(co, ci, 1, 1)
    out = torch.empty(k, k, co, ci)
    pad = k // 2
    x = F.pad(x, (0, 0, pad, pad, pad, pad))
    if stride == 1:
        grad = F.pad(grad, (0, 0, 0, 2 * pad, 0, 2 * pad)).reshape(-1, co).T
        x = x.reshape(-1, ci)
        rows = x.shape[0]
        for i in range(k):
            for j in range(k):
                shift = i * (w + 2 * pad) + j
                out[i, j] = grad[:, : rows - shift] @ x[shift:]
    else:
        gh, gw = grad.shape[1:3]
        grad = grad.reshape(-1, co).T
        for i in range(k):
            for j in range(k):
                part = x[:, i : i + gh * stride : stride, j : j + gw * stride : stride]
                out[i, j] = grad @ part.reshape(-1, ci)
    return out.permute(2, 3, 0, 1)


class FastConv(torch.autograd.Function):
    """Convolution with padding k // 2, equal strides, one group, and the fast weight gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride):
        """y = weight * x + bias, in x's dtype after the autocast to bfloat16."""
        x = x.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        low = weight.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        k = weight.shape[-1]
        ctx.save_for_backward(x, low)
        ctx.options = (stride, k, bias is not None)
        bias = bias.to(torch.bfloat16) if bias is not None else None
        return F.conv2d(x, low, bias, stride, k // 2)

    @staticmethod
    def backward(ctx, grad):
        """Gradients of x (bf16), weight and bias (fp32)."""
        x, weight = ctx.saved_tensors
        stride, k, has_bias = ctx.options
        grad = grad.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = torch.ops.aten.convolution_backward(
                grad, x, weight, None, [stride] * 2, [k // 2] * 2, [1, 1], False, [0, 0], 1,
                [True, False, False],
            )[0]
        to_weight = weight_gradient(x, grad, k, stride)
        to_bias = None
        if has_bias:
            flat = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])
            to_bias = (flat.new_ones(1, flat.shape[0]) @ flat)[0].float()
        return to_x, to_weight, to_bias, None


def install(model: torch.nn.Module) -> torch.nn.Module:
    """Make every plain convolution of a model train through `FastConv` (in place)."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups == 1:
            module.forward = _forward_of(module)
    return model


def _forward_of(module: torch.nn.Conv2d):
    def forward(x, *_):
        return FastConv.apply(x, module.weight, module.bias, module.stride[0])

    return forward
