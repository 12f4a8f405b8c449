"""Synthetic checkpoints of Q-Diffusion, and the recipe of their integers written out plainly."""

from __future__ import annotations

import torch

UNET = {
    # name: weight shape, channels of the first part of a split shortcut
    "time_embed.0": ((12, 8), None),
    "input_blocks.0.0": ((8, 4, 3, 3), None),
    "middle_block.1.qkv": ((9, 8, 1), None),
    "output_blocks.0.0.skip_connection": ((8, 16, 1, 1), 10),
    "output_blocks.1.0.skip_connection": ((6, 11, 1, 1), 4),
    "out.2": ((3, 5, 3, 3), None),
}
"""Layers of every kind; some with an odd number of weights in a row."""


def synthetic(bits, layers=UNET, seed=0, alpha=True, prefix="model.", outside=True):
    """Tensors of a file by key.

    Zero points lie outside of the range in some channels if ``outside``, as those of channels
    whose weights all have one sign do.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def quantizer(name, weight, with_alpha):
        w2d = weight.flatten(1)
        low, high = torch.aminmax(w2d, dim=1)
        delta = (high - low) / (2**bits - 1)
        zero_point = (-low / delta).round()
        column = (-1, *[1] * (weight.dim() - 1))
        state[f"{prefix}{name}.delta"] = delta.view(column)
        state[f"{prefix}{name}.zero_point"] = zero_point.view(column)
        if with_alpha:
            state[f"{prefix}{name}.alpha"] = torch.randn(weight.shape, generator=generator)

    for name, (shape, split) in layers.items():
        weight = torch.randn(shape, generator=generator)
        if outside:
            weight[0] += 9  # all above 0: a negative zero point
            weight[-1] -= 9  # all below: one above the largest integer
        state[f"{prefix}{name}.weight"] = weight
        state[f"{prefix}{name}.bias"] = torch.randn(shape[0], generator=generator)
        if split is None:
            quantizer(f"{name}.weight_quantizer", weight, alpha)
        else:
            quantizer(f"{name}.weight_quantizer", weight[:, :split], True)
            quantizer(f"{name}.weight_quantizer_0", weight[:, split:], True)
    state[f"{prefix}out.0.weight"] = torch.ones(4)
    return state


def with_activations(state, prefix="model."):
    """The same with the quantizers of activations that the authors' files have."""
    more = {}
    for key in state:
        if key.endswith(".weight_quantizer.delta"):
            layer = key.removesuffix(".weight_quantizer.delta")
            more[f"{layer}.act_quantizer.delta"] = torch.tensor(0.1)
            more[f"{layer}.act_quantizer.zero_point"] = torch.tensor(7.0)
            more[f"{layer}.act_quantizer_0.delta"] = torch.tensor(0.1)
    more[f"{prefix}middle_block.1.attn1.act_quantizer_q.delta"] = torch.tensor(0.1)
    return {**state, **more}


def expected_codes(state, name, bits, prefix="model."):
    """The integers of a layer as the checkpoint's authors compute them, float32."""
    weight = state[f"{prefix}{name}.weight"].float()
    first = state.get(f"{prefix}{name}.weight_quantizer.alpha")
    split = weight.shape[1] if first is None else first.shape[1]
    parts = []
    for key, part in (("weight_quantizer", weight[:, :split]),
                      ("weight_quantizer_0", weight[:, split:])):
        if not part.shape[1]:
            continue
        own = {k: state.get(f"{prefix}{name}.{key}.{k}") for k in ("delta", "zero_point", "alpha")}
        scaled = part / own["delta"]
        if own["alpha"] is None:
            rounded = torch.round(scaled)
        else:
            rounded = torch.floor(scaled) + (own["alpha"] >= 0).float()
        parts.append(torch.clamp(rounded + own["zero_point"], 0, 2**bits - 1))
    return torch.cat(parts, 1)


def expected_weight(state, name, bits, prefix="model."):
    """The float weight that those integers stand for."""
    codes = expected_codes(state, name, bits, prefix)
    first = state.get(f"{prefix}{name}.weight_quantizer.alpha")
    split = codes.shape[1] if first is None else first.shape[1]
    parts = []
    for key, part in (("weight_quantizer", codes[:, :split]),
                      ("weight_quantizer_0", codes[:, split:])):
        if part.shape[1]:
            parts.append(state[f"{prefix}{name}.{key}.delta"]
                         * (part - state[f"{prefix}{name}.{key}.zero_point"]))
    return torch.cat(parts, 1)
