"""Sets of pictures and of encoded examples."""

import pytest
import torch

from quanttune.quant import QuantTuneError
from quanttune.training.data import TrainingImages, TrainingSet


def images(count=2, **changes):
    return TrainingImages(tuple(torch.rand(8, 8, 3) for _ in range(count)),
                          tuple(f"caption {i}" for i in range(count)), **changes)


def test_joining_keeps_order_captions_subjects_and_kinds():
    both = images(2, subject="a sks dog").joined(images(1, subject="a zwx cat", prior=(True,)))
    assert len(both.images) == 3 and both.captions == ("caption 0", "caption 1", "caption 0")
    assert both.subject == "a sks dog, a zwx cat" and both.prior == (False, False, True)
    assert images(1, subject="x").joined(images(1, subject="x")).subject == "x"


def test_a_caption_each():
    with pytest.raises(QuantTuneError, match="1 images and 2 captions"):
        TrainingImages((torch.rand(8, 8, 3),), ("a", "b"))


def training_set():
    generator = torch.Generator().manual_seed(0)
    sizes, lengths = [(4, 4), (4, 6), (4, 4)], [2, 3, 3]
    return TrainingSet(
        tuple(torch.randn(4, *s, generator=generator) for s in sizes),
        tuple({"c_crossattn": torch.randn(1, n, 5, generator=generator),
               "y": torch.randn(1, 7, generator=generator)} for n in lengths),
        (False,) * 3, ("",) * 3, "f")


def test_buckets_are_shapes():
    assert training_set().buckets() == [[0, 2], [1]]


def test_batches_stack_and_repeat_tokens_to_a_common_length():
    data = training_set()
    latents, conditions = data.batch([2, 0])
    assert torch.equal(latents[0], data.latents[2]) and latents.shape == (2, 4, 4, 4)
    tokens = conditions["c_crossattn"]
    assert tokens.shape == (2, 6, 5) and conditions["y"].shape == (2, 7)
    assert torch.equal(tokens[1, :2], tokens[1, 2:4])
    assert torch.equal(tokens[1, :2], data.conditions[0]["c_crossattn"][0])
