"""States as TuneQDM's authors save them, written out from the formula of their layers."""

from __future__ import annotations

import torch
from torch import nn


def signed(weight, bits, symmetric=False):
    """``(integers, zero point, scale)`` of each row, in plain arithmetic of float64."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rows = weight.flatten(1)
    if symmetric:
        scale = (rows.abs().max(1).values / high).clamp(min=1e-8)
        zero = torch.zeros_like(scale)
    else:
        least, most = rows.min(1).values, rows.max(1).values
        scale = ((most - least) / (high - low)).clamp(min=1e-8)
        zero = low - torch.round(least / scale)
    integers = torch.clamp(torch.round(rows / scale[:, None] + zero[:, None]), low, high)
    return integers.reshape(weight.shape).to(torch.int8), zero, scale


def authors_state(model, bits=8, experts=2, symmetric=False, seed=0, amount=0.1, prefix=""):
    """What their code would save of a model after a training of ``experts``."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    quantized = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    for name, module in quantized.items():
        weight = module.weight.detach()
        integers, zero, scale = signed(weight, bits, symmetric)
        ones = [1] * (weight.dim() - 2)

        def around(count):
            return 1 + amount * torch.randn(experts, count, generator=generator)

        out, inputs = weight.shape[:2]
        state[f"{name}.weight_int"] = integers
        state[f"{name}.zero_point"] = zero.view(out, 1, *ones)
        state[f"{name}.delta_out_experts"] = (around(out) * scale).view(experts, out, 1, *ones)
        state[f"{name}.delta_in_experts"] = around(inputs).view(experts, 1, inputs, *ones)
    for key, value in model.state_dict().items():
        if key.endswith("bias"):
            state[key] = value.clone()
    config = {"n_bits": bits, "symmetric": symmetric, "num_experts": experts,
              "total_denoising_steps": 1000, "train_delta_in": True, "train_bias": False}
    return {"delta_state": {prefix + k: v for k, v in state.items()}, "config": config}


def their_weight(state, name, expert):
    """The weight that their layer computes with."""
    own = state["delta_state"]
    integers = own[f"{name}.weight_int"].float()
    return ((integers - own[f"{name}.zero_point"]) * own[f"{name}.delta_out_experts"][expert]
            * own[f"{name}.delta_in_experts"][expert])
