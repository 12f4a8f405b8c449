"""The words the starter model knows and its text encoder as it is trained.

The ordinary CLIP vocabulary has 49,408 tokens; the training captions use under two hundred. Only
their rows exist while training (and in the file), with row 0 shared by every other token.
"""

from __future__ import annotations

import re

import torch

from . import captions
from .config import CLIP, TOKENS

START, END = 49406, 49407
WORD = re.compile(r"[a-z]+|[,.]")


def words() -> list[str]:
    """Every word that `captions.describe` may use, sorted."""
    from .generator import BACKGROUNDS, COLOURS, SHAPES

    pools = [
        *captions.POSITION_WORDS.values(), *captions.SIZE_WORDS.values(),
        *captions.FILL_WORDS.values(), *captions.COLOUR_WORDS.values(),
        *captions.BACKGROUND_WORDS.values(), *captions.SHAPE_WORDS.values(),
        *captions.TEXTURE_WORDS.values(), captions.PREFIXES, captions.IDENTIFIERS,
        captions.NEUTRAL, captions.TEMPLATES, COLOURS, BACKGROUNDS, SHAPES, ("a an and on ,",),
    ]  # fmt: skip
    text = " ".join(re.sub(r"{\w*}", " ", phrase) for pool in pools for phrase in pool)
    return sorted(set(WORD.findall(text)))


class Vocabulary:
    """Words -> rows of the small embedding.

    ids: the CLIP token ids in row order, row 0 being the shared unknown row (id -1).
    """

    def __init__(self):
        from comfy.sd1_clip import SDTokenizer

        tokenizer = SDTokenizer().tokenizer
        self.pieces = {w: tokenizer(w)["input_ids"][1:-1] for w in words()}
        known = sorted({i for pieces in self.pieces.values() for i in pieces} | {START, END})
        self.ids = [-1, *known]
        self.row = {token: row for row, token in enumerate(self.ids)}

    def encode(self, caption: str, unknown_at: int | None = None) -> list[int]:
        """Rows of a caption, padded to `TOKENS` with the end token as CLIP does.

        unknown_at: put the unknown row before this word, when there is one.
        """
        out = [self.row[START]]
        for position, word in enumerate(WORD.findall(caption)):
            if position == unknown_at:
                out.append(0)
            out += [self.row[i] for i in self.pieces[word]]
        end = self.row[END]
        return (out[: TOKENS - 1] + [end] * TOKENS)[:TOKENS]


class TextEncoder(torch.nn.Module):
    """The host's CLIP text transformer with a small embedding and a differentiable forward.

    `model` is the host's own module, so its state dict has the host's names.
    """

    def __init__(self, rows: int):
        super().__init__()
        import comfy.clip_model
        import comfy.ops

        config = {"layer_norm_eps": 1e-5, **CLIP}
        ops = comfy.ops.disable_weight_init
        self.model = comfy.clip_model.CLIPTextModel(config, torch.float32, "cpu", ops)
        width = CLIP["hidden_size"]
        embeddings = self.model.text_model.embeddings
        embeddings.token_embedding = torch.nn.Embedding(rows, width)
        for module in self.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=width**-0.5)
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)
            elif isinstance(module, torch.nn.LayerNorm):
                torch.nn.init.ones_(module.weight)
                torch.nn.init.zeros_(module.bias)
            elif isinstance(module, torch.nn.Embedding):
                torch.nn.init.normal_(module.weight, std=0.3)
        torch.nn.init.normal_(embeddings.position_embedding.weight, std=0.1)
        torch.nn.init.eye_(self.model.text_projection.weight)
        mask = torch.full((TOKENS, TOKENS), float("-inf")).triu_(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Hidden states (n, TOKENS, width) of rows (n, TOKENS), after the final norm."""
        text = self.model.text_model
        x = text.embeddings.token_embedding(rows) + text.embeddings.position_embedding.weight
        for layer in text.encoder.layers:
            x = x + self.attend(layer.self_attn, layer.layer_norm1(x))
            x = x + layer.mlp(layer.layer_norm2(x))
        return text.final_layer_norm(x)

    def attend(self, block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Causal self-attention."""
        n, length, width = x.shape
        heads = block.heads

        def split(y):
            return y.view(n, length, heads, width // heads).transpose(1, 2)

        q, k, v = (split(f(x)) for f in (block.q_proj, block.k_proj, block.v_proj))
        scores = q @ k.transpose(-1, -2) * (width // heads) ** -0.5
        y = (scores + self.mask).softmax(-1).to(v.dtype) @ v
        return block.out_proj(y.transpose(1, 2).reshape(n, length, width))
