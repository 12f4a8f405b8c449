"""Effective weights: floats, integers, scales, LoRA; and the node that compares two models."""

import pytest
import torch

from quanttune.tests.harness.inprocess import pack_nodes, run_node
from quanttune.tests.host import models
from quanttune.tests.host.models import quantize


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


def weights(model, timestep=0.0):
    from quanttune.host.weight_change import effective_weights

    return {n: read() for n, read in effective_weights(model, timestep).items()}


def test_a_model_computes_with_its_effective_weights():
    """A float model with those weights gives the same output, scales included."""
    from quanttune.host.routing import apply_scale_set

    quantized, _ = quantize(models.small_model())
    routed, _ = apply_scale_set(quantized, models.random_scales(quantized), 1.0, "s")
    arguments = models.inputs(quantized, timesteps=(600.0, 610.0))
    expected = models.forward(routed, arguments)
    copy = models.dequantized_copy(quantized)
    state = copy.model.diffusion_model.state_dict()
    state.update({f"{n}.weight": w for n, w in weights(routed, 600.0).items()})
    copy.model.diffusion_model.load_state_dict(state)
    assert models.relative(models.forward(copy, arguments), expected) < 1e-4


def test_patches_count():
    model = models.small_model()
    key = "diffusion_model.out.2.weight"
    patched = model.clone()
    patched.add_patches({key: ("diff", (torch.ones(4, 32, 3, 3),))}, 0.5)
    plain, changed = weights(model), weights(patched)
    assert torch.allclose(changed["out.2"], plain["out.2"] + 0.5, atol=1e-6)
    assert torch.equal(changed["input_blocks.0.0"], plain["input_blocks.0.0"])


def test_the_node_finds_the_layer_that_changed_most():
    from quanttune.host.routing import apply_scale_set
    from quanttune.quant import LayerScales, ScaleSet

    quantized, _ = quantize(models.small_model())
    r_out = torch.full((1, 4), 1.5)
    scales = ScaleSet({"out.2": LayerScales(r_out)}, 1)
    routed, _ = apply_scale_set(quantized, scales, 1.0, "s")
    node = pack_nodes()["QuantTuneWeightChangeMap"]
    picture, boxes, table = run_node(node, base=quantized, tuned=routed).args
    assert table.splitlines()[1].split() == ["out.2", "50", "50"]
    assert picture.shape[0] == boxes.shape[0] == 1 and picture.shape[-1] == 3
    one = run_node(node, base=quantized, tuned=routed, layer="out.2").args[2]
    assert len(one.splitlines()) == 2


@pytest.mark.parametrize("layer,match", [("out.22", "similar ones are out.2"), ("?", "no layer")])
def test_a_layer_that_is_not_there(layer, match):
    from quanttune.quant import QuantTuneError

    model = models.small_model()
    with pytest.raises(QuantTuneError, match=match):
        run_node(pack_nodes()["QuantTuneWeightChangeMap"], base=model, tuned=model, layer=layer)


def test_models_of_different_architecture():
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match="one architecture"):
        run_node(pack_nodes()["QuantTuneWeightChangeMap"], base=models.small_model(),
                 tuned=models.small_model("SDXL"))
