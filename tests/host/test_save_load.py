"""Save Quantized UNet / Load Quantized UNet / scale files, inside the host."""

import os
import shutil

import pytest
import torch

from quanttune.quant import QuantTuneError
from quanttune.tests.host import models
from quanttune.tests.host.models import quantize


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess, output_folder):
    with torch.inference_mode():
        yield


@pytest.fixture
def output_folder(comfy_inprocess, tmp_path):
    import folder_paths

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    yield tmp_path
    folder_paths.set_output_directory(before)


def save(model, prefix="quanttune/model"):
    from quanttune.host.save import save_model

    return save_model(model, prefix)[0]


def load(path):
    from quanttune.host.build import load_model

    return load_model(path, os.path.basename(path))


@pytest.mark.parametrize("family", list(models.FAMILIES))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_trip_is_exact(family, bits):
    quantized, _ = quantize(models.small_model(family), bits)
    loaded = load(save(quantized))
    arguments = models.inputs(quantized)
    assert torch.equal(models.forward(loaded, arguments), models.forward(quantized, arguments))
    first, second = models.quantized_model(loaded), models.quantized_model(quantized)
    assert first.fingerprint == second.fingerprint
    assert type(loaded.model.model_config) is type(quantized.model.model_config)
    assert loaded.model.model_type == quantized.model.model_type


def test_saving_a_loaded_model_again_gives_the_same_tensors():
    quantized, _ = quantize(models.small_model(), 3)
    first = save(quantized)
    second = save(load(first))
    assert first != second
    with open(first, "rb") as a, open(second, "rb") as b:
        assert a.read() == b.read()


def test_the_integers_stay_mapped_to_the_file_until_the_host_lets_go_of_them():
    quantized, _ = quantize(models.small_model("SDXL"))
    path = save(quantized)
    loaded = load(path)
    layer = loaded.model.diffusion_model.out[2]

    def mapped():
        address = layer.weight._qdata.data_ptr()
        with open("/proc/self/maps") as maps:
            ranges = [line.split() for line in maps if path in line]
        spans = [tuple(int(x, 16) for x in r[0].split("-")) for r in ranges]
        return any(low <= address < high for low, high in spans)

    models.forward(loaded, models.inputs(loaded))
    assert mapped()
    with torch.inference_mode(False):  # as the host's queue does it, between two graphs
        loaded.detach()
    assert mapped() and not layer.weight.is_inference()
    models.forward(loaded, models.inputs(loaded))


def test_a_file_that_is_written_into_is_told_and_one_that_is_replaced_is_no_harm():
    quantized, _ = quantize(models.small_model("SD15"))
    path = save(quantized)
    loaded = load(path)
    inputs = models.inputs(loaded)
    expected = models.forward(loaded, inputs)
    shutil.copyfile(path, path + ".part")
    os.replace(path + ".part", path)
    assert torch.equal(models.forward(loaded, inputs), expected)
    loaded = load(path)
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    os.utime(path, (1, 1))
    with pytest.raises(QuantTuneError, match="was written to while its model was in use"):
        models.forward(loaded, inputs)
    with pytest.raises(QuantTuneError, match="was written to while its model was in use"):
        save(loaded)


def test_prediction_type_and_schedule_survive():
    import comfy.model_base

    model = models.small_model("SD20")
    model.model.model_type = comfy.model_base.ModelType.V_PREDICTION
    model.model.model_config.sampling_settings["linear_end"] = 0.02
    model.model.model_sampling = comfy.model_base.model_sampling(
        model.model.model_config, model.model.model_type)
    quantized, _ = quantize(model)
    loaded = load(save(quantized))
    assert loaded.model.model_type == comfy.model_base.ModelType.V_PREDICTION
    assert torch.equal(loaded.model.model_sampling.sigmas, model.model.model_sampling.sigmas)


def test_the_latent_format_survives():
    import comfy.latent_formats

    model = models.small_model("SDXL")
    model.model.latent_format = comfy.latent_formats.SDXL_Playground_2_5()
    loaded = load(save(quantize(model)[0]))
    assert isinstance(loaded.model.latent_format, comfy.latent_formats.SDXL_Playground_2_5)


def test_the_colours_of_the_preview_survive_and_stay_this_models_own():
    import comfy.latent_formats

    model = models.small_model()
    usual = load(save(quantize(model)[0])).model.latent_format
    plain = comfy.latent_formats.SD15().latent_rgb_factors
    assert usual.latent_rgb_factors == plain
    shown = model.model.latent_format
    shown.latent_rgb_factors = [[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, -0.5]]
    shown.latent_rgb_factors_bias = [0.1, 0.2, 0.3]
    loaded = load(save(quantize(model)[0])).model.latent_format
    assert loaded.latent_rgb_factors == shown.latent_rgb_factors
    assert loaded.latent_rgb_factors_bias == [0.1, 0.2, 0.3]
    assert comfy.latent_formats.SD15().latent_rgb_factors == plain


def test_the_non_dynamic_delegate_of_the_host_can_be_made():
    loaded = load(save(quantize(models.small_model())[0]))
    for patcher in (loaded, quantize(models.small_model())[0]):
        factory, args = patcher.cached_patcher_init
        again = factory(*args, disable_dynamic=True)
        arguments = models.inputs(patcher)
        assert torch.equal(models.forward(again, arguments), models.forward(patcher, arguments))


def test_what_the_host_builds_again_has_the_dtypes_and_the_sampling_of_the_source():
    model = models.small_model()
    model.model.model_sampling.set_sigmas(model.model.model_sampling.sigmas * 2)
    model.model.diffusion_model.dtype = torch.float16
    model.model.manual_cast_dtype = torch.float32
    quantized = quantize(model)[0]
    factory, args = quantized.cached_patcher_init
    again = factory(*args, disable_dynamic=True).model
    sampling = again.model_sampling
    assert torch.equal(sampling.sigmas, model.model.model_sampling.sigmas)
    assert sampling is not quantized.model.model_sampling
    assert again.get_dtype() == quantized.model.get_dtype() == torch.float16
    assert again.manual_cast_dtype == quantized.model.manual_cast_dtype == torch.float32


def test_scales_round_trip_and_keep_their_base():
    from quanttune.host.routing import apply_scale_set
    from quanttune.host.save import save_scales
    from quanttune.quant import load_scale_set

    quantized, _ = quantize(models.small_model())
    mark = models.quantized_model(quantized).fingerprint
    scales = models.random_scales(quantized, base_fingerprint=mark, subject="a cat", steps=7)
    path, summary = save_scales(scales, "quanttune_scales/cat")
    again = load_scale_set(path)
    assert path in summary and again.metadata == scales.metadata
    loaded = load(save(quantized))
    routed, warnings = apply_scale_set(loaded, again, 1.0, "cat")
    assert warnings == []
    arguments = models.inputs(quantized)
    expected = models.forward(apply_scale_set(quantized, scales, 1.0, "cat")[0], arguments)
    assert torch.equal(models.forward(routed, arguments), expected)


class TestRefused:
    def test_float_model(self):
        from quanttune.quant import QuantTuneError

        with pytest.raises(QuantTuneError, match="Quantize UNet"):
            save(models.small_model())

    def test_model_with_a_lora(self, output_folder):
        from quanttune.quant import QuantTuneError

        quantized, _ = quantize(models.small_model())
        patch = ("diff", (torch.ones(4, 32, 3, 3),))
        quantized.add_patches({"diffusion_model.out.2.weight": patch})
        with pytest.raises(QuantTuneError, match="LoRA"):
            save(quantized)
        assert not list(output_folder.rglob("*.safetensors"))

    @pytest.mark.parametrize("prefix", ["../outside", "/etc/outside", "a/../../outside"])
    def test_path_outside_the_output_folder(self, prefix):
        from quanttune.quant import QuantTuneError

        quantized, _ = quantize(models.small_model())
        with pytest.raises(QuantTuneError, match="output folder"):
            save(quantized, prefix)

    def test_family_unknown_to_this_host(self):
        from dataclasses import replace

        from quanttune.quant import QuantTuneError, save_quantized_unet

        checkpoint = models.quantized_model(quantize(models.small_model())[0]).checkpoint
        path = save(quantize(models.small_model())[0])
        save_quantized_unet(path, checkpoint.layers, checkpoint.floats,
                            replace(checkpoint.metadata, family="SD99"))
        with pytest.raises(QuantTuneError, match="SD99"):
            load(path)

    @pytest.mark.parametrize("change", ["missing", "extra", "config"])
    def test_tensors_that_do_not_fit_the_model(self, change):
        from dataclasses import replace

        from quanttune.quant import QuantTuneError, save_quantized_unet

        checkpoint = models.quantized_model(quantize(models.small_model())[0]).checkpoint
        path = save(quantize(models.small_model())[0])
        layers, floats, metadata = (dict(checkpoint.layers), dict(checkpoint.floats),
                                    checkpoint.metadata)
        if change == "missing":
            del layers["out.2"]
        elif change == "extra":
            floats["surplus.weight"] = torch.ones(3)
        else:
            metadata = replace(metadata, unet_config={**metadata.unet_config, "context_dim": 25})
        save_quantized_unet(path, layers, floats, metadata)
        with pytest.raises(QuantTuneError, match=os.path.basename(path)):
            load(path)
