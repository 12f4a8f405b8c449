"""Files that diffusers saved with bitsandbytes layers, or in the host's names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quanttune.tests.host import models
from quanttune.tests.host.test_export_unet import export, in_diffusers

bnb = pytest.importorskip("bitsandbytes")
diffusers = pytest.importorskip("diffusers")
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess, host_folders):
    with torch.inference_mode():
        yield


def saved_by_diffusers(model, options):
    """The folder of a UNet of diffusers with bitsandbytes layers, and that UNet.

    diffusers quantizes on a GPU alone. Its saver writes what the layers' own ``state_dict`` says,
    and so does this.
    """
    path = Path(export(model, "diffusers folder", prefix="base")[1])
    kind, double = options
    with torch.inference_mode(False):
        unet = diffusers.UNet2DConditionModel.from_pretrained(path, subfolder="unet")
        for name, layer in list(unet.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(unet.get_submodule(parent), leaf, packed_layer(layer, kind, double))
        (path / "packed").mkdir()
        shutil.copy(path / "unet" / "config.json", path / "packed")
        state = {k: v.clone().contiguous() for k, v in unet.state_dict().items()}
        save_file(state, path / "packed" / FILE)
    return path / "packed", unet


def packed_layer(layer, kind, double):
    """A layer of bitsandbytes for a Linear."""
    bias = layer.bias is not None
    if kind == "int8":
        made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias,
                                   has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False,
                                        has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias, quant_type=kind)
        made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type=kind,
                                        compress_statistics=double)
    if bias:
        made.bias = layer.bias
    return made.to("cpu")


NF4, DOUBLE, FP4, INT8 = ("nf4", False), ("nf4", True), ("fp4", False), ("int8", False)


@pytest.mark.parametrize("family,options", [
    *(("SD15", options) for options in (NF4, DOUBLE, FP4, INT8)), ("SD20", DOUBLE),
    ("SDXL", DOUBLE)])
def test_what_diffusers_saved(family, options):
    from quanttune.host.build import load_model

    model = models.small_model(family)
    arguments = models.inputs(model)
    folder, unet = saved_by_diffusers(model, options)
    loaded = load_model(str(folder / FILE), "packed")
    got = models.forward(loaded, arguments)
    assert models.relative(got, in_diffusers(twin(unet), arguments)) < 1e-5
    assert models.relative(got, models.forward(model, arguments)) > 1e-4
    keys = load_file(folder / FILE)
    count = sum(".quant_state." in k or k.endswith(".SCB") for k in keys)
    from quanttune.host.bnb import is_bnb

    assert count == sum(is_bnb(m.weight) for m in loaded.model.diffusion_model.modules()
                        if isinstance(m, torch.nn.Linear)) > 10


def twin(unet):
    """diffusers' UNet with bitsandbytes' own dequantized weights."""
    for name, layer in list(unet.named_modules()):
        if not isinstance(layer, torch.nn.Linear):
            continue
        weight = layer.weight
        if getattr(weight, "quant_state", None) is not None:
            full = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif getattr(weight, "SCB", None) is not None:
            full = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        else:
            continue
        plain = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight = torch.nn.Parameter(full.float().view(plain.weight.shape))
        if layer.bias is not None:
            plain.bias = torch.nn.Parameter(layer.bias.float())
        parent, _, leaf = name.rpartition(".")
        setattr(unet.get_submodule(parent), leaf, plain)
    return unet.float()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_hosts_names(monkeypatch, tmp_path, prefix):
    from quanttune.host.bnb import bnb_weight, is_bnb
    from quanttune.host.dynamic_int8 import load_ready
    from quanttune.tests.host.test_bnb import made
    from quanttune.tests.host.test_save_for_stock import DETECTABLE

    monkeypatch.setitem(models.FAMILIES, "SD15", {**models.FAMILIES["SD15"], **DETECTABLE})
    model = made(models.small_model())[0]
    state = {}
    for name, value in model.model.diffusion_model.state_dict().items():
        if name.endswith(".weight_scale"):
            continue
        if is_bnb(value):
            weight = bnb_weight(value)
            told = bnb.functional.QuantState(
                weight.scale, torch.Size(weight.shape), bnb.functional.get_4bit_type("nf4", "cpu"),
                weight.block, "nf4", torch.float32)
            state[f"{prefix}{name}"] = weight.data
            state |= {f"{prefix}{name}.{k}": v for k, v in told.as_dict(packed=True).items()}
        else:
            state[f"{prefix}{name}"] = value.clone()
    path = tmp_path / "host.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    arguments = models.inputs(model)
    loaded = load_ready(str(path), "host")
    assert models.relative(models.forward(loaded, arguments),
                           models.forward(model, arguments)) < 1e-5


class TestHostileFiles:
    @pytest.fixture(scope="class")
    def files(self, comfy_inprocess, tmp_path_factory):
        folder = tmp_path_factory.mktemp("hostile")
        import folder_paths

        before = folder_paths.output_directory
        folder_paths.output_directory = str(folder)
        try:
            with torch.inference_mode():
                found = [saved_by_diffusers(models.small_model(), o)[0] for o in (DOUBLE, INT8)]
        finally:
            folder_paths.output_directory = before
        return found

    def changed(self, source, tmp_path, change):
        folder = shutil.copytree(source, tmp_path / "changed")
        state = load_file(folder / FILE)
        change(state)
        save_file(state, folder / FILE)
        return folder / FILE

    @pytest.mark.parametrize("number,part,value,words", [
        (0, ".absmax", None, "without a scale for each block"),
        (0, ".quant_map", torch.zeros(16), "table of values"),
        (0, ".nested_absmax", torch.zeros(7), "scales of scales"),
        (0, ".quant_state.bitsandbytes__nf4", torch.zeros(3, dtype=torch.uint8), "unreadable"),
        (0, ".quant_state.bitsandbytes__nf4", {"shape": [-1, 4]}, r"of shape \[-1, 4\]"),
        (0, ".quant_state.bitsandbytes__nf4", {"shape": [9, 4]}, "codes do not have the number"),
        (0, ".quant_state.bitsandbytes__nf4", {"shape": [10**9, 10**9]}, "codes do not have"),
        (0, ".quant_state.bitsandbytes__nf4", {"quant_type": "nf9"}, "of the kind"),
        (1, "", torch.zeros(4, 4), "without int8 weights"),
        (1, "SCB", torch.zeros(3), "without a scale for each row"),
        (1, "SCB", float("nan"), "not finite"),
    ])
    def test_layers(self, files, tmp_path, number, part, value, words):
        from quanttune.host.build import load_model
        from quanttune.quant import QuantTuneError

        def change(state):
            name = "time_embedding.linear_1"
            key = f"{name}.SCB" if part == "SCB" else f"{name}.weight{part}"
            if isinstance(value, dict):
                facts = json.loads(bytes(state[key].tolist()))
                state[key] = torch.tensor(list(json.dumps({**facts, **value}).encode()),
                                          dtype=torch.uint8)
            elif isinstance(value, float):
                state[key] = torch.full_like(state[key], value)
            elif value is None:
                del state[key]
            else:
                state[key] = value

        path = self.changed(files[number], tmp_path, change)
        with pytest.raises(QuantTuneError, match=words) as told:
            load_model(str(path), "x")
        assert FILE in str(told.value) and str(told.value).count(". ") == 0

    def test_what_is_no_part_of_it(self, files, tmp_path):
        from quanttune.host.build import load_model
        from quanttune.quant import QuantTuneError

        path = self.changed(files[0], tmp_path, lambda s: s.update(extra=torch.zeros(2)))
        with pytest.raises(QuantTuneError, match="'extra' that is no part"):
            load_model(str(path), "x")

    @pytest.mark.parametrize("change", [
        {"block_out_channels": [0, 0]}, {"down_block_types": 3}, {"attention_head_dim": []},
        {"layers_per_block": [2]}, {"block_out_channels": [2**40, 2**41]}])
    def test_settings(self, files, tmp_path, change):
        from quanttune.host.build import load_model
        from quanttune.quant import QuantTuneError

        folder = shutil.copytree(files[0], tmp_path / "changed")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(QuantTuneError):
            load_model(str(folder / FILE), "x")
        (folder / "config.json").unlink()
        with pytest.raises(QuantTuneError, match="config.json of diffusers beside it"):
            load_model(str(folder / FILE), "x")
