"""What a layer is for, by its name, in the naming of several families."""

import pytest

from quanttune.quant.groups import GROUPS, OTHER, group_of

NAMES = {
    "input_blocks.0.0": "first and last", "out.2": "first and last", "conv_in": "first and last",
    "time_embed.0": "time embedding", "label_emb.0.2": "time embedding",
    "input_blocks.1.0.emb_layers.1": "time embedding",
    "output_blocks.5.0.skip_connection": "shortcuts", "up_blocks.0.conv_shortcut": "shortcuts",
    "input_blocks.3.1.transformer_blocks.0.attn1.to_q": "self-attention queries and keys",
    "input_blocks.3.1.transformer_blocks.0.attn1.to_out.0": "self-attention",
    "input_blocks.3.1.transformer_blocks.0.attn2.to_k": "cross-attention keys and values",
    "input_blocks.3.1.transformer_blocks.0.attn2.to_q": "cross-attention",
    "input_blocks.3.1.transformer_blocks.0.ff.net.0.proj": "feed-forward",
    "input_blocks.3.1.proj_in": "transformer in and out",
    "input_blocks.2.0.op": "down- and upsampling", "output_blocks.2.2.conv": "down- and upsampling",
    "input_blocks.1.0.in_layers.2": "ResNet", "middle_block.0.out_layers.3": "ResNet",
    "txt_in": "first and last", "context_embedder": "first and last",
    "final_layer.adaLN_modulation.1": "first and last",
    "vector_in.in_layer": "time embedding", "y_embedder.mlp.0": "time embedding",
    "double_blocks.0.img_attn.qkv": "self-attention queries and keys",
    "double_blocks.0.txt_attn.proj": "self-attention",
    "joint_blocks.0.x_block.attn.proj": "self-attention",
    "joint_blocks.0.x_block.attn2.qkv": "self-attention queries and keys",
    "joint_blocks.0.x_block.attn2.proj": "self-attention",
    "blocks.0.attn2.kv_proj": "cross-attention",
    "double_blocks.0.img_mlp.0": "feed-forward", "double_blocks.3.txt_mlp.2": "feed-forward",
    "joint_blocks.0.context_block.mlp.fc1": "feed-forward",
    "single_blocks.12.linear1": "single blocks", "single_blocks.0.linear2": "single blocks",
    "single_blocks.0.modulation.lin": "modulation", "double_blocks.0.img_mod.lin": "modulation",
    "joint_blocks.0.x_block.adaLN_modulation.1": "modulation",
    "something_new.7": OTHER,
}


@pytest.mark.parametrize("name", list(NAMES))
def test_group(name):
    assert group_of(name) == NAMES[name]


def test_every_group_has_an_example():
    assert set(NAMES.values()) == {*GROUPS, OTHER}
