"""The starter's UNet as a checkpoint of Q-Diffusion: `python starter/qdiffusion_file.py OUT.pth`.

It has all that the authors' files have: the float weights, a step and a zero point for each
channel, AdaRound's alphas, two quantizers for the split shortcuts, everything in float32 under
`model.` and LDM's names. The alphas are those that AdaRound begins with (Nagel et al., 2020), which
round to nearest. At 4 bits the integers are those of `quanttune/starter-4bit.safetensors`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

if __package__:
    from ..quant import QuantSpec, choose_qparams, shortcut_splits
    from ..quant.whole_file import written_whole
else:  # run as a script
    from quanttune.quant import QuantSpec, choose_qparams, shortcut_splits
    from quanttune.quant.whole_file import written_whole

FOLDER = Path(__file__).resolve().parent
NAME = "starter-qdiffusion-4bit.pth"
"""What *Load Quantized UNet* calls it; too large to ship, it is made when it is first chosen."""
GAMMA, ZETA = -0.1, 1.1
"""Between which AdaRound stretches its sigmoid."""


def qdiffusion_state(unet: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """The tensors of a Q-Diffusion checkpoint of a UNet's float weights, in LDM's names.

    unet: by name without a prefix; every weight of two or more dimensions is quantized.
    """
    shapes = {name.removesuffix(".weight"): tuple(value.shape) for name, value in unet.items()
              if name.endswith(".weight") and value.dim() > 1}
    splits = shortcut_splits(shapes)
    state = {}
    for name, value in unet.items():
        state[f"model.{name}"] = value.float()
        layer = name.removesuffix(".weight")
        if layer == name or layer not in shapes:
            continue
        border = splits.get(layer)
        parts = [value] if border is None else [value[:, :border], value[:, border:]]
        for part, suffix in zip(parts, ("", "_0")):
            _quantizer(state, f"model.{layer}.weight_quantizer{suffix}", part.float(), bits)
    return state


def _quantizer(state: dict[str, Tensor], key: str, weight: Tensor, bits: int) -> None:
    column = (-1, *[1] * (weight.dim() - 1))
    delta, zero_point = choose_qparams(weight.flatten(1), QuantSpec(bits, range="mse"))
    scaled = weight / delta.view(column)
    rest = scaled - scaled.floor()
    state[f"{key}.delta"] = delta.view(column)
    state[f"{key}.zero_point"] = zero_point.view(column)
    alpha = torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1).abs_().clamp_(min=1e-6)
    # In words: 0 and above rounds up. What lies right in the middle goes where `round` puts it.
    state[f"{key}.alpha"] = torch.where(scaled.round() > scaled.floor(), alpha, -alpha)


def write_qdiffusion_starter(path: Path | str, bits: int = 4, folder: Path = FOLDER) -> None:
    """Write the checkpoint of the starter's UNet (52 MB), whole or not at all."""
    state = qdiffusion_state(load_file(folder / "unet.safetensors"), bits)
    with written_whole(path) as file:
        torch.save(state, file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    options = parser.parse_args()
    write_qdiffusion_starter(options.out, options.bits)
