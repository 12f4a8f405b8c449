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
    "something_new.7": OTHER,
}


@pytest.mark.parametrize("name", list(NAMES))
def test_group(name):
    assert group_of(name) == NAMES[name]


def test_every_group_has_an_example():
    assert set(NAMES.values()) == {*GROUPS, OTHER}
