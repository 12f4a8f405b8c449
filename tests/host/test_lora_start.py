"""Training on from a LoRA: each layer's rank, its targets, and the text encoder's part."""

import contextlib

import pytest
import torch

from quanttune.quant import QuantTuneError
from quanttune.tests.host import models
from quanttune.tests.host.lora_models import exported, random_layers
from quanttune.tests.host.test_lora_train import answer, distance, settings, stock_loaded, train

ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q",
             "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
"""What diffusers' own scripts put a LoRA on."""


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    with torch.inference_mode():
        yield


def pattern(include):
    return {"targets": "pattern below", "pattern": ",".join(f"{name}$" for name in include)}


def ranks_of(lora):
    return {k: v.shape[0] for k, v in lora.items() if k.endswith("lora_down.weight")}


@pytest.mark.parametrize("connected", [True, False], ids=["CLIP", "no CLIP"])
def test_a_text_encoder_that_does_not_train_keeps_its_part(connected, caplog):
    model, clip = models.small_model(), models.projecting_clip()
    _, start = exported(model, clip=clip, include=ATTENTION)
    text = {k: v for k, v in start.items() if k.startswith("lora_te")}
    assert text
    outcome = train(model, start=start, clip=clip if connected else None, **pattern(ATTENTION))
    assert outcome.lora.keys() == start.keys()
    assert all(torch.equal(outcome.lora[k], v) for k, v in text.items())
    assert any(not torch.equal(outcome.lora[k], start[k]) for k in start)
    assert f"{len(text) // 3} layers of the text encoder are those of" in outcome.report
    assert "connect a CLIP" not in caplog.text


def test_a_scaling_that_was_beside_the_file_is_kept_in_it():
    from quanttune.host.lora_file import LoraWeights
    from quanttune.host.lora_start import text_tensors

    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    given = {f"{layer}.lora_A.weight": torch.ones(4, 8), f"{layer}.lora_B.weight":
             torch.ones(8, 4), "unet.mid_block.to_q.lora_A.weight": torch.ones(4, 8)}
    config = {"lora_adapter_metadata": '{"text_encoder.r": 4, "text_encoder.lora_alpha": 2}'}
    found = text_tensors(LoraWeights(given, config))
    assert found.pop(f"{layer}.alpha").item() == 2
    assert found.keys() == {k for k in given if k.startswith("text")}
    assert text_tensors(LoraWeights(given)).keys() == found.keys()


@pytest.mark.parametrize("rslora", [False, True])
def test_layers_keep_the_rank_that_they_have(rslora):
    """As in LoCon files, whose convolutions have a rank of their own."""
    from quanttune.host.lora_file import LoraWeights
    from quanttune.host.lora_train import pupil

    model, linear, convolutions = models.small_model(), ATTENTION, ("in_layers.2", "out_layers.3")
    _, start = exported(model, include=linear, rank=4, alpha=4.0, amount=0.05)
    _, more = exported(model, include=convolutions, rank=6, alpha=1.0, seed=8, amount=0.05)
    start = LoraWeights({**start, **more})
    changes = {**pattern((*linear, *convolutions)), "rslora": rslora}
    with pupil(model, settings(**changes), start=start) as learner:
        learner.watch(learning=False)
        with torch.no_grad():
            ours = learner.denoiser.base.diffusion_model(**models.inputs(model),
                                                         transformer_options={}).clone()
    assert distance(answer(stock_loaded(model, start)), ours) < 2e-5
    outcome = train(model, start=start, **changes)
    assert ranks_of(outcome.lora) == ranks_of(start)
    assert "keep the rank that they have in 'the LoRA' (6)" in outcome.report
    with pytest.raises(QuantTuneError, match="has rank 4, but 5 is set; choose its rank"):
        train(model, start=start, name="other", **changes, rank=5)


@pytest.mark.parametrize("include,advice", [
    (ATTENTION, r"targets = 'pattern below' and the pattern 'to_k\$, to_out\\\.0\$, to_q\$, "),
    (("attn2.to_k", "attn2.to_v"), r"the pattern 'attn2\\\.to_k\$, attn2\\\.to_v\$'"),
    ((*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
     "choose targets = 'attention \\+ feed-forward'"),
])
def test_other_targets_are_answered_with_its_own(include, advice):
    model = models.small_model()
    start = exported(model, include=include)[1]
    with pytest.raises(QuantTuneError, match=advice) as caught:
        train(model, start=start)
    assert "\n" not in str(caught.value) and "such differences" in str(caught.value)
    words = str(caught.value).split("the pattern '")
    changes = {"targets": "pattern below", "pattern": words[1][:-2]} if len(words) > 1 else {
        "targets": "attention + feed-forward"}
    assert train(model, start=start, **changes).lora.keys() == start.keys()


def test_a_text_encoder_without_a_part_begins_anew():
    from quanttune.host.lora_train import pupil

    model, clip = models.small_model(), models.projecting_clip()
    start = exported(model, include=ATTENTION)[1]
    config = settings(train_text_encoder=True, **pattern(ATTENTION))
    with contextlib.ExitStack() as stack:
        learner = stack.enter_context(pupil(model, config, clip=clip, start=start))
        text = learner.learns["text_encoder"].export()
        assert text and not any(layer.up.any() for layer in text.values())
        unet = learner.learns["diffusion_model"].export()
    assert unet.keys() == {n.removeprefix("diffusion_model.")
                           for n in random_layers(model, include=ATTENTION)}
