"""Model sizes and trainable parameters: TuneQDM's Table 1 and Table 3, counted by our own code.

    python dev.py bench sizes --json sizes.json

Both networks are built on the meta device, so nothing but names and shapes is in memory. The paper
counts every parameter at the model's bit width; what our format stores, with scales, zero points
and float norms, is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import nn

from quanttune.benchmarks._ddpm_unet import CIFAR10, DDPMUNet
from quanttune.quant import (
    ScaleSet,
    packed_shape,
    quantizable_layers,
    save_scale_set,
    scale_shapes,
    shortcut_splits,
)

GIB = 2**30
MB = 10**6
FLOAT16_BYTES = 2
SD15_CONFIG = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "use_spatial_transformer": True,
    "context_dim": 768,
    "num_heads": 8,
    "legacy": False,
}

Row = tuple[str, str, str]


def sd15_unet() -> nn.Module:
    """The full-size UNet of Stable Diffusion 1.5, built by the host on the meta device."""
    # The host looks for a GPU when it is imported, unless it is told that there is none.
    from comfy.cli_args import args

    args.cpu = True
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(**SD15_CONFIG, dtype=torch.float16, device="meta")


def cifar_unet() -> nn.Module:
    """The DDPM UNet for CIFAR-10 on the meta device."""
    with torch.device("meta"):
        return DDPMUNet(**CIFAR10)


class Counts:
    """What the tables need to know of one network."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = quantizable_layers(model)
        self.params = sum(p.numel() for p in model.parameters())
        shapes = {name: tuple(m.weight.shape) for name, m in self.layers.items()}
        self.splits = shortcut_splits(shapes)
        self.scale_shapes = scale_shapes(model, self.splits)

    def scale_set(self, experts: int = 1, with_s_in: bool = True) -> ScaleSet:
        """An untrained scale set of this network, PEQA's without ``s_in``."""
        return ScaleSet.identity(self.scale_shapes, experts, with_s_in=with_s_in)

    def gib(self, bits: int) -> float:
        """The paper's model size: every parameter at ``bits`` bits, in GiB."""
        return self.params * bits / 8 / GIB

    def stored_gib(self, bits: int) -> float:
        """What our format stores, in GiB: codes, scales, zero points, and the rest in float16."""
        total, weights = 0, 0
        for name, module in self.layers.items():
            shape = module.weight.shape
            total += prod(packed_shape(shape[0], prod(shape[1:]), bits))
            total += 2 * 4 * self.scale_shapes[name][0]
            weights += module.weight.numel()
        return (total + (self.params - weights) * FLOAT16_BYTES) / GIB

    def qlora_params(self, rank: int) -> int:
        """The paper's QLoRA: rank-``r`` pairs on every layer, ``k*k`` of them in a convolution."""
        pairs = sum(
            rank * prod(m.weight.shape[2:]) * (m.weight.shape[0] + m.weight.shape[1])
            for m in self.layers.values()
        )
        return pairs + self.scale_set(with_s_in=False).num_parameters


def file_bytes(scale_set: ScaleSet) -> int:
    """Size of the file that the product writes for a scale set."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "scales.safetensors")
        save_scale_set(path, scale_set)
        return os.path.getsize(path)


def measure() -> dict[str, dict[str, float]]:
    """Every number of both tables, by network."""
    sd15, cifar = Counts(sd15_unet()), Counts(cifar_unet())
    peqa, tuneqdm = sd15.scale_set(with_s_in=False), sd15.scale_set()
    return {
        "sd15": {
            "params": sd15.params,
            "layers": len(sd15.layers),
            "split_layers": len(sd15.splits),
            "gib_32": sd15.gib(32),
            "gib_8": sd15.gib(8),
            "gib_4": sd15.gib(4),
            "stored_gib_8": sd15.stored_gib(8),
            "stored_gib_4": sd15.stored_gib(4),
            "peqa_params": peqa.num_parameters,
            "tuneqdm_params": tuneqdm.num_parameters,
            "peqa_mb": peqa.nbytes / MB,
            "tuneqdm_mb": tuneqdm.nbytes / MB,
            "peqa_file_bytes": file_bytes(peqa),
            "tuneqdm_file_bytes": file_bytes(tuneqdm),
        },
        "cifar": {
            "params": cifar.params,
            "layers": len(cifar.layers),
            "split_layers": len(cifar.splits),
            "peqa_params": cifar.scale_set(with_s_in=False).num_parameters,
            "tuneqdm_params": cifar.scale_set().num_parameters,
            "tuneqdm_params_2_experts": cifar.scale_set(experts=2).num_parameters,
            "qlora_params_rank_32": cifar.qlora_params(32),
            "qlora_params_rank_2": cifar.qlora_params(2),
            "tuneqdm_2_experts_file_bytes": file_bytes(cifar.scale_set(experts=2)),
        },
    }


def tables(numbers: dict[str, dict[str, float]]) -> list[tuple[str, list[Row]]]:
    """The numbers as titled rows of (quantity, ours, the paper's)."""
    sd15, cifar = numbers["sd15"], numbers["cifar"]

    def count(value: float) -> str:
        return f"{value:,}"

    return [
        (
            "Table 1: Stable Diffusion 1.5",
            [
                ("UNet parameters", count(sd15["params"]), "859 M"),
                ("quantized layers", count(sd15["layers"]), ""),
                ("model size, 32 bits (GiB)", f"{sd15['gib_32']:.4f}", "3.20"),
                ("model size, 8 bits (GiB)", f"{sd15['gib_8']:.4f}", "0.80"),
                ("model size, 4 bits (GiB)", f"{sd15['gib_4']:.4f}", "0.40"),
                ("  as stored by us, 8 bits (GiB)", f"{sd15['stored_gib_8']:.4f}", ""),
                ("  as stored by us, 4 bits (GiB)", f"{sd15['stored_gib_4']:.4f}", ""),
                ("PEQA trainable", count(sd15["peqa_params"]), "0.33 M"),
                ("TuneQDM trainable, 1 expert", count(sd15["tuneqdm_params"]), "0.62 M"),
                ("PEQA scales (MB)", f"{sd15['peqa_mb']:.3f}", "1.32"),
                ("TuneQDM scales (MB)", f"{sd15['tuneqdm_mb']:.3f}", "2.48"),
                ("  PEQA scale file (bytes)", count(sd15["peqa_file_bytes"]), ""),
                ("  TuneQDM scale file (bytes)", count(sd15["tuneqdm_file_bytes"]), ""),
            ],
        ),
        (
            "Table 3: DDPM on CIFAR-10",
            [
                ("UNet parameters", count(cifar["params"]), "35.8 M"),
                ("quantized layers", count(cifar["layers"]), ""),
                ("QLoRA trainable, rank 32", count(cifar["qlora_params_rank_32"]), "8.64 M"),
                ("QLoRA trainable, rank 2", count(cifar["qlora_params_rank_2"]), "0.57 M"),
                ("PEQA trainable", count(cifar["peqa_params"]), "0.03 M"),
                (
                    "TuneQDM trainable, 2 experts",
                    count(cifar["tuneqdm_params_2_experts"]),
                    "0.13 M",
                ),
                (
                    "  TuneQDM scale file, 2 experts (bytes)",
                    count(cifar["tuneqdm_2_experts_file_bytes"]),
                    "",
                ),
            ],
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print both tables; ``--json FILE`` also writes the numbers.

    Each number is there as ``sd15.params`` and as ``params`` of the object ``sd15``.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    options = parser.parse_args(argv)
    numbers = measure()
    for title, rows in tables(numbers):
        print(f"\n{title}\n{'':42}{'ours':>14}{'paper':>10}")
        for quantity, ours, paper in rows:
            print(f"{quantity:42}{ours:>14}{paper:>10}")
    if options.json:
        flat = {f"{group}.{key}": value for group, part in numbers.items()
                for key, value in part.items()}
        text = json.dumps({**flat, **numbers}, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
