"""The starter model's architecture: the numbers that the files and the host must agree on."""

from __future__ import annotations

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 2],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_output": [0, 0, 1, 0, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": 8,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "context_dim": 128,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "legacy": False,
}
"""Keyword arguments of the host's UNetModel."""

TOKENS = 32
"""Length of a tokenized prompt, start and end included; longer prompts become several of these."""

CLIP = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": TOKENS,
    "projection_dim": 128,
    "eos_token_id": 49407,
}
"""What differs from the host's CLIP-L configuration."""

VOCABULARY_SIZE = 49408
"""Rows of the CLIP token embedding as the host expects it."""
