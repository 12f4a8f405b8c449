"""MODEL -> quantized MODEL: exactness, size, what carries over, what stays untouched."""

import pytest
import torch

from quanttune.tests.host import models
from quanttune.tests.host.models import quantize


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("family", list(models.FAMILIES))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_forward_equals_the_dequantized_float_model(family, bits):
    quantized, report = quantize(models.small_model(family), bits)
    arguments = models.inputs(quantized)
    expected = models.forward(models.dequantized_copy(quantized, family), arguments)
    assert models.relative(models.forward(quantized, arguments), expected) < 1e-5
    assert 0 < report.relative_error < {2: 0.7, 3: 0.35, 4: 0.2, 8: 0.02}[bits]


def test_every_linear_and_conv2d_is_packed_and_shortcuts_are_split():
    model = models.small_model()
    quantized, report = quantize(model)
    checkpoint = models.quantized_model(quantized).checkpoint
    expected = {n for n, m in model.model.diffusion_model.named_modules()
                if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    assert set(checkpoint.layers) == expected
    splits = {n: w.split for n, w in checkpoint.layers.items() if w.split}
    assert set(splits) == {f"output_blocks.{i}.0.skip_connection" for i in range(4)}
    assert f"{len(expected)} layers quantized" in str(report)
    unsplit, _ = quantize(model, split_shortcuts=False)
    assert not any(w.split for w in models.quantized_model(unsplit).checkpoint.layers.values())


@pytest.mark.parametrize("bits,share", [(4, 0.14), (8, 0.27)])
def test_resident_size_as_the_host_accounts_it(bits, share):
    from comfy.model_management import module_size

    model = models.small_model("SDXL")
    quantized, _ = quantize(model, bits)
    size = module_size(quantized.model.diffusion_model)
    assert size < share * module_size(model.model.diffusion_model)
    assert quantized.model_size() - size == model.model_size() - module_size(
        model.model.diffusion_model)
    # Everything resident is counted: packed integers, their scales, floats.
    checkpoint = models.quantized_model(quantized).checkpoint
    resident = sum(w.nbytes for w in checkpoint.layers.values())
    resident += sum(t.nbytes for t in checkpoint.floats.values())
    assert size == resident


def test_the_source_keeps_working_and_its_patches_carry_over():
    model = models.small_model()
    arguments = models.inputs(model)
    before = models.forward(model, arguments)
    patched = model.clone()
    key = "diffusion_model.out.2.weight"
    patched.add_patches({key: ("diff", (torch.ones(4, 32, 3, 3),))}, 0.1)
    quantized, _ = quantize(patched)
    assert key in quantized.patches
    assert models.relative(models.forward(model, arguments), before) == 0.0
    bare, _ = quantize(model)
    assert models.relative(models.forward(quantized, arguments),
                           models.forward(bare, arguments)) > 1e-2


@pytest.mark.parametrize("keep,kept", [
    ("none", set()),
    ("first_last", {"input_blocks.0.0", "out.2"}),
    ("*attn2.to_k", None),
])
def test_layers_kept_in_float(keep, kept):
    model = models.small_model()
    quantized, _ = quantize(model, keep=keep)
    checkpoint = models.quantized_model(quantized).checkpoint
    names = {n for n, m in model.model.diffusion_model.named_modules()
             if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    if kept is None:
        kept = {n for n in names if n.endswith("attn2.to_k")}
    assert names - set(checkpoint.layers) == kept
    arguments = models.inputs(quantized)
    expected = models.forward(models.dequantized_copy(quantized), arguments)
    assert models.relative(models.forward(quantized, arguments), expected) < 1e-5


def test_a_pattern_without_a_match_names_itself():
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match="nonsense_block"):
        quantize(models.small_model(), keep="nonsense_block.*")


def test_twice_quantized_is_refused():
    from quanttune.quant import QuantTuneError

    quantized, _ = quantize(models.small_model())
    with pytest.raises(QuantTuneError, match="already"):
        quantize(quantized)


def test_nan_weights_are_refused_by_layer_name():
    from quanttune.quant import QuantTuneError

    model = models.small_model()
    model.model.diffusion_model.out[2].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(QuantTuneError, match=r"out\.2"):
        quantize(model)


def test_sampling_changes_and_wrappers_carry_over():
    from comfy.patcher_extension import WrappersMP

    model = models.small_model().clone()
    seen = []

    def wrapper(executor, *args, **kwargs):
        seen.append(1)
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", wrapper)
    model.add_object_patch("latent_format", "marker")
    quantized, _ = quantize(model)
    models.forward(quantized, models.inputs(quantized))
    assert seen and quantized.object_patches["latent_format"] == "marker"


def test_stock_savers_refuse_rather_than_write_integers_as_floats(tmp_path):
    from comfy.sd import save_checkpoint

    from quanttune.quant import QuantTuneError

    quantized, _ = quantize(models.small_model())
    with pytest.raises(QuantTuneError, match="Save Quantized UNet"):
        save_checkpoint(str(tmp_path / "x.safetensors"), quantized)
    assert not list(tmp_path.iterdir())


def test_interrupt_stops_quantizing():
    import comfy.model_management as mm

    mm.interrupt_current_processing(True)
    with pytest.raises(mm.InterruptProcessingException):
        quantize(models.small_model())
