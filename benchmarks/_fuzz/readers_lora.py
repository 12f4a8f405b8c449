"""The reader of LoRAs."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .decode import Unreadable, safetensors
from .readers_host import settled, stored_file
from .readers_quant import finite, random
from .run import Files, Reader
from .scratch import written


def lora_seeds() -> list[Files]:
    """LoRAs for the tiny model: ComfyUI's names, DoRA, and peft's with its settings."""
    from quanttune.host.lora_file import save_lora
    from quanttune.tests.host.lora_models import exported
    from quanttune.tests.host.models import small_model

    with torch.inference_mode():
        _, lora = exported(small_model())
        kohya = written("a.safetensors", lambda path: save_lora(path, lora))
    peft = {}
    for name in (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k",
    ):
        peft |= {
            f"base_model.model.{name}.lora_A.weight": random(4, 32),
            f"base_model.model.{name}.lora_B.weight": random(32, 4),
        }
    config = json.dumps(
        {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["to_q"],
            "alpha_pattern": {},
            "rank_pattern": {},
        }
    ).encode()
    return [
        {"a.safetensors": kohya},
        {"a.safetensors": stored_file(peft), "adapter_config.json": config},
    ]


@lru_cache(maxsize=1)
def _model():
    from quanttune.tests.host.models import small_model

    with torch.inference_mode():
        return small_model()


def read_lora_file(folder: Path, target: str) -> Any:
    """*Load LoRA (QuantTune)* and *LoRA Train*'s start: read, fitted to a model, as layers."""
    from quanttune.host.lora_file import import_lora, read_lora

    lora = read_lora(folder / "a.safetensors")
    return lora, import_lora(lora, _model(), notes=False)


def check_lora(files: Files, found: Any) -> str | None:
    """The file's tensors, finite, and layers that are finite."""
    try:
        _, stored = safetensors(files["a.safetensors"])
    except Unreadable as error:
        return f"a file that is none was accepted: {error}"
    lora, layers = found
    if lora.keys() != stored.keys() or not all(s.same(lora[n]) for n, s in stored.items()):
        return "other tensors than the file holds"
    for name, layer in layers.items():
        parts = [layer.down, layer.up, torch.tensor(float(layer.alpha)), layer.dora_scale]
        if not all(bool(p.isfinite().all()) for p in parts if p is not None):
            return f"{name} is not finite"
    return finite(stored)


def readers() -> list[Reader]:
    """All of this file."""
    return [Reader("LoRA", lora_seeds, settled(read_lora_file), check_lora, share=0.5)]
