"""Files among the host's model folders: their endings in capitals, and the second one of
safetensors files, as the host's own loaders list them."""

import shutil
from pathlib import Path

import pytest
import torch

from quanttune.tests.harness.inprocess import pack_nodes, run_node
from quanttune.tests.host import models


@pytest.fixture
def nodes(comfy_inprocess, host_folders):
    from quanttune.host.folders import register_folders

    found = pack_nodes()
    register_folders()
    return found


@pytest.fixture
def place(host_folders):
    """Puts a copy of a file among the host's models."""

    def put(source, kind, name):
        target = host_folders / "models" / kind / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
        return name

    return put


@torch.inference_mode()
def test_quantized_unets_scales_and_states(nodes, place, tmp_path):
    from quanttune.host import folders
    from quanttune.host.build import quantized_model
    from quanttune.host.save import save_model
    from quanttune.host.tuneqdm import export_tuneqdm
    from quanttune.quant import save_scale_set
    from quanttune.starter.qdiffusion_file import write_qdiffusion_starter

    model = models.small_model()
    quantized, _ = models.quantize(model, split_shortcuts=False)
    expected = models.forward(quantized, models.inputs(quantized))
    path, _ = save_model(quantized, "quanttune/own")
    scales = models.random_scales(quantized)
    save_scale_set(tmp_path / "s.safetensors", scales)
    export_tuneqdm(path, tmp_path / "state.PT", scales)
    write_qdiffusion_starter(tmp_path / "q.pth")
    load, apply = nodes["QuantTuneLoadQuantizedUNet"], nodes["QuantTuneLoadScales"]
    for kind in ("quanttune", "diffusion_models"):
        for ending in ("SAFETENSORS", "sft", "SFT"):
            name = place(path, kind, f"{kind}.{ending}")
            assert name in folders.unet_files()
            (found,) = run_node(load, unet_name=name).args
            assert torch.equal(models.forward(found, models.inputs(quantized)), expected)
    for ending in ("PTH", "PT", "CKPT"):
        name = place(tmp_path / "q.pth", "quanttune", f"q.{ending}")
        assert name in folders.unet_files()
        assert quantized_model(run_node(load, unet_name=name).args[0]) is not None
    name = place(tmp_path / "state.PT", "quanttune", "state.PT")
    assert name in folders.unet_files() and name in folders.scale_files()
    assert quantized_model(run_node(load, unet_name=name).args[0]) is not None
    assert run_node(apply, scale_name=name).args[0].num_experts == scales.num_experts
    for ending in ("SAFETENSORS", "SFT", "sft"):
        name = place(tmp_path / "s.safetensors", "quanttune_scales", f"s.{ending}")
        assert name in folders.scale_files()
        assert run_node(apply, scale_name=name).args[0].layers.keys() == scales.layers.keys()


@torch.inference_mode()
def test_float_unets(nodes, place, tmp_path):
    from quanttune.host.convert_unet import detect
    from quanttune.host.unet_files import unet_names
    from quanttune.tests.host.test_export_unet import export

    model = models.small_model()
    path = Path(export(model, "ComfyUI file", prefix="float")[1])
    torch.save(dict(model.model.diffusion_model.state_dict()), tmp_path / "a.ckpt")
    arguments = models.inputs(model)
    expected = models.forward(model, arguments)
    for source, endings in ((path, ("SAFETENSORS", "sft", "SFT")),
                            (tmp_path / "a.ckpt", ("CKPT", "PT", "BIN"))):
        for ending in endings:
            name = place(source, "diffusion_models", f"float.{ending}")
            assert name in unet_names()
            (found,) = run_node(nodes["QuantTuneLoadDiffusersUNet"], unet=name,
                                precision="float").args
            assert models.relative(models.forward(found, arguments), expected) < 1e-5
            copy = tmp_path / name
            shutil.copy(source, copy)
            assert detect(copy), name
