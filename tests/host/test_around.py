"""Scales on bases that are not ours: float, half and fp8 weights, with LoRAs, clones and hooks."""

import pytest
import torch

from quanttune.tests.host import models
from quanttune.tests.host.models import quantize
from quanttune.tests.host.test_lora import lora_file, with_lora
from quanttune.tests.host.test_routing import apply, materialised


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


def twins(family="SD15", **options):
    """A quantized MODEL and the float one of the same weights."""
    quantized, _ = quantize(models.small_model(family), **options)
    return quantized, models.dequantized_copy(quantized, family)


@pytest.mark.parametrize("family", list(models.FAMILIES))
@pytest.mark.parametrize("timesteps", [(700.0, 700.0), (999.0, 10.0, 600.0)])
def test_float_with_the_same_weights_gives_what_the_integers_give(family, timesteps):
    quantized, floats = twins(family)
    scales = models.random_scales(quantized)
    arguments = models.inputs(quantized, timesteps)
    expected = models.forward(apply(quantized, scales), arguments)
    assert models.relative(models.forward(apply(floats, scales), arguments), expected) < 1e-5
    assert models.relative(models.forward(floats, arguments), expected) > 1e-3


@pytest.mark.parametrize("split,keep", [(False, "none"), (True, "*skip_connection")])
def test_scales_of_two_parts_act_on_layers_of_one_and_the_other_way_round(split, keep):
    both, floats = twins()
    one, _ = quantize(floats, split_shortcuts=split, keep=keep)
    arguments = models.inputs(both)
    scales = models.random_scales(both)
    wide = {n for n, p in scales.layers.items() if n.endswith("skip_connection")
            and p.r_out.shape[1] == 2 * models.random_scales(one).layers[n].r_out.shape[1]}
    assert wide
    on_float = models.forward(apply(models.dequantized_copy(one), scales), arguments)
    assert models.relative(models.forward(apply(one, scales), arguments), on_float) < 1e-5
    narrow = models.random_scales(one)
    expected = models.forward(apply(floats, narrow), arguments)
    assert models.relative(models.forward(apply(both, narrow), arguments), expected) < 1e-5
    # The model goes on as it was.
    assert models.relative(models.forward(one, arguments), on_float) > 1e-3
    chained = apply(apply(one, narrow, 0.5), scales, 0.5)
    swapped = apply(apply(one, scales, 0.5), narrow, 0.5)
    assert models.relative(models.forward(chained, arguments),
                           models.forward(swapped, arguments)) < 1e-5


def test_clones_without_scales_are_not_touched():
    quantized, floats = twins()
    arguments = models.inputs(quantized, (700.0, 700.0))
    base = models.forward(floats, arguments)
    first = apply(floats, models.random_scales(quantized, seed=1))
    second = apply(floats, models.random_scales(quantized, seed=2))
    a, b = models.forward(first, arguments), models.forward(second, arguments)
    assert models.relative(a, base) > 1e-3 and models.relative(a, b) > 1e-3
    assert torch.equal(models.forward(floats, arguments), base)
    assert torch.equal(models.forward(first.clone(), arguments), a)
    assert torch.equal(models.forward(apply(first, models.random_scales(quantized), 0.0),
                                      arguments), a)
    assert first.model is floats.model


@pytest.mark.parametrize("strength", [0.0, 0.5, -1.0])
def test_strength(strength):
    quantized, floats = twins()
    scales = models.random_scales(quantized)
    arguments = models.inputs(quantized, (700.0, 700.0))
    expected = models.forward(materialised(quantized, scales, 2, strength), arguments)
    assert models.relative(models.forward(apply(floats, scales, strength), arguments),
                           expected) < 1e-5


@pytest.mark.parametrize("kept,tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2),
                                            (torch.float8_e4m3fn, 0.2)])
def test_weights_kept_in_less_than_float32(kept, tolerance):
    quantized, floats = twins()
    scales = models.random_scales(quantized)
    model = models.small_model(kept=kept)
    with torch.no_grad():
        model.model.diffusion_model.load_state_dict(floats.model.diffusion_model.state_dict())
    arguments = models.inputs(quantized, (700.0, 700.0))
    change = models.forward(apply(floats, scales), arguments) - models.forward(floats, arguments)
    got = models.forward(apply(model, scales), arguments) - models.forward(model, arguments)
    assert next(model.model.diffusion_model.parameters()).dtype == kept
    assert models.relative(got, change) < tolerance


@pytest.mark.parametrize("dtype,scale", [(torch.float16, 1.001), (torch.bfloat16, 1.01)])
def test_activations_in_half_precision_keep_a_faint_scale(dtype, scale):
    import comfy.ops

    from quanttune.host.around import put_around, set_scales
    from quanttune.quant import LayerScales

    generator = torch.Generator().manual_seed(0)
    layer = comfy.ops.manual_cast.Linear(64, 8, dtype=torch.float32, device="cpu")
    layer.weight.copy_(torch.rand(8, 64, generator=generator) / 32)
    layer.bias.copy_(torch.randn(8, generator=generator))
    put_around("layer", layer, None)
    x = torch.rand(4096, 64, generator=generator) * 4 * torch.rand(4096, 1, generator=generator)
    x = x.to(dtype)
    base = layer(x)
    for r_out, s_in, factor in ((scale, 1.0, scale), (1.0, scale, scale), (scale, scale, scale**2)):
        set_scales(layer, LayerScales(torch.full((1, 8), r_out), torch.full((1, 64), s_in)))
        change = (layer(x).float() - base.float()).mean()
        expected = (x.float() @ layer.weight.T).mean() * (factor - 1)
        assert abs(change / expected - 1) < 0.1


class TestLora:
    def test_stock(self):
        quantized, floats = twins()
        lora, scales = lora_file(floats), models.random_scales(quantized)
        arguments = models.inputs(quantized)
        expected = models.forward(with_lora(apply(quantized, scales), lora), arguments)
        for patched in (with_lora(apply(floats, scales), lora),
                        apply(with_lora(floats, lora), scales)):
            assert models.relative(models.forward(patched, arguments), expected) < 1e-5
        assert models.relative(models.forward(apply(floats, scales), arguments), expected) > 1e-3

    def test_bypass_is_scaled_as_what_it_stands_for(self):
        quantized, floats = twins()
        lora, scales = lora_file(floats), models.random_scales(quantized)
        arguments = models.inputs(quantized)
        expected = models.forward(with_lora(apply(floats, scales), lora), arguments)
        base = models.forward(floats, arguments)
        for patched in (with_lora(apply(floats, scales), lora, bypass=True),
                        apply(with_lora(floats, lora, bypass=True), scales)):
            assert models.relative(models.forward(patched, arguments), expected) < 1e-5
            patched.detach()
        assert torch.equal(models.forward(floats, arguments), base)

    def test_a_patched_bias(self):
        quantized, floats = twins()
        scales = models.random_scales(quantized)
        arguments = models.inputs(quantized)
        patched = apply(floats, scales)
        diff = torch.randn(4, generator=torch.Generator().manual_seed(1))
        patched.add_patches({"diffusion_model.out.2.bias": ("diff", (diff,))})
        got = models.forward(patched, arguments) - models.forward(apply(floats, scales), arguments)
        assert models.relative(got, diff.view(1, -1, 1, 1).expand_as(got)) < 1e-4


def test_partly_loaded(monkeypatch):
    import comfy.model_management as mm

    quantized, floats = twins()
    lora, scales = lora_file(floats), models.random_scales(quantized)
    arguments = models.inputs(quantized)
    expected = models.forward(with_lora(apply(quantized, scales), lora), arguments)
    patched = with_lora(apply(floats, scales), lora)
    diff = torch.randn(4, generator=torch.Generator().manual_seed(1))
    patched.add_patches({"diffusion_model.out.2.bias": ("diff", (diff,))})
    mm.load_models_gpu([floats])
    floats.detach()
    patched.load(patched.load_device, lowvram_model_memory=1, force_patch_weights=False)
    last = patched.model.diffusion_model.out[2]
    assert last.weight_function or last.bias_function
    got = models.forward(patched, arguments, load=False)
    patched.detach()
    assert models.relative(got - diff.view(1, -1, 1, 1), expected) < 1e-5


def test_quantizing_a_scaled_model_keeps_the_scales():
    from quanttune.host.dynamic_int8 import dynamic_int8

    quantized, floats = twins()
    scales = models.random_scales(quantized)
    arguments = models.inputs(quantized)
    scaled = apply(floats, scales)
    for kept in (True, False):
        late = apply(quantize(floats, 8, split_shortcuts=kept)[0], scales)
        early = quantize(scaled, 8, split_shortcuts=kept)[0]
        expected = models.forward(late, arguments)
        assert models.relative(models.forward(early, arguments), expected) < 1e-6
    integers = dynamic_int8(scaled, precision="float32")[0]
    assert models.relative(models.forward(integers, arguments), expected) < 0.1
    assert models.relative(models.forward(integers, arguments),
                           models.forward(floats, arguments)) > 0.1


def test_a_model_that_a_node_built_anew_is_scaled_too():
    from quanttune.host.routing import OPTION

    quantized, floats = twins()
    scaled = apply(floats, models.random_scales(quantized))
    fresh = models.dequantized_copy(quantized)
    rebuilt = scaled.clone(model_override=fresh.get_clone_model_override())
    assert OPTION in rebuilt.model_options["transformer_options"]
    arguments = models.inputs(quantized)

    def applied(patcher):
        import comfy.model_management

        comfy.model_management.load_models_gpu([patcher])
        return patcher.model.apply_model(
            arguments["x"], torch.tensor([5.0, 0.5]), c_crossattn=arguments["context"],
            transformer_options=patcher.model_options["transformer_options"])

    assert models.relative(applied(rebuilt), applied(scaled)) < 1e-6
    assert models.relative(applied(fresh), applied(scaled)) > 1e-3


def test_it_compiles():
    from comfy.ldm.modules.attention import SpatialTransformer

    from quanttune.host.dynamic_int8 import use_pytorch_attention

    quantized, floats = twins()
    scaled = apply(floats, models.random_scales(quantized))
    scaled.model_options["transformer_options"]["optimized_attention_override"] = (
        use_pytorch_attention)
    inputs = [models.inputs(quantized, t) for t in ((600.0, 600.0), (999.0, 10.0))]
    expected = [models.forward(scaled, i) for i in inputs]
    torch._dynamo.reset()
    blocks = list(scaled.model.diffusion_model.middle_block)[:2]
    assert isinstance(blocks[1], SpatialTransformer)
    for block in blocks:
        block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
    for i, wanted in zip(inputs, expected):
        assert models.relative(models.forward(scaled, i), wanted) < 1e-5


def test_gradients_pass_through():
    quantized, floats = twins()
    scaled = apply(floats, models.random_scales(quantized))
    arguments = models.inputs(quantized)
    with torch.inference_mode(False), torch.enable_grad():
        copy = models.dequantized_copy(quantized)
        scaled = apply(copy, models.random_scales(quantized))
        arguments = {k: v.clone() for k, v in arguments.items()}
        arguments["x"].requires_grad_(True)
        models.forward(scaled, arguments).square().sum().backward()
        assert arguments["x"].grad.abs().sum() > 0


class TestBadInput:
    def test_another_family(self):
        from quanttune.quant import QuantTuneError

        large, _ = quantize(models.small_model("SDXL"))
        with pytest.raises(QuantTuneError, match=r"'subject.safetensors' does not fit.*base"):
            apply(models.small_model("SD15"), models.random_scales(large))

    def test_half_the_channels_are_no_part_of_a_layer_of_one(self):
        from dataclasses import replace

        from quanttune.quant import QuantTuneError

        quantized, floats = twins()
        scales = models.random_scales(quantized)
        pair = scales.layers["out.2"]
        layers = {**scales.layers, "out.2": replace(pair, r_out=pair.r_out[:, ::2].contiguous())}
        for model in (floats, quantized):
            with pytest.raises(QuantTuneError, match=r"2 output scales for layer out\.2.*needs 4"):
                apply(model, replace(scales, layers=layers))

    def test_notes(self):
        from quanttune.host.routing import apply_scale_set
        from quanttune.quant import ScaleSet

        quantized, floats = twins()
        full = models.random_scales(quantized, bits=4, base_name="cat")
        some = ScaleSet(dict(list(full.layers.items())[:3]), 4, metadata=full.metadata)
        _, notes = apply_scale_set(floats, some, 1.0, "s")
        assert "base of 4 bits (cat)" in notes[0] and "close" in notes[0]
        assert "no scales for" in notes[1]

    def test_a_model_without_layers(self):
        from quanttune.quant import QuantTuneError

        quantized, floats = twins()
        scales = models.random_scales(quantized)
        floats.model.diffusion_model = torch.nn.Identity()
        with pytest.raises(QuantTuneError, match="of which this MODEL has none"):
            apply(floats, scales)
