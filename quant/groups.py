"""What a layer of a diffusion model is for, read from its name: attention, feed-forward, ResNet…"""

from __future__ import annotations

import re

GROUPS: dict[str, str] = {
    "first and last": r"^(input_blocks\.0\.0|conv_in|x_embedder.*|img_in|txt_in|"
    r"context_embedder|out\.\d+|conv_out|"
    r"final_layer\..*|proj_out)$",
    "time embedding": r"(^|\.)(time_embed|label_emb|time_embedding|add_embedding|[ty]_embedder|"
    r"time_in|vector_in|guidance_in|emb_layers|time_emb_proj|time_mix\w*)(\.|$)",
    "shortcuts": r"(^|\.)(skip_connection|conv_shortcut|nin_shortcut)(\.|$)",
    "cross-attention keys and values": r"(^|\.)attn2\.to_[kv]$",
    "cross-attention": r"(^|\.)attn2\.(?!(qkv|proj)$)",
    "self-attention queries and keys": r"(^|\.)(attn1?\.to_[qk]|((img|txt)_)?attn2?\.qkv)$",
    "self-attention": r"(^|\.)(attn1|((img|txt)_)?attn2?)\.",
    "feed-forward": r"(^|\.)(ff|ff_context|((img|txt)_)?mlp)\.",
    "single blocks": r"(^|\.)single_blocks\.\d+\.linear[12]$",
    "modulation": r"(^|\.)((img|txt)_mod|(adaLN_)?modulation)(\.|$)",
    "transformer in and out": r"(^|\.)(proj_in|proj_out)$",
    "down- and upsampling": r"(^|\.)(op|conv|downsample|upsample)$",
    "ResNet": r"(^|\.)(in_layers|out_layers|conv1|conv2|temporal\w*)(\.|$)",
}
"""Group to a pattern of layer names, the first that matches counts. Flux' single blocks hold
attention and feed-forward in the same two layers."""
OTHER = "other"
"""Of layers that no pattern knows."""

_PATTERNS = {group: re.compile(pattern) for group, pattern in GROUPS.items()}


def group_of(name: str) -> str:
    """The group of a layer: a key of `GROUPS`, or `OTHER`."""
    return next((g for g, pattern in _PATTERNS.items() if pattern.search(name)), OTHER)
