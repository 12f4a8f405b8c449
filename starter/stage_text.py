"""Stage 3: teach the text encoder what sentences mean, before any picture.

Every token from the end of the sentence on must tell all seven attributes of the scene through one
linear head each, so the diffusion model's cross-attention meets words that are already bound
("red" to the object, "blue" to the background) instead of learning language through the noise.
Where a sentence leaves an attribute open the heads learn its distribution. The heads are thrown
away. Two minutes; about a thousand times cheaper a sentence than a step of the diffusion model.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from . import parallel
from .captions import describe
from .classifier import ATTRIBUTES
from .common import SEED, Run
from .config import CLIP
from .generator import sample
from .stage_classifier import labels
from .text import END, TextEncoder, Vocabulary

BATCH = 128
UNKNOWN = 0.1
"""Share of sentences with an unknown word in them."""
SENTENCES = 60_000


def build(rows: int) -> tuple[TextEncoder, torch.nn.ModuleDict]:
    """The text encoder and its throw-away heads, with seeded random weights."""
    torch.manual_seed(SEED)
    width = CLIP["hidden_size"]
    heads = {name: torch.nn.Linear(width, len(values)) for name, values in ATTRIBUTES.items()}
    return TextEncoder(rows), torch.nn.ModuleDict(heads)


def train(run: Run, workers: int) -> TextEncoder:
    """Train within the run's budget on sentences of training triples."""
    vocabulary = Vocabulary()
    text, heads = build(len(vocabulary.ids))
    scenes = [sample(SEED * 7_000_003 + i) for i in range(SENTENCES)]
    truth = labels(scenes)
    end = vocabulary.row[END]

    def rows_of(index: int, rng: np.random.Generator) -> list[int]:
        strange = int(rng.integers(8)) if rng.random() < UNKNOWN else None
        return vocabulary.encode(describe(scenes[index], int(rng.integers(2**31))), strange)

    def loss_of(share, ticket, generator):
        rng = np.random.default_rng((SEED, ticket))
        index = rng.integers(SENTENCES, size=BATCH)
        rows = torch.tensor([rows_of(int(i), rng) for i in index])
        told = (rows == end).nonzero(as_tuple=True)
        hidden = text(rows)[told]
        loss, right = hidden.new_zeros(()), {}
        for name, head in heads.items():
            out, answer = head(hidden), truth[name][index][told[0]]
            loss = loss + F.cross_entropy(out, answer)
            right[name] = (out.argmax(1) == answer).float().mean()
        return loss, {"loss": loss, **right}

    parallel.train(run, [text, heads], loss_of, rate=1e-3, decay=1e-2, ema=0.99, workers=workers)
    return text


def finished(run: Run) -> TextEncoder | None:
    """The trained text encoder of a work folder, or None when this stage has not run."""
    vocabulary = Vocabulary()
    text, heads = build(len(vocabulary.ids))
    path = run.work / "text.ckpt"
    if not path.exists():
        return None
    parallel.bind_average([text, heads], torch.load(path, weights_only=True, map_location="cpu"))
    return text
