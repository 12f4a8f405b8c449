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
        if not name.endswith(include) or not hasattr(module, "weight"):
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


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("budget", [None, 100_000, 1])
def test_equal_to_the_lora_on_the_dequantized_float_model(bits, budget):
    quantized, _ = quantize(models.small_model(), bits)
    reference = models.dequantized_copy(quantized)
    lora = lora_file(reference)
    arguments = models.inputs(quantized)
    expected = models.forward(with_lora(reference, lora), arguments)
    base = models.forward(quantized, arguments)
    got = loaded_forward(with_lora(quantized, lora), arguments, budget)
    assert models.relative(got, base) > 1e-2
    assert models.relative(got, expected) < 1e-5


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
