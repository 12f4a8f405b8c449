"""Small members of the families the pack supports, built by the host itself, random weights."""

from __future__ import annotations

import torch

COMMON = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "use_checkpoint": False,
    "use_spatial_transformer": True, "legacy": False, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "use_temporal_attention": False,
}
FAMILIES = {
    "SD15": {"model_channels": 32, "context_dim": 24, "transformer_depth": [1, 1],
             "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1,
             "use_linear_in_transformer": False, "adm_in_channels": None},
    "SD20": {"model_channels": 64, "context_dim": 24, "transformer_depth": [1, 1],
             "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1,
             "use_linear_in_transformer": True, "adm_in_channels": None},
    "SDXL": {"model_channels": 64, "context_dim": 24, "transformer_depth": [0, 2],
             "transformer_depth_output": [0, 0, 2, 2], "transformer_depth_middle": 2,
             "use_linear_in_transformer": True, "num_classes": "sequential",
             "adm_in_channels": 40},
}


def small_model(family: str = "SD15", seed: int = 0, kept=None):
    """A MODEL (ModelPatcher, float32, or kept as ``kept``) of ``family`` as the host's loaders
    give it."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = getattr(comfy.supported_models, family)({**COMMON, **FAMILIES[family]})
    config.set_inference_dtype(kept or torch.float32, torch.float32 if kept else None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.diffusion_model.parameters():
            fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in ** 0.5)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(model, device, torch.device("cpu"))


def quantize(model, bits=4, **options):
    """``(quantized MODEL, report)`` at ``bits``."""
    from quanttune.host.quantize import quantize_model
    from quanttune.quant import QuantSpec

    return quantize_model(model, QuantSpec(bits), **options)


def inputs(patcher, timesteps=(999.0, 10.0), seed=1, size=16):
    """Arguments of ``diffusion_model`` for a batch at ``timesteps``."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(timesteps)
    config = patcher.model.model_config.unet_config
    arguments = {
        "x": torch.randn(batch, 4, size, size, generator=generator),
        "timesteps": torch.tensor(timesteps),
        "context": torch.randn(batch, 7, config["context_dim"], generator=generator),
    }
    if config.get("adm_in_channels"):
        arguments["y"] = torch.randn(batch, config["adm_in_channels"], generator=generator)
    return arguments


def forward(patcher, arguments, load=True):
    """The diffusion model's output as a sampler would get it: loaded, with the wrappers."""
    import comfy.model_management

    if load:
        comfy.model_management.load_models_gpu([patcher])
    options = {**patcher.model_options["transformer_options"], "wrappers": patcher.wrappers}
    return patcher.model.diffusion_model(**arguments, transformer_options=options).clone()


def dequantized_copy(quantized, source_family="SD15"):
    """A float MODEL whose weights are what the packed ones of ``quantized`` stand for."""
    model = small_model(source_family)
    state = dict(quantized_model(quantized).checkpoint.floats)
    for layer, weight in quantized_model(quantized).checkpoint.layers.items():
        state[f"{layer}.weight"] = weight.dequantize()
    model.model.diffusion_model.load_state_dict(state)
    return model


def quantized_model(patcher):
    """What the pack attached to a quantized MODEL."""
    from quanttune.host.build import quantized_model as attached

    return attached(patcher)


def random_scales(patcher, num_experts=4, amount=0.1, seed=3, with_s_in=True, **metadata):
    """A scale set around 1 for every layer of a quantized MODEL."""
    from quanttune.host.routing import layer_shapes
    from quanttune.quant import LayerScales, ScaleMetadata, ScaleSet

    generator = torch.Generator().manual_seed(seed)

    def around_one(n):
        return 1 + amount * torch.randn(num_experts, n, generator=generator)

    layers = {name: LayerScales(around_one(out), around_one(inp) if with_s_in else None)
              for name, (out, inp) in layer_shapes(patcher.model.diffusion_model).items()}
    return ScaleSet(layers, num_experts, 1000, ScaleMetadata(**metadata))


def relative(a, b):
    """Largest difference over the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def small_vision(folder, kind: str = "clip_vision_model", width: int = 128, seed: int = 0):
    """The host's CLIP_VISION of two layers with random weights: CLIP, SigLIP or DINOv2.

    width: of the embedding (a CLIP's projection). The host's loader itself knows full sizes only.
    """
    import json

    from comfy.clip_vision import ClipVisionModel

    config = {"hidden_size": 32, "image_size": 28, "patch_size": 14, "num_channels": 3,
              "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64,
              "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "model_type": kind}
    if kind == "clip_vision_model":
        config["projection_dim"] = width
    if kind == "dinov2":
        config |= {"hidden_size": width, "use_swiglu_ffn": False}
    path = folder / "vision.json"
    path.write_text(json.dumps(config))
    vision = ClipVisionModel(str(path))
    generator = torch.Generator().manual_seed(seed)
    state = {k: torch.randn(v.shape, generator=generator) / max(1, v[0].numel() if v.dim() > 1
                                                               else 4) ** 0.5
             for k, v in vision.get_sd().items()}
    missing, unexpected = vision.load_sd(state)
    assert not missing and not unexpected
    return vision


def projecting_clip(weight=None):
    """The starter's CLIP with a random text projection; its own is the identity."""
    from quanttune.starter.load import FOLDER, load_clip

    clip = load_clip(str(FOLDER / "clip.safetensors"), disable_dynamic=True)
    if weight is None:
        weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)) / 128 ** 0.5
    clip.cond_stage_model.clip_l.transformer.text_projection.weight.copy_(weight)
    return clip
