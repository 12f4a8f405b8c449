"""Stock LoRAs on packed weights: equal to float, whichever way the host loads the model."""

import pytest
import torch

from quanttune.tests.host import models
from quanttune.tests.host.models import quantize


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


def lora_file(model, rank=4, seed=5, include=("attn1.to_q", "proj_in", "in_layers.2")):
    """A LoRA in the keys stock loaders read, for Linear, 1x1 and 3x3 convolutions."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in model.model.diffusion_model.named_modules():
        if not name.endswith(include) or getattr(module, "weight", torch.empty(0)).dim() < 2:
            continue
        out, inputs, *kernel = module.weight.shape
        key = f"diffusion_model.{name}"
        state[f"{key}.lora_up.weight"] = torch.randn(out, rank, *[1] * len(kernel),
                                                     generator=generator) * 0.2
        state[f"{key}.lora_down.weight"] = torch.randn(rank, inputs, *kernel,
                                                       generator=generator) * 0.2
        state[f"{key}.alpha"] = torch.tensor(float(rank))
    assert len(state) > 20
    return state


def terms(patcher):
    """Layer name to the low-rank term of every layer that has one."""
    from quanttune.host.ops import scaled_layers

    layers = scaled_layers(patcher.model.diffusion_model)
    return {n: m.low_rank for n, m in layers.items() if m.low_rank is not None}


def functions(patcher):
    """Names of the layers whose weight the host's own functions patch."""
    from quanttune.host.ops import scaled_layers

    layers = scaled_layers(patcher.model.diffusion_model)
    return {n for n, m in layers.items() if m.weight_function}


def as_weight_functions(patcher):
    """Make a loaded MODEL apply its patches as the host itself does under partial loading."""
    from comfy.model_patcher import LowVramPatch

    from quanttune.host.ops import scaled_layers

    for name, module in scaled_layers(patcher.model).items():
        if module.low_rank is not None:
            module.low_rank = None
            module.weight_function = [LowVramPatch(f"{name}.weight", patcher.patches)]
    assert functions(patcher) and not terms(patcher)


def with_lora(model, lora, strength=0.7, bypass=False):
    import comfy.sd

    loader = comfy.sd.load_bypass_lora_for_models if bypass else comfy.sd.load_lora_for_models
    return loader(model, None, lora, strength, 0.0)[0]


def loaded_forward(patcher, arguments, budget):
    """Forward with everything loaded (budget None) or only ``budget`` bytes of weights."""
    if budget is None:
        return models.forward(patcher, arguments)
    patcher.patch_model(patcher.load_device, lowvram_model_memory=budget)
    try:
        return models.forward(patcher, arguments, load=False)
    finally:
        patcher.detach()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("budget", [None, 100_000, 1])
def test_equal_to_the_lora_on_the_dequantized_float_model(bits, budget):
    quantized, _ = quantize(models.small_model(), bits)
    reference = models.dequantized_copy(quantized)
    lora = lora_file(reference)
    arguments = models.inputs(quantized)
    expected = models.forward(with_lora(reference, lora), arguments)
    base = models.forward(quantized, arguments)
    patched = with_lora(quantized, lora)
    got = loaded_forward(patched, arguments, budget)
    assert models.relative(got, base) > 1e-2
    assert models.relative(got, expected) < 1e-5
    if budget is None:
        assert len(terms(patched)) == len(lora) // 3 and not functions(patched)
    else:
        assert not terms(patched), "nothing is left when it is unloaded"


@pytest.mark.parametrize("family", list(models.FAMILIES))
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("timesteps", [(600.0, 600.0), (999.0, 10.0)])
def test_with_scales_it_equals_the_host_s_weight_function(family, split, timesteps):
    """On every layer, for one expert and for a batch of two."""
    from quanttune.host.routing import apply_scale_set

    quantized, _ = quantize(models.small_model(family), split_shortcuts=split)
    assert any(w.split for w in models.quantized_model(quantized).checkpoint.layers.values()
               ) == split
    patched = with_lora(quantized, lora_file(quantized, include=("",)))
    routed = apply_scale_set(patched, models.random_scales(quantized), 1.0, "s")[0]
    arguments = models.inputs(quantized, timesteps)
    for model in (patched, routed):
        got = models.forward(model, arguments)
        assert len(terms(model)) == len(models.quantized_model(quantized).checkpoint.layers)
        as_weight_functions(model)
        expected = models.forward(model, arguments, load=False)
        model.detach()
        assert models.relative(got, expected) < 1e-5


def test_several_loras_of_any_strength():
    quantized, _ = quantize(models.small_model())
    reference = models.dequantized_copy(quantized)
    arguments = models.inputs(quantized)
    loras = [(lora_file(reference), 0.7), (lora_file(reference, rank=2, seed=6), -0.4),
             (lora_file(reference, seed=7), 0.0),
             (lora_file(reference, rank=3, seed=8, include=("attn2.to_k", "proj_in")), 1.3)]
    ours, theirs = quantized, reference
    for lora, strength in loras:
        ours, theirs = with_lora(ours, lora, strength), with_lora(theirs, lora, strength)
    got = models.forward(ours, arguments)
    assert models.relative(got, models.forward(theirs, arguments)) < 1e-5
    ranks = {n: t.rank for n, t in terms(ours).items()}
    assert {4 + 2, 4 + 2 + 3, 3} == set(ranks.values()), "strength 0 costs nothing"
    nothing = with_lora(quantized, loras[0][0], 0.0)
    assert torch.equal(models.forward(nothing, arguments), models.forward(quantized, arguments))


def special(kind, lora):
    """``lora`` with a third of its layers turned into something that is no plain LoRA."""
    changed, generator = dict(lora), torch.Generator().manual_seed(11)
    names = [k.removesuffix(".alpha") for k in lora if k.endswith(".alpha")][::3]
    for name in names:
        up, down = lora[f"{name}.lora_up.weight"], lora[f"{name}.lora_down.weight"]
        rank, out = len(down), len(up)
        if kind == "DoRA":
            ones = [1] * (down.dim() - 1)
            changed[f"{name}.dora_scale"] = 1 + torch.rand(1, down.shape[1], *ones[1:],
                                                           generator=generator)
        elif kind == "LoHa":
            del changed[f"{name}.lora_up.weight"], changed[f"{name}.lora_down.weight"]
            for half in "12":
                changed[f"{name}.hada_w{half}_a"] = torch.randn(out, rank, generator=generator)
                changed[f"{name}.hada_w{half}_b"] = 0.1 * torch.randn(
                    rank, down[0].numel(), generator=generator)
        elif kind == "Tucker" and down.dim() == 4:
            changed[f"{name}.lora_mid.weight"] = torch.randn(rank, rank, *down.shape[2:],
                                                             generator=generator)
            changed[f"{name}.lora_down.weight"] = down[:, :, :1, :1].contiguous()
    return changed, names


@pytest.mark.parametrize("kind", ["DoRA", "LoHa", "Tucker"])
@pytest.mark.parametrize("budget", [None, 100_000])
def test_what_is_no_plain_lora_acts_as_on_float(kind, budget):
    quantized, _ = quantize(models.small_model())
    reference = models.dequantized_copy(quantized)
    plain = lora_file(reference)
    lora, names = special(kind, plain)
    arguments = models.inputs(quantized)
    patched = with_lora(quantized, lora)
    got = loaded_forward(patched, arguments, budget)
    expected = models.forward(with_lora(reference, lora), arguments)
    assert models.relative(got, expected) < 1e-5
    assert models.relative(models.forward(with_lora(quantized, plain), arguments), got) > 1e-3
    models.forward(patched, arguments)
    changed = {n.removeprefix("diffusion_model.") for n in names if any(
        key.startswith(f"{n}.") and key not in plain for key in lora)}
    assert changed and functions(patched) == changed
    assert len(terms(patched)) == len(plain) // 3 - len(changed)


def test_a_lora_under_another_patch_is_added_in_the_host_s_order():
    quantized, _ = quantize(models.small_model())
    reference = models.dequantized_copy(quantized)
    lora, arguments = lora_file(reference), models.inputs(quantized)
    key = "diffusion_model.input_blocks.1.0.in_layers.2.weight"
    diff = ("diff", (torch.ones(reference.model.diffusion_model.input_blocks[1][0]
                                .in_layers[2].weight.shape) * 0.05,))
    outputs = []
    for model in (quantized, reference):
        patched = with_lora(model, lora)
        patched.add_patches({key: diff}, 1.0, 0.5)
        outputs.append(models.forward(patched, arguments))
    assert models.relative(*outputs) < 1e-5


@pytest.mark.parametrize("broken", ["shape", "nan"])
def test_a_broken_lora_does_what_it_does_to_float(broken, caplog):
    """The host says that a LoRA of another shape cannot be added and goes on without it."""
    quantized, _ = quantize(models.small_model())
    reference = models.dequantized_copy(quantized)
    lora = lora_file(reference)
    key = next(k for k in lora if k.endswith("lora_down.weight"))
    lora[key] = torch.cat([lora[key]] * 2, 1) if broken == "shape" else lora[key] * torch.nan
    outputs = [models.forward(with_lora(m, lora), models.inputs(quantized))
               for m in (quantized, reference)]
    if broken == "nan":
        assert all(out.isnan().any() for out in outputs)
    else:
        assert models.relative(*outputs) < 1e-5 and "ERROR lora" in caplog.text


def test_half_precision_is_as_good_as_the_host_s_weight_function():
    quantized, _ = quantize(models.small_model())
    reference = models.dequantized_copy(quantized)
    lora, arguments = lora_file(reference, include=("",)), models.inputs(quantized)
    expected = models.forward(with_lora(reference, lora), arguments)
    half, _ = quantize(models.small_model(), dtypes=(torch.bfloat16, None))
    patched = with_lora(half, lora)
    arguments = {k: v if k == "timesteps" else v.bfloat16() for k, v in arguments.items()}
    got = models.forward(patched, arguments).float()
    assert all(t.up.dtype == torch.bfloat16 for t in terms(patched).values())
    as_weight_functions(patched)
    before = models.forward(patched, arguments, load=False).float()
    assert torch.linalg.vector_norm(got - expected) < 1.1 * torch.linalg.vector_norm(
        before - expected) < 0.05 * torch.linalg.vector_norm(expected)


def test_terms_are_joined_once_and_follow_the_patches():
    quantized, _ = quantize(models.small_model())
    arguments = models.inputs(quantized)
    one = with_lora(quantized, lora_file(quantized))
    models.forward(one, arguments)
    first = terms(one)
    cpu = torch.device("cpu")
    one.partially_unload(cpu, 200_000)
    one.partially_load(cpu, 1 << 40)
    assert all(terms(one)[n] is t for n, t in first.items())
    models.forward(with_lora(one, lora_file(quantized, seed=9)), arguments)
    assert all(t.rank == 8 and first[n].rank == 4 for n, t in terms(one).items())
    models.forward(quantized, arguments)
    assert not terms(quantized)
    models.forward(one, arguments)
    one.detach()
    assert not terms(one)


@pytest.mark.parametrize("late", [False, True])
def test_who_asks_for_a_float_weight_gets_the_lora_too(late):
    """A wrapper of the weight sees it patched; a function that comes after the load does not, but
    what it returns is patched."""
    quantized, _ = quantize(models.small_model())
    reference = models.dequantized_copy(quantized)
    lora = lora_file(reference, include=("out.2", "attn1.to_q", "proj_in"))
    arguments = models.inputs(quantized)
    ours, theirs = with_lora(quantized, lora), with_lora(reference, lora)
    key = "diffusion_model.out.2.weight"
    if late:
        models.forward(ours, arguments)
        ours.model.diffusion_model.out[2].weight_function.append(lambda weight: weight * 2)
        once_more = reference.model.diffusion_model.out[2].weight.clone()
        theirs.add_patches({key: ("diff", (once_more,))})
    else:
        for model in (ours, theirs):
            model.add_weight_wrapper(key, lambda weight: weight * 2)
    expected = models.forward(theirs, arguments)
    assert models.relative(models.forward(ours, arguments, load=not late), expected) < 1e-5


def test_dynamic_loading_keeps_the_integers():
    """The host's streaming loader sets up its own patch, and bakes it into small layers."""
    from comfy.model_patcher import LowVramPatch

    from quanttune.host.lora import _unbake
    from quanttune.host.ops import scaled_layers

    quantized, _ = quantize(models.small_model())
    arguments, lora = models.inputs(quantized), lora_file(quantized)
    dora, _ = special("DoRA", lora)
    for file in (lora, dora):
        patched = with_lora(quantized, file)
        expected = models.forward(patched, arguments)
        patched.detach()
        for number, (name, module) in enumerate(scaled_layers(patched.model).items()):
            key = f"{name}.weight"
            module.weight_lowvram_function = LowVramPatch(key, patched.patches) if (
                key in patched.patches and number % 2) else None
            if number % 2 == 0:
                patched.patch_weight_to_device(key, torch.device("cpu"), force_cast=True)
        patched.is_dynamic = lambda: True
        _unbake(patched, torch.device("cpu"))
        layers = scaled_layers(patched.model).values()
        assert all(m.weight_lowvram_function is None for m in layers)
        assert models.relative(models.forward(patched, arguments, load=False), expected) < 1e-6
        del patched.is_dynamic
        patched.detach()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_on_top_of_a_lora(checkpointing):
    """Gradients of scales pass through layers with a term as through those of the host's way."""
    from quanttune.host.training import training_copy
    from quanttune.tests.host.test_training import arguments, step
    from quanttune.training.scales import TrainableScales

    quantized, _ = quantize(models.small_model())
    patched = with_lora(quantized, lora_file(quantized, include=("",)))
    x, conditions = arguments(quantized)
    found = []
    with training_copy(patched) as denoiser:
        scales = TrainableScales(denoiser.shapes, 2)
        for way in ("ours", "the host's"):
            if way == "the host's":
                as_weight_functions(denoiser.patcher)
            out, gradients = step(denoiser, scales, 1, x, conditions, checkpointing)
            found.append([out, *gradients])
    with training_copy(quantized) as denoiser:
        without, _ = step(denoiser, TrainableScales(denoiser.shapes, 2), 1, x, conditions)
    assert models.relative(found[0][0], without) > 1e-2
    for ours, theirs in zip(*found):
        assert models.relative(ours, theirs) < 1e-4


def test_blocks_compile_with_it():
    from comfy.ldm.modules.attention import SpatialTransformer
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    from quanttune.host.dynamic_int8 import use_pytorch_attention
    from quanttune.host.routing import apply_scale_set

    quantized, _ = quantize(models.small_model())
    patched = with_lora(quantized, lora_file(quantized, include=("",)))
    routed = apply_scale_set(patched, models.random_scales(quantized), 1.0, "s")[0]
    # The attention that the host takes on a processor asks for free memory as it goes.
    routed.model_options["transformer_options"]["optimized_attention_override"] = (
        use_pytorch_attention)
    inputs = [models.inputs(quantized, t) for t in ((600.0, 600.0), (999.0, 10.0))]
    expected = [models.forward(routed, i) for i in inputs]
    torch._dynamo.reset()
    blocks = list(routed.model.diffusion_model.middle_block)[:2]
    assert [type(b) for b in blocks] == [ResBlock, SpatialTransformer]
    for block in blocks:
        block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
    for i, wanted in zip(inputs, expected):
        assert models.relative(models.forward(routed, i), wanted) < 1e-5


def test_bypass_loader():
    quantized, _ = quantize(models.small_model())
    reference = models.dequantized_copy(quantized)
    lora = lora_file(reference)
    arguments = models.inputs(quantized)
    expected = models.forward(with_lora(reference, lora), arguments)
    got = models.forward(with_lora(quantized, lora, bypass=True), arguments)
    assert models.relative(got, expected) < 1e-5


def test_the_integers_survive_loading_changing_and_unloading():
    import comfy.model_management as mm

    quantized, _ = quantize(models.small_model())
    checkpoint = models.quantized_model(quantized).checkpoint
    before = {n: w.packed.clone() for n, w in checkpoint.layers.items()}
    arguments = models.inputs(quantized)
    base = models.forward(quantized, arguments)
    one = with_lora(quantized, lora_file(quantized))
    two = with_lora(one, lora_file(quantized, seed=9), -0.4)
    outputs = [models.forward(p, arguments) for p in (one, two, quantized, one)]
    assert torch.equal(outputs[0], outputs[3]) and torch.equal(outputs[2], base)
    assert models.relative(outputs[1], outputs[0]) > 1e-3
    mm.unload_all_models()
    assert torch.equal(models.forward(quantized, arguments), base)
    assert torch.equal(models.forward(two, arguments), outputs[1])
    for name, module in quantized.model.diffusion_model.named_modules():
        if name in before:
            assert torch.equal(module.weight._qdata, before[name])


def test_a_lora_keeps_no_float_copy_of_the_weights():
    from comfy.model_management import load_models_gpu, module_size

    quantized, _ = quantize(models.small_model())
    size = module_size(quantized.model)
    load_models_gpu([with_lora(quantized, lora_file(quantized))])
    assert module_size(quantized.model) == size


def test_together_with_scales():
    from quanttune.host.routing import apply_scale_set

    quantized, _ = quantize(models.small_model())
    scales = models.random_scales(quantized)
    lora = lora_file(quantized)
    arguments = models.inputs(quantized)
    a = with_lora(apply_scale_set(quantized, scales, 1.0, "s")[0], lora)
    b = apply_scale_set(with_lora(quantized, lora), scales, 1.0, "s")[0]
    first, second = models.forward(a, arguments), models.forward(b, arguments)
    assert torch.equal(first, second)
    assert models.relative(first, models.forward(with_lora(quantized, lora), arguments)) > 1e-3
    partly = loaded_forward(a, arguments, 100_000)
    assert models.relative(partly, first) < 1e-5


def test_partial_load_without_patches_changes_nothing():
    quantized, _ = quantize(models.small_model())
    arguments = models.inputs(quantized)
    whole = models.forward(quantized, arguments)
    assert models.relative(loaded_forward(quantized.clone(), arguments, 50_000), whole) < 1e-6
    assert torch.equal(models.forward(quantized, arguments), whole)


def test_merging_with_a_float_model_uses_the_true_weights():
    quantized, _ = quantize(models.small_model(), 8)
    other = models.small_model(seed=7)
    merged = quantized.clone()
    for key, patch in other.get_key_patches("diffusion_model.").items():
        merged.add_patches({key: patch}, 0.5, 0.5)
    reference = models.dequantized_copy(quantized).clone()
    for key, patch in other.get_key_patches("diffusion_model.").items():
        reference.add_patches({key: patch}, 0.5, 0.5)
    arguments = models.inputs(quantized)
    assert models.relative(models.forward(merged, arguments),
                           models.forward(reference, arguments)) < 1e-4


def test_scheduled_hooks_say_what_to_use_instead():
    import comfy.hooks

    from quanttune.quant import QuantTuneError

    quantized, _ = quantize(models.small_model())
    arguments = models.inputs(quantized)
    base = models.forward(quantized, arguments)
    hook = comfy.hooks.WeightHook(strength_model=1.0)
    hook.need_weight_init = False
    hook.weights = {"diffusion_model.out.2.weight": ("diff", (torch.ones(4, 32, 3, 3),))}
    group = comfy.hooks.HookGroup()
    group.add(hook)
    hooked = quantized.clone()
    hooked.register_all_hook_patches(
        group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    with pytest.raises(QuantTuneError, match="Load LoRA"):
        hooked.patch_hooks(group)
    hooked.clean_hooks()
    assert torch.equal(models.forward(quantized, arguments), base)


def test_weight_wrappers_and_a_lora_act_together():
    quantized, _ = quantize(models.small_model())
    key = "diffusion_model.out.2.weight"
    diff = ("diff", (torch.ones(4, 32, 3, 3) * 0.1,))
    arguments = models.inputs(quantized)
    patched = quantized.clone()
    patched.add_patches({key: diff})
    wrapped = patched.clone()
    wrapped.add_weight_wrapper(key, lambda weight: weight * 2)
    reference = models.dequantized_copy(quantized).clone()
    reference.add_patches({key: diff})
    reference.add_weight_wrapper(key, lambda weight: weight * 2)
    expected = models.forward(reference, arguments)
    assert models.relative(models.forward(wrapped, arguments), expected) < 1e-5


def test_a_lora_acts_once_however_the_host_moves_layers():
    quantized, _ = quantize(models.small_model())
    lora = lora_file(quantized)
    arguments = models.inputs(quantized)
    patched = with_lora(quantized, lora)
    whole = models.forward(patched, arguments)
    cpu = torch.device("cpu")
    patched.partially_unload(cpu, 200_000)
    assert models.relative(models.forward(patched, arguments, load=False), whole) < 1e-6
    patched.detach()
    for budget in (1, 100_000, 300_000):
        patched.patch_model(cpu, lowvram_model_memory=budget)
        patched.partially_load(cpu, 200_000)
        assert models.relative(models.forward(patched, arguments, load=False), whole) < 1e-6
        patched.partially_load(cpu, 1 << 40)
        assert models.relative(models.forward(patched, arguments, load=False), whole) < 1e-6
        patched.detach()


def test_a_bypass_lora_before_quantizing_is_refused():
    from quanttune.quant import QuantTuneError

    model = models.small_model()
    with pytest.raises(QuantTuneError, match="after 'Quantize UNet'"):
        quantize(with_lora(model, lora_file(model), bypass=True))
