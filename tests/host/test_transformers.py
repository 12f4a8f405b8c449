"""Diffusion transformers take the same route: small Flux and SD3 models."""

import pytest
import torch

from quanttune.quant import QuantTuneError
from quanttune.tests.host import lora_models, models
from quanttune.tests.host.models import quantize

FLUX = {"image_model": "flux", "in_channels": 16, "vec_in_dim": 16, "context_in_dim": 32,
        "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1,
        "axes_dim": [8, 12, 12], "theta": 10000, "txt_ids_dims": [], "patch_size": 2,
        "qkv_bias": True, "guidance_embed": False, "out_channels": 16}
SD3 = {"in_channels": 16, "pos_embed_scaling_factor": None, "depth": 2, "patch_size": 2,
       "input_size": None, "adm_in_channels": 16, "num_patches": 64, "pos_embed_max_size": 8,
       "context_embedder_config": {"target": "torch.nn.Linear",
                                   "params": {"in_features": 32, "out_features": 128}}}


@pytest.fixture(params=["Flux", "SD3"])
def model(request, comfy_inprocess):
    import comfy.model_patcher
    import comfy.supported_models

    config = getattr(comfy.supported_models, request.param)(
        dict({"Flux": FLUX, "SD3": SD3}[request.param]))
    config.set_inference_dtype(torch.float32, None)
    with torch.inference_mode():
        built = config.get_model({}, "")
        generator = torch.Generator().manual_seed(0)
        for tensor in [*built.diffusion_model.parameters(), *built.diffusion_model.buffers()]:
            tensor.normal_(0, 0.05, generator=generator)
        cpu = torch.device("cpu")
        yield comfy.model_patcher.CoreModelPatcher(built, cpu, cpu)


def run(patcher, first_step):
    """Output for one sample at the first or the last step, in the family's own timesteps."""
    generator = torch.Generator().manual_seed(1)
    high = 1.0 if "Flux" in type(patcher.model).__name__ else 1000.0
    return patcher.model.diffusion_model(
        torch.randn(1, 16, 8, 8, generator=generator),
        torch.tensor([0.95 * high if first_step else 0.05 * high]),
        context=torch.randn(1, 5, 32, generator=generator),
        y=torch.randn(1, 16, generator=generator),
        transformer_options=patcher.model_options["transformer_options"])


def test_eight_bits_are_close_to_float(model):
    quantized, report = quantize(model, 8)
    assert "layers quantized" in str(report)
    for first_step in (True, False):
        assert models.relative(run(quantized, first_step), run(model, first_step)) < 0.05


def test_every_layer_has_a_group(model):
    from quanttune.host.quantize import quantizable_layers
    from quanttune.quant.groups import OTHER, group_of

    assert not [name for name in quantizable_layers(model.model) if group_of(name) == OTHER]


def test_scales_act_only_in_their_interval(model):
    from quanttune.host.routing import apply_scale_set
    from quanttune.quant import LayerScales, ScaleSet

    quantized, _ = quantize(model, 4)
    scales = models.random_scales(quantized, num_experts=2)
    late_only = ScaleSet({n: LayerScales(torch.stack([torch.ones_like(s.r_out[0]), s.r_out[1]]))
                          for n, s in scales.layers.items()}, 2)
    routed = apply_scale_set(quantized, late_only, 1.0, "late")[0]
    assert torch.equal(run(routed, False), run(quantized, False))
    assert models.relative(run(routed, True), run(quantized, True)) > 1e-3


@pytest.mark.parametrize("checkpointing", [True, False])
def test_training_moves_the_expert_that_will_be_applied(model, tmp_path, checkpointing):
    """Flow models are given another timestep than the one drawn: that of the shifted noise."""
    from quanttune.host.routing import ScaleRouter, timesteps_of
    from quanttune.host.training import training_copy
    from quanttune.training.config import ScaleTraining
    from quanttune.training.data import TrainingSet
    from quanttune.training.trainer import ScaleTrainer

    with torch.inference_mode():
        quantized, _ = quantize(model, 4)
    g = torch.Generator().manual_seed(0)
    data = TrainingSet(tuple(torch.randn(16, 8, 8, generator=g) for _ in range(2)),
                       tuple({"c_crossattn": torch.randn(1, 5, 32, generator=g),
                              "y": torch.randn(1, 16, generator=g)} for _ in range(2)),
                       (False,) * 2, ("",) * 2, "x")
    config = ScaleTraining(steps=24, num_experts=3, checkpointing=checkpointing, preview_every=0,
                           warmup_steps=0, save_every=0, learning_rate=1e-2)
    asked, given = [], []
    with training_copy(quantized) as denoiser:
        trainer = ScaleTrainer(denoiser, data, config, tmp_path)
        if "Flux" in type(model.model).__name__:
            # ComfyUI's blocks write into activations that autograd has kept.
            with pytest.raises(QuantTuneError, match="family Flux cannot be trained.*use an SD1"):
                trainer.run()
            return
        select = trainer.scales.select
        trainer.scales.select = lambda experts: asked.append(experts[0]) or select(experts)
        unet = denoiser.base.diffusion_model
        hook = unet.register_forward_pre_hook(
            lambda m, a, k: given.append(timesteps_of(a, k).clone()), with_kwargs=True)
        scale_set = trainer.run().scale_set
        hook.remove()
        del given[0]  # the proof that it can be differentiated
        router = ScaleRouter(denoiser.base, denoiser.shapes, [(scale_set, 1.0)])
        assert set(asked) == {0, 1, 2} and len(asked) == len(given) == 24
        for expert, timestep in zip(asked, given):
            for name, row in router.resolve(timestep).items():
                assert torch.equal(row.r_out[0], scale_set.layers[name].r_out[expert])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_qat_trains_what_can_be_differentiated(model, host_folders, checkpointing):
    from quanttune.host.calibrate import Calibration, calibrate
    from quanttune.host.qat import train_qat
    from quanttune.quant import QuantTuneError
    from quanttune.training.qat import QatTraining

    generator = torch.Generator().manual_seed(2)
    positive = [[torch.randn(1, 5, 32, generator=generator),
                 {"pooled_output": torch.randn(1, 16, generator=generator)}]]
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    how = Calibration(samples=4, steps=2, cfg=1.0, precision="float32")
    with torch.inference_mode():
        quantized, _ = calibrate(model, latent, positive, (), how)
        arguments = (quantized, model, latent, positive, (), how, QatTraining(
            steps=2, warmup_steps=0, precision="fp32", checkpointing=checkpointing), "family")
        if "Flux" in type(model.model).__name__:
            with pytest.raises(QuantTuneError, match="family Flux cannot be trained.*use an SD1"):
                train_qat(*arguments)
        else:
            assert train_qat(*arguments).finished


def test_a_lora_of_ours_has_every_layer(model, caplog):
    import comfy.sd

    from quanttune.host.lora_file import export_lora, import_lora
    from quanttune.host.merge_lora import merge_lora

    with torch.inference_mode():
        layers = lora_models.random_layers(model, include=("qkv", "proj", "linear1", "fc1", "mlp.0",
                                                           "img_in", "x_embedder.proj"))
        lora = export_lora(layers, model)
        assert all(key.startswith("lora_unet_") for key in lora)
        stock, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
        assert len(stock.patches) == len(layers) > 3
        assert not [r for r in caplog.records if "not loaded" in r.message.lower()]
        found = import_lora(lora, model)
        assert found.keys() == layers.keys()
        assert all(torch.equal(found[n].down, layer.down) for n, layer in layers.items())
        quantized, _ = quantize(model, 8)
        quantized.patches = stock.patches
        merged, report = merge_lora(quantized)
        assert len(report.layers) == len(layers) and 0.9 < report.survived < 1.1


def test_queries_keys_and_values_of_diffusers_become_one_lora(model):
    """These families hold them in one weight; diffusers, and so its LoRAs, in three."""
    import comfy.lora

    from quanttune.host.lora_file import import_lora
    from quanttune.host.lora_keys import key_map

    with torch.inference_mode():
        keys, generator = key_map(model), torch.Generator().manual_seed(0)
        target, (_, _, size) = keys["transformer.transformer_blocks.0.attn.to_q"]
        inputs = model.model.state_dict()[target].shape[1]
        lora = {}
        for part, rank in (("q", 2), ("v", 3)):
            name = f"transformer.transformer_blocks.0.attn.to_{part}"
            lora[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
            lora[f"{name}.lora_B.weight"] = torch.randn(size, rank, generator=generator)
        lora["transformer.transformer_blocks.0.attn.to_q.alpha"] = torch.tensor(1.0)
        (name, layer), = import_lora(lora, model).items()
        assert f"{name}.weight" == target and layer.rank == 5
        patched = model.clone()
        patched.add_patches(comfy.lora.load_lora(lora, keys))
        zeros = torch.zeros(model.model.state_dict()[target].shape)
        expected = comfy.lora.calculate_weight(patched.patches[target], zeros, target)
        assert torch.allclose(layer.delta(), expected, atol=1e-5)
        assert not layer.delta()[size:2 * size].any() and layer.delta()[2 * size:].any()
        # Some weights are the other way round there, halves of rows exchanged.
        target, _, exchange = keys["transformer.norm_out.linear"]
        out, inputs = model.model.state_dict()[target].shape
        lora = {"transformer.norm_out.linear.lora_A.weight": torch.randn(2, inputs),
                "transformer.norm_out.linear.lora_B.weight": torch.randn(out, 2)}
        (_, layer), = import_lora(lora, model).items()
        down, up = lora.values()
        assert torch.allclose(layer.delta(), exchange(up @ down), atol=1e-5)
