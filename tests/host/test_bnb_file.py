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


def test_the_refiner_as_a_part_of_its_pipeline(tmp_path):
    from quanttune.host.build import load_model
    from quanttune.tests.host import unets

    unet = unets.tiny_unet("SDXLRefiner")
    folder = unets.save_pipeline(unet, tmp_path / "refiner") / "unet"
    with torch.inference_mode(False):
        for name, layer in list(unet.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(unet.get_submodule(parent), leaf, packed_layer(layer, *DOUBLE))
        save_file({k: v.clone() for k, v in unet.state_dict().items()}, folder / FILE)
    model = load_model(str(folder / FILE), "refiner")
    assert type(model.model.model_config).__name__ == "SDXLRefiner"
    given, full = unets.inputs(unet), twin(unet)
    assert models.relative(unets.ours(model, full, given), unets.theirs(full, given)) < 1e-5


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
        (0, ".quant_state.bitsandbytes__nf4", {"shape": [128.7, 32]}, "unreadable"),
        (0, ".quant_state.bitsandbytes__nf4", {"quant_type": "fp4"}, "of the kind fp4"),
        (0, ".quant_state.bitsandbytes__nf4", {"nested_offset": 10**400}, "unreadable"),
        (0, ".quant_state.bitsandbytes__nf4", {"shape": [1] * 200}, "of shape .{1,80} in blocks"),
        (0, ".nested_absmax", torch.ones(1, dtype=torch.int32), "scales of scales"),
        (0, ".nested_absmax", torch.ones(1, dtype=torch.complex64), "scales of scales"),
        (0, ".nested_quant_map", torch.ones(256, dtype=torch.complex64), "scales of scales"),
        (0, ".quant_map", torch.ones(16, dtype=torch.complex64), "table of values"),
        (0, ".nested_absmax .nested_quant_map", None, "scales of scales are missing"),
        (0, ".nested_quant_map", torch.full((256,), 1e20), "that of no model"),
        (1, "", torch.zeros(4, 4), "without int8 weights"),
        (1, "SCB", torch.zeros(3), "without a scale for each row"),
        (1, "SCB", float("nan"), "not finite"),
        (1, "SCB", 1e30, "that of no model"), (1, "SCB", -1.0, "below 0"),
    ])
    def test_layers(self, files, tmp_path, number, part, value, words):
        from quanttune.host.build import load_model
        from quanttune.quant import QuantTuneError

        def change(state):
            name = "time_embedding.linear_1"
            for more in part.split()[1:]:
                del state[f"{name}.weight{more}"]
            key = f"{name}.SCB" if part == "SCB" else f"{name}.weight{part.split(' ')[0]}"
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

    @pytest.mark.parametrize("key", ["conv_in.weight", "conv_norm_out.bias"])
    @pytest.mark.parametrize("number", [float("nan"), float("inf")])
    def test_floats(self, files, tmp_path, key, number):
        from quanttune.host.build import load_model
        from quanttune.quant import QuantTuneError

        path = self.changed(files[0], tmp_path, lambda s: s[key].view(-1)[:1].fill_(number))
        with pytest.raises(QuantTuneError, match=f"NaN or infinite values in '{key}'"):
            load_model(str(path), "x")

    def test_what_is_no_part_of_it(self, files, tmp_path):
        from quanttune.host.build import load_model
        from quanttune.quant import QuantTuneError

        path = self.changed(files[0], tmp_path, lambda s: s.update(extra=torch.zeros(2)))
        with pytest.raises(QuantTuneError, match="'extra' that is no part"):
            load_model(str(path), "x")

    @pytest.mark.parametrize("change, words", [
        ({"block_out_channels": [0, 0]}, "says block_out_channels"),
        ({"block_out_channels": [2**40, 2**41]}, "says block_out_channels"),
        ({"block_out_channels": [64, 128]}, "is not of the weights beside it"),
        ({"attention_head_dim": []}, "says attention_head_dim"),
        ({"attention_head_dim": 7}, "says attention_head_dim = 7"),
        ({"act_fn": "gelu"}, "says act_fn = gelu"),
        (None, "config.json cannot be read")])
    def test_settings(self, files, tmp_path, change, words):
        from quanttune.host.build import load_model
        from quanttune.quant import QuantTuneError

        folder = shutil.copytree(files[0], tmp_path / "changed")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text("{" if change is None
                                            else json.dumps({**config, **change}))
        with pytest.raises(QuantTuneError, match=words):
            load_model(str(folder / FILE), "x")


def test_settings_of_diffusers_beside_it(tmp_path):
    """One reader for all files: the scheduler says what the UNet predicts, heads are the file's."""
    from quanttune.host.build import load_model

    folder, _ = saved_by_diffusers(models.small_model("SD20"), DOUBLE)
    pipeline = tmp_path / "model"
    unet = Path(shutil.copytree(folder, pipeline / "unet"))
    (pipeline / "scheduler").mkdir()
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    for prediction, expected in (("v_prediction", "V_PREDICTION"), ("epsilon", "EPS")):
        scheduler.write_text(json.dumps({
            "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_end": 0.012,
            "beta_start": 0.00085, "num_train_timesteps": 1000, "prediction_type": prediction}))
        loaded = load_model(str(unet / FILE), "x")
        assert loaded.model.model_type.name == expected
    heads = json.loads((unet / "config.json").read_text())["attention_head_dim"]
    found = loaded.model.model_config.unet_config
    widths = [found["model_channels"] * m for m in found["channel_mult"]]
    own = ([found["num_heads"]] * len(widths) if found["num_heads"] > 0
           else [w // found["num_head_channels"] for w in widths])
    assert own == (heads if isinstance(heads, list) else [heads] * len(widths))
    # Without any settings ComfyUI's own rules hold.
    shutil.copy(unet / FILE, tmp_path / "alone.safetensors")
    assert load_model(str(tmp_path / "alone.safetensors"), "x").model.model_type.name == "EPS"


def test_a_reader_of_float_models_names_the_right_node(tmp_path):
    from quanttune.host.unet_source import open_unet
    from quanttune.quant import QuantTuneError

    for options in (DOUBLE, INT8):
        folder, _ = saved_by_diffusers(models.small_model(), options)
        with pytest.raises(QuantTuneError, match="'Load Quantized UNet'"):
            open_unet(folder)


class TestShards:
    @pytest.fixture
    def folder(self, tmp_path):
        """A model in two files, the second without a layer of bitsandbytes."""
        folder, _ = saved_by_diffusers(models.small_model(), DOUBLE)
        state = load_file(folder / FILE)
        whole = {k for k in state if any(k.startswith(p) for p in ("conv_", "time_"))}
        parts = ({k: v for k, v in state.items() if k not in whole},
                 {k: state[k] for k in whole if "linear" not in k})
        parts[0].update({k: state[k] for k in whole if "linear" in k})
        names = [FILE.replace(".", f"-0000{i}-of-00002.") for i in (1, 2)]
        for name, part in zip(names, parts):
            save_file(part, folder / name)
        (folder / f"{FILE}.index.json").write_text(json.dumps(
            {"weight_map": {k: n for n, part in zip(names, parts) for k in part}}))
        return folder, names

    def test_any_of_them_stands_for_all(self, folder):
        from quanttune.host.build import load_model

        folder, names = folder
        model = load_model(str(folder / FILE), "whole")
        arguments = models.inputs(model)
        expected = models.forward(model, arguments)
        for name in (*names, f"{FILE}.index.json"):
            found = models.forward(load_model(str(folder / name), name), arguments)
            assert torch.equal(found, expected), name

    def test_a_variant_of_a_precision(self, folder):
        """diffusers' names of shards and index with ``variant="fp16"``."""
        from quanttune.host.build import load_model

        folder, names = folder
        index = folder / f"{FILE}.index.json"
        text = index.read_text()
        index.unlink()
        for name in names:
            own = name.replace("-0000", ".fp16-0000", 1)
            (folder / name).rename(folder / own)
            text = text.replace(name, own)
        index = index.with_name(f"{FILE}.index.fp16.json")
        index.write_text(text)
        expected = load_model(str(folder / FILE), "whole").model.state_dict().keys()
        for path in (index, *folder.glob("*.fp16-*")):
            assert load_model(str(path), "x").model.state_dict().keys() == expected, path

    def test_the_same_tensor_in_two_of_them(self, folder):
        from quanttune.host.build import load_model
        from quanttune.quant import QuantTuneError

        folder, names = folder
        part = load_file(folder / names[1])
        save_file({**part, "conv_out.bias": torch.ones(4)}, folder / names[1])
        first = load_file(folder / names[0])
        save_file({**first, "conv_out.bias": torch.zeros(4)}, folder / names[0])
        with pytest.raises(QuantTuneError, match=f"{names[1]} has 'conv_out.bias', which another "
                                                 "part of .* has, too; download"):
            load_model(str(folder / names[0]), "x")

    def test_parts_that_are_not_whole(self, folder, tmp_path):
        from quanttune.host.build import load_model
        from quanttune.quant import QuantTuneError

        folder, names = folder
        alone = tmp_path / names[0]
        shutil.copy(folder / names[0], alone)

        def told(path, words):
            with pytest.raises(QuantTuneError, match=words) as caught:
                load_model(str(path), "x")
            message = str(caught.value)
            assert names[0] in message and "\n" not in message and ". " not in message

        told(alone, "index.json is missing; put all of them")
        index = tmp_path / f"{FILE}.index.json"
        shutil.copy(folder / index.name, index)
        told(alone, f"{names[1]} is missing")
        (tmp_path / names[1]).write_bytes((folder / names[1]).read_bytes()[:-9])
        told(alone, f"{names[1]} is cut short")
        other = load_file(folder / names[1])
        save_file({k: v for k, v in other.items() if k != "conv_out.bias"}, tmp_path / names[1])
        told(alone, "index.json lists 'conv_out.bias', which none of its files has")
        index.write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
        told(alone, "does not name this file")
        index.write_text("{")
        told(alone, "does not list the files")
