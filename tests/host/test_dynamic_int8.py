"""Dynamic INT8 on a MODEL: error, clones, LoRA, scales, what it says and what it refuses."""

import pytest
import torch

from quanttune.tests.host import models
from quanttune.tests.host.models import quantize
from quanttune.tests.host.test_lora import lora_file, with_lora


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def needs_a_backend(integer_products):
    """For every test of a file."""


def fast(model, layers="all", precision="float32", **options):
    from quanttune.host.dynamic_int8 import dynamic_int8

    return dynamic_int8(model, layers, precision, **options)


def error(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


def integer_layers(patcher):
    """How many layers multiplied integers in the last forward."""
    return sum(m.int8 is not None for m in models_layers(patcher).values())


def models_layers(patcher):
    from quanttune.host.ops import scaled_layers

    return scaled_layers(patcher.model.diffusion_model)


@pytest.mark.parametrize("family", list(models.FAMILIES))
def test_a_float_model_becomes_one_of_integers(family):
    source = models.small_model(family)
    arguments = models.inputs(source)
    expected = models.forward(source, arguments)
    model, note = fast(source)
    assert error(models.forward(model, arguments), expected) < 0.06
    layers = models_layers(model)
    thin = {n for n, m in layers.items() if m.int8 is None}
    assert thin == {"input_blocks.0.0", "out.2"}, "all but the convolutions of 4 channels"
    assert f"{len(layers) - 2} of {len(layers)} layers multiply" in note and "oneDNN" in note
    assert models.relative(models.forward(source, arguments), expected) == 0, "source unchanged"


def test_the_starter_at_every_noise_level():
    """<= 3 % over a schedule, on latents as a sampler meets them."""
    import comfy.sample

    from quanttune.starter.load import load_starter

    model, clip, _ = load_starter()
    context = clip.encode_from_tokens(clip.tokenize("a red striped star on a blue background"),
                                      return_pooled=True)[0]
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = comfy.sample.sample(model, noise, 8, 1.0, "dpmpp_2m", "karras", [[context, {}]],
                                  [[context * 0, {}]], torch.zeros_like(noise), seed=0)
    latents = model.model.process_latent_in(latents)
    integers, _ = fast(model)
    difference = norm = 0.0
    for timestep in range(50, 1000, 100):
        sigma = model.model.model_sampling.sigma(torch.tensor(float(timestep)))
        x = (latents + noise * sigma) / (sigma**2 + 1) ** 0.5
        arguments = {"x": x, "timesteps": torch.tensor([float(timestep)]),
                     "context": context}
        expected = models.forward(model, arguments)
        difference += float((models.forward(integers, arguments) - expected).square().sum())
        norm += float(expected.square().sum())
    assert (difference / norm) ** 0.5 < 0.03


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_quantized_model_keeps_its_integers(bits):
    quantized, _ = quantize(models.small_model(), bits)
    arguments = models.inputs(quantized)
    expected = models.forward(quantized, arguments)
    model, _ = fast(quantized)
    assert models.quantized_model(model) is models.quantized_model(quantized)
    assert model.model is quantized.model, "one copy of the integers"
    assert error(models.forward(model, arguments), expected) < 0.06
    assert integer_layers(model) > 30
    assert models.relative(models.forward(quantized, arguments), expected) == 0
    assert integer_layers(quantized) == 0, "a clone without it is never touched"


def test_integers_are_prepared_once():
    model, _ = fast(models.small_model())
    arguments = models.inputs(model)
    first = models.forward(model, arguments)
    kept = {n: m.int8 for n, m in models_layers(model).items()}
    assert torch.equal(models.forward(model, arguments), first)
    assert all(m.int8 is kept[n] for n, m in models_layers(model).items())


@pytest.mark.parametrize("mixed", [False, True])
def test_scales_before_and_after(mixed):
    from quanttune.host.routing import apply_scale_set

    quantized, _ = quantize(models.small_model(), 8)
    scales = models.random_scales(quantized)
    arguments = models.inputs(quantized, (999.0, 10.0) if mixed else (600.0, 600.0))
    routed = apply_scale_set(quantized, scales, 1.0, "s")[0]
    expected = models.forward(routed, arguments)
    assert error(expected, models.forward(quantized, arguments)) > 0.15
    before = models.forward(fast(routed)[0], arguments)
    after = models.forward(apply_scale_set(fast(quantized)[0], scales, 1.0, "s")[0], arguments)
    assert error(before, expected) < 0.06
    assert torch.equal(before, after)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("base", ["float", "8", "4"])
def test_lora_before_and_after(order, base):
    source = models.small_model()
    if base != "float":
        source, _ = quantize(source, int(base))
    lora, arguments = lora_file(models.small_model()), models.inputs(source)
    expected = models.forward(with_lora(source, lora), arguments)
    without = models.forward(source, arguments)
    assert error(expected, without) > 0.15
    model = (fast(with_lora(source, lora))[0] if order == "before"
             else with_lora(fast(source)[0], lora))
    assert error(models.forward(model, arguments), expected) < 0.06
    assert integer_layers(model) > 30, "the patched layers multiply integers, too"
    if order == "after":
        assert error(models.forward(fast(source)[0], arguments), without) < 0.06


@pytest.mark.parametrize("base", [8, 4])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_a_faint_lora_is_not_rounded_away(base, scaled):
    from quanttune.host.routing import apply_scale_set

    source = models.small_model()
    model, _ = fast(quantize(source, base)[0])
    if scaled:
        model = apply_scale_set(model, models.random_scales(model, num_experts=2), 1.0, "s")[0]
    lora = lora_file(source)
    layers, x = models_layers(model), {}
    models.forward(model, models.inputs(model))
    before = {n: m.int8 for n, m in layers.items()}
    draw = torch.Generator().manual_seed(1)
    for name, module in layers.items():
        shape = (2, module.weight.shape[1]) + ((6, 6) if module.weight.dim() == 4 else ())
        x[name] = torch.randn(shape, generator=draw)
    plain = {n: m.int8(x[n], m.active_scales) for n, m in layers.items() if m.int8}
    models.forward(with_lora(model, lora, 0.02), models.inputs(model))
    changed = {n: m for n, m in layers.items() if m.low_rank is not None}
    assert len(changed) > 5 and all(m.int8 is not None for m in changed.values())
    for name, module in changed.items():
        assert module.int8 is before[name], "the integers wait for another LoRA"
        weight = module.low_rank.added_to(torch.zeros(module.weight.shape))
        scales, inputs = module.active_scales, x[name]
        if scales is not None:
            shape = (-1, scales.s_in.shape[1], *[1] * (inputs.dim() - 2))
            inputs = inputs * scales.s_in.view(shape)
        if weight.dim() == 4:
            expected = torch.nn.functional.conv2d(inputs, weight, None, module.stride,
                                                  module.padding)
        else:
            expected = inputs @ weight.t()
        if scales is not None:
            expected = expected * scales.r_out.view(-1, len(weight), *[1] * (expected.dim() - 2))
        effect = module.int8(x[name], scales) - plain[name]
        assert error(effect, expected) < 1e-3, name


@pytest.mark.parametrize("experts", [1, 2])
def test_a_lora_beside_a_split_shortcut(experts):
    from quanttune.quant import LayerScales, LowRank, QuantizedWeight, QuantSpec
    from quanttune.quant.int8 import ConvGeometry, Int8Layer
    from quanttune.quant.int8.reference import ReferenceBackend

    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 12, 1, 1, generator=draw)
    layer = Int8Layer(QuantizedWeight.quantize(weight, QuantSpec(8), split=4),
                      ConvGeometry((1, 1), (1, 1), (0, 0)), ReferenceBackend())
    x = torch.randn(2, 12, 5, 5, generator=draw)
    r_out = torch.rand(experts, 16, generator=draw) + 0.5
    s_in = torch.rand(experts, 12, generator=draw) + 0.5
    scales = LayerScales(r_out, s_in)
    plain = layer(x, None, scales)
    up, down = torch.randn(8, 3, generator=draw), torch.randn(3, 12, generator=draw)
    layer.low_rank = LowRank(up, down)
    expected = sum(
        torch.einsum("oi,nihw->nohw", (up @ down)[:, part],
                     (x * s_in[:, :, None, None])[:, part]) * r[:, :, None, None]
        for part, r in zip((slice(0, 4), slice(4, 12)), r_out.chunk(2, 1)))
    assert error(layer(x, None, scales) - plain, expected) < 1e-4


def test_another_lora_needs_no_preparation():
    quantized, _ = quantize(models.small_model(), 4)
    arguments = models.inputs(quantized)
    loras = [lora_file(quantized, seed=s, rank=16, include=("attn1.to_q", "in_layers.2"))
             for s in (5, 6)]
    expected = [models.forward(with_lora(quantized, lora), arguments) for lora in loras]
    assert error(*expected) > 0.15
    model, _ = fast(quantized)
    models.forward(model, arguments)
    before = {n: m.int8_ready for n, m in models_layers(model).items()}
    for lora, wanted in zip(loras, expected):
        patched = with_lora(model, lora)
        assert error(models.forward(patched, arguments), wanted) < 0.06
        assert {n: m.int8_ready for n, m in models_layers(patched).items()} == before


def test_a_bypass_lora():
    source = models.small_model()
    lora, arguments = lora_file(source), models.inputs(source)
    expected = models.forward(with_lora(source, lora), arguments)
    got = models.forward(with_lora(fast(source)[0], lora, bypass=True), arguments)
    assert error(got, expected) < 0.06


@pytest.mark.parametrize("layers,kind", [("convolutions", torch.nn.Conv2d),
                                         ("all but first, last and time", None),
                                         ("all but time embedding", None)])
@pytest.mark.parametrize("base", ["float", "8"])
def test_layers_that_stay_out(layers, kind, base):
    source = models.small_model()
    if base != "float":
        source, _ = quantize(source, 8)
    arguments = models.inputs(source)
    expected = models.forward(source, arguments)
    model, _ = fast(source, layers)
    assert error(models.forward(model, arguments), expected) < 0.06
    active = {n: m for n, m in models_layers(model).items() if m.int8 is not None}
    assert active
    if kind is not None:
        assert all(isinstance(m, kind) for m in active.values())
    else:
        assert not any("emb" in n for n in active)


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_granularity(granularity):
    from quanttune.quant.int8 import Granularity

    source = models.small_model()
    arguments = models.inputs(source)
    model, _ = fast(source, granularity=granularity)
    assert error(models.forward(model, arguments), models.forward(source, arguments)) < 0.06
    linear = models_layers(model)["time_embed.0"].int8.layer
    assert linear.granularity is Granularity(granularity)


@pytest.mark.parametrize("base", ["float", "8"])
def test_precision_reaches_a_real_sampler(base):
    """Sampled by the host: the MODEL computes in bfloat16 and the picture stays."""
    import comfy.sample

    source = models.small_model()
    if base != "float":
        source, _ = quantize(source, 8)
    model, _ = fast(source, precision="bfloat16")
    seen = set()
    layer = models_layers(model)["input_blocks.1.0.in_layers.2"]
    hook = layer.register_forward_pre_hook(lambda m, args: seen.add(args[0].dtype))
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    context = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(1))

    def sampled(patcher):
        return comfy.sample.sample(patcher, noise, 4, 1.0, "euler", "normal", [[context, {}]],
                                   [[context, {}]], torch.zeros_like(noise), seed=0)

    got = sampled(model)
    # A second one of the same base, made while the first is loaded, as of another graph.
    again, _ = fast(source, precision="bfloat16")
    assert torch.equal(sampled(again), got)
    hook.remove()
    assert seen == {torch.bfloat16}
    assert error(got, sampled(source)) < 0.15


def test_fast_attention_only_where_the_host_has_a_slow_one(monkeypatch):
    from comfy.ldm.modules import attention

    from quanttune.host import dynamic_int8

    key = "optimized_attention_override"
    for slow in (True, False):
        monkeypatch.setattr(dynamic_int8, "optimized_attention", attention.attention_sub_quad
                            if slow else attention.attention_pytorch)
        model, note = fast(models.small_model())
        assert (key in model.model_options["transformer_options"]) is slow
        assert ("Attention" in note) is slow
        assert key not in fast(models.small_model(), fast_attention=False)[0].model_options[
            "transformer_options"]
    monkeypatch.setattr(dynamic_int8, "optimized_attention", attention.attention_sub_quad)
    own = models.small_model()
    own.model_options["transformer_options"][key] = attention.attention_pytorch
    assert fast(own)[0].model_options["transformer_options"][key] is attention.attention_pytorch


def test_attention_is_the_same(monkeypatch):
    from comfy.ldm.modules import attention

    from quanttune.host import dynamic_int8

    monkeypatch.setattr(dynamic_int8, "optimized_attention", attention.attention_sub_quad)
    source = models.small_model()
    arguments = models.inputs(source)
    quick, plain = (models.forward(fast(source, fast_attention=on)[0], arguments)
                    for on in (True, False))
    assert error(quick, plain) < 0.02


def test_it_can_be_saved_and_asked_for_again(host_folders):
    from quanttune.host.build import load_model
    from quanttune.host.save import save_model

    model, _ = fast(models.small_model())
    arguments = models.inputs(model)
    expected = models.forward(model, arguments)
    again, note = fast(model)
    assert torch.equal(models.forward(again, arguments), expected)
    assert "layers multiply integers" in note
    path, _ = save_model(model, "m")
    loaded, _ = fast(load_model(path))
    assert torch.equal(models.forward(loaded, arguments), expected)


def test_weights_stay_where_they_are_multiplied(monkeypatch):
    """Dynamic VRAM, which needs a card, would keep them elsewhere: both ways in avoid it."""
    import comfy.model_patcher

    from quanttune.tests.host.models import quantize

    class Streaming(comfy.model_patcher.ModelPatcher):
        def is_dynamic(self):
            return True

    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Streaming)
    source = models.small_model()
    assert source.is_dynamic()
    quantized, _ = quantize(source, 8)
    assert quantized.is_dynamic()
    for given in (source, quantized):
        model, _ = fast(given)
        assert not model.is_dynamic()
        models.forward(model, models.inputs(model))
        assert integer_layers(model) > 100


def test_without_a_backend_it_says_so_and_computes_in_float(monkeypatch, caplog):
    from quanttune.host import int8

    monkeypatch.setattr(int8, "BACKENDS", [])
    source = models.small_model()
    arguments = models.inputs(source)
    model, note = fast(source)
    assert "not available" in note and "no time" in caplog.text
    assert error(models.forward(model, arguments), models.forward(source, arguments)) < 0.03
    assert integer_layers(model) == 0


def test_an_activation_without_range_stops_with_a_sentence():
    from quanttune.quant import QuantTuneError

    model, _ = fast(models.small_model())
    arguments = models.inputs(model)
    arguments["context"] = arguments["context"] * float("nan")
    with pytest.raises(QuantTuneError, match="NaN or infinite"):
        models.forward(model, arguments)


def test_nothing_left_to_do_is_an_error():
    from quanttune.quant import QuantTuneError

    source = models.small_model()
    quantized, _ = quantize(source, 8, keep="*.in_layers.*, *.out_layers.*, *skip*, *proj*, *.op, "
                                            "*.conv, input_blocks.0.0, out.2")
    for layers, message in (("convolutions", "No layer"), ("most", "has to be one of")):
        with pytest.raises(QuantTuneError, match=message):
            fast(quantized, layers)
    with pytest.raises(QuantTuneError, match="precision"):
        fast(source, precision="float64")


def test_compiles_once_for_all_timesteps_and_experts():
    """In blocks, as the stock compile node can be told to; no graph break in a block."""
    from comfy.ldm.modules.attention import SpatialTransformer
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    from quanttune.host.routing import apply_scale_set

    quantized, _ = quantize(models.small_model(), 8)
    model = apply_scale_set(fast(quantized)[0], models.random_scales(quantized), 1.0, "s")[0]
    timesteps = [(t, t) for t in (999.0, 700.0, 400.0, 100.0, 50.0)]
    expected = [models.forward(model, models.inputs(model, t)) for t in timesteps]
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    blocks = [m for m in model.model.diffusion_model.middle_block
              if isinstance(m, (ResBlock, SpatialTransformer))]
    assert len(blocks) == 3
    torch._dynamo.reset()
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)
    models.forward(model, models.inputs(model, timesteps[0]))
    after_first = len(compiled)
    for t, wanted in zip(timesteps, expected):
        assert error(models.forward(model, models.inputs(model, t)), wanted) < 0.06
    assert after_first <= len(blocks)
    assert len(compiled) == after_first, "another timestep or expert needs no compilation"
