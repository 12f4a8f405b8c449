"""MODELs with bitsandbytes' NF4, FP4 and LLM.int8 layers."""

import pytest
import torch

from quanttune.tests.host import models
from quanttune.tests.host.models import quantize
from quanttune.tests.host.test_lora import lora_file, with_lora
from quanttune.tests.host.test_routing import apply

bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


def made(model, kind="nf4", **options):
    from quanttune.host.bnb_quantize import quantize_bnb

    return quantize_bnb(model, kind, **options)


def by_the_library(weight, kind):
    """The floats that bitsandbytes' own layer stands for."""
    with torch.inference_mode(False):
        weight = weight.detach().clone()
        if kind == "int8":
            packed = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            packed = packed.to("cpu")
            return bnb.functional.int8_vectorwise_dequant(packed.data, packed.SCB).float()
        packed = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind,
                                   compress_statistics=False).to("cpu")
        return bnb.functional.dequantize_4bit(packed.data, packed.quant_state)


def twin_of(model, kind, family="SD15"):
    """The float MODEL with what bitsandbytes makes of the Linear weights of ``model``."""
    twin = models.small_model(family)
    unet = twin.model.diffusion_model
    unet.load_state_dict(model.model.diffusion_model.state_dict())
    for layer in unet.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.copy_(by_the_library(layer.weight, kind).view(layer.weight.shape))
    return twin


@pytest.mark.parametrize("family", list(models.FAMILIES))
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_the_forward_is_that_of_the_librarys_own_numbers(family, kind):
    source = models.small_model(family)
    arguments = models.inputs(source)
    packed, report = made(source, kind)
    got = models.forward(packed, arguments)
    assert models.relative(got, models.forward(twin_of(source, kind, family), arguments)) < 1e-5
    assert models.relative(got, models.forward(source, arguments)) > 1e-4
    assert "bitsandbytes has no convolution" in str(report) and report.layers > 10
    assert packed.model_size() < source.model_size()
    weight = packed.model.diffusion_model.time_embed[0].weight
    assert tuple(weight.shape) == tuple(source.model.diffusion_model.time_embed[0].weight.shape)


def test_sizes_are_accounted_for():
    source = models.small_model()
    packed, report = made(source)
    assert source.model_size() - packed.model_size() == report.before - report.after > 0


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loras_and_scales(kind):
    source = models.small_model()
    quantized, _ = quantize(source)
    packed, twin = made(source, kind)[0], twin_of(source, kind)
    lora, scales = lora_file(source), models.random_scales(quantized)
    arguments = models.inputs(source)
    expected = models.forward(with_lora(twin, lora), arguments)
    assert models.relative(models.forward(with_lora(packed, lora), arguments), expected) < 1e-5
    for bypass in (with_lora(packed, lora, bypass=True),):
        assert models.relative(models.forward(bypass, arguments), expected) < 1e-5
        bypass.detach()
    expected = models.forward(apply(with_lora(twin, lora), scales), arguments)
    both = apply(with_lora(packed, lora), scales)
    assert models.relative(models.forward(both, arguments), expected) < 1e-5
    base = models.forward(packed, arguments)
    assert models.relative(base, models.forward(twin, arguments)) < 1e-5


def test_a_lora_before_it_stays_a_lora():
    source = models.small_model()
    lora = lora_file(source)
    arguments = models.inputs(source)
    expected = models.forward(with_lora(twin_of(source, "nf4"), lora), arguments)
    packed = made(with_lora(source, lora))[0]
    assert models.relative(models.forward(packed, arguments), expected) < 1e-5


def test_partly_loaded():
    source = models.small_model()
    lora = lora_file(source)
    packed = with_lora(made(source)[0], lora)
    arguments = models.inputs(source)
    expected = models.forward(packed, arguments)
    packed.detach()
    packed.load(packed.load_device, lowvram_model_memory=1, force_patch_weights=False)
    assert models.relative(models.forward(packed, arguments, load=False), expected) < 1e-5
    packed.detach()


def test_other_nodes_take_it(host_folders):
    from quanttune.host.export_unet import export_unet
    from quanttune.host.identity import identity_of

    source = models.small_model()
    packed = made(source)[0]
    twin = twin_of(source, "nf4")
    arguments = models.inputs(source)
    expected = models.forward(packed, arguments)
    exported = export_unet(packed, "no file", "float32")[0]
    assert models.relative(models.forward(exported, arguments), expected) < 1e-5
    ours = models.forward(quantize(packed, 8)[0], arguments)
    assert models.relative(ours, models.forward(quantize(twin, 8)[0], arguments)) < 1e-5
    assert identity_of(packed) == identity_of(packed.clone()) != identity_of(source)
    assert identity_of(packed) != identity_of(made(models.small_model(seed=1))[0])
    rebuilt = packed.cached_patcher_init[0](*packed.cached_patcher_init[1], disable_dynamic=True)
    assert models.relative(models.forward(rebuilt, arguments), expected) < 1e-6


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_lora_is_trained_on_it_as_on_the_float_twin(kind):
    from quanttune.host.lora_train import pupil
    from quanttune.training.lora_config import LoraTraining

    source = models.small_model()
    config = LoraTraining(rank=2, steps=1, precision="fp32")
    arguments = models.inputs(source)
    grads, labels = [], []
    for model in (made(source, kind)[0], twin_of(source, kind)):
        model = with_lora(model, lora_file(source))  # what it carries already stays
        with pupil(model, config) as learner:
            labels.append(learner.bits)
            for parameter in learner.learns["diffusion_model"].parameters:
                generator = torch.Generator().manual_seed(0)
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 100)
            unet = learner.denoiser.base.diffusion_model
            kept = []

            def pack(tensor, kept=kept):
                kept.append(tensor)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                output = unet(**{k: v.clone() for k, v in arguments.items()},
                              transformer_options={})
            output.square().mean().backward()
            learnt = learner.learns["diffusion_model"].parameters
            grads.append(torch.cat([p.grad.flatten() for p in learnt]))
            # A projection of a feed-forward layer: the packed one is not kept as floats.
            shapes = {tuple(sorted(t.shape)) for t in kept}
            assert ((64, 512) in shapes) == (len(grads) == 2)
    assert models.relative(*grads) < 1e-4
    assert labels == [f"{'NF4' if kind == 'nf4' else 'LLM.int8'} weights of bitsandbytes",
                      "float weights"]


def test_it_is_benchmarked_beside_others():
    from quanttune.tests.host.test_benchmark import measure

    source = models.small_model()
    found = measure([("float", source), ("nf4", made(source)[0]),
                     ("int8", made(source, "int8")[0])])
    sizes = [cost.weight_bytes for cost in found.costs]
    assert sizes[0] > sizes[2] > sizes[1] > 0


def test_another_nf4_base_on_top_is_refused():
    from quanttune.host.lora_train import NF4, pupil
    from quanttune.quant import QuantTuneError
    from quanttune.training.lora_config import LoraTraining

    with pytest.raises(QuantTuneError, match="quantized already"), pupil(
            made(models.small_model())[0], LoraTraining(rank=2), NF4):
        pass


class TestBadInput:
    def test_choices(self):
        from quanttune.quant import QuantTuneError

        source = models.small_model()
        packed = made(source)[0]
        for model, options, words in (
                (source, {"kind": "gguf"}, "kind is 'gguf'"), (packed, {}, "quantized already"),
                (quantize(source)[0], {}, "quantized already"),
                (with_lora(source, lora_file(source), bypass=True), {}, "bypass LoRA"),
                (source, {"keep": "*"}, "No Linear layer")):
            with pytest.raises(QuantTuneError, match=words):
                made(model, **options)

    def test_nan(self):
        from quanttune.quant import QuantTuneError

        source = models.small_model()
        source.model.diffusion_model.time_embed[0].weight[0, 0] = float("nan")
        with pytest.raises(QuantTuneError, match="Layer 'time_embed.0' of 'model'.*NaN"):
            made(source)

    def test_a_machine_without_it(self, monkeypatch):
        import sys

        from quanttune.quant import QuantTuneError

        source = models.small_model()
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(QuantTuneError, match=r"needs bitsandbytes.*use 'Quantize UNet'"):
            made(source)

    def test_stock_save(self):
        from quanttune.quant import QuantTuneError

        with pytest.raises(QuantTuneError, match="Export Float UNet"):
            made(models.small_model())[0].model.state_dict_for_saving({})
