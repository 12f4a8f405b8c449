"""A small picture classifier: what a picture of the starter's world shows, and its features.

It judges generated pictures (prompt obedience) and gives a feature vector for distances between
sets of pictures. Trained on the generator alone, held-out triples included.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from .generator import BACKGROUNDS, COLOURS, FILLS, POSITIONS, TEXTURES
from .shapes import SHAPES

ATTRIBUTES = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "fill": FILLS,
    "texture": TEXTURES,
    "position": tuple(POSITIONS),
    "size": ("small", "medium", "large"),
}
"""Attribute -> its values in the order of the outputs."""

FEATURES = 128


def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Classifier(nn.Module):
    """Convolutions from 128x128 down to 4x4, a feature vector, one linear head an attribute."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            block(3, 24, 2), block(24, 32, 2), block(32, 48, 1), block(48, 64, 2),
            block(64, 64, 1), block(64, 96, 2), block(96, 80, 2),
        )  # fmt: skip
        self.features = nn.Linear(80 * 16, FEATURES)
        self.heads = nn.ModuleDict({k: nn.Linear(FEATURES, len(v)) for k, v in ATTRIBUTES.items()})

    def embed(self, pictures: torch.Tensor) -> torch.Tensor:
        """Feature vectors (n, FEATURES) of pictures (n, 3, 128, 128) in 0..1."""
        return torch.relu(self.features(self.body(pictures * 2 - 1).flatten(1)))

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits per attribute of pictures (n, 3, 128, 128) in 0..1."""
        hidden = self.embed(pictures)
        return {name: head(hidden) for name, head in self.heads.items()}

    @torch.inference_mode()
    def read(self, pictures: np.ndarray | torch.Tensor) -> list[dict[str, str]]:
        """The most likely value of every attribute for pictures (n, 128, 128, 3).

        uint8 arrays are 0..255, floats 0..1 (the host's IMAGE).
        """
        x = torch.as_tensor(pictures)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        out = {k: v.argmax(1) for k, v in self(x.permute(0, 3, 1, 2)).items()}
        return [{k: ATTRIBUTES[k][int(v[i])] for k, v in out.items()} for i in range(len(x))]


def load_classifier(folder: Path | str | None = None) -> Classifier:
    """The shipped classifier, fp32, ready to use."""
    from safetensors.torch import load_file

    path = Path(folder or Path(__file__).resolve().parent) / "classifier.safetensors"
    model = Classifier()
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)
