"""Small members of the x4 upscaler's family, built by the host itself, random weights."""

from __future__ import annotations

import torch

CONTEXT = 32
UNET = {
    "image_size": 32, "in_channels": 7, "out_channels": 4, "use_checkpoint": False,
    "use_spatial_transformer": True, "legacy": False, "num_res_blocks": [1, 1, 1, 1],
    "channel_mult": [1, 2, 2, 4], "model_channels": 32, "context_dim": CONTEXT,
    "transformer_depth": [0, 1, 1, 1], "transformer_depth_output": [0, 0, 1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1, "use_linear_in_transformer": True, "adm_in_channels": None,
    "use_temporal_attention": False,
}
VAE = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3,
       "ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}


def small_upscaler(seed: int = 0):
    """A MODEL (ModelPatcher, float32) of an x4 upscaler as the host's loaders give it."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD_X4Upscaler(UNET)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    randomize(model.diffusion_model, seed)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(model, device, torch.device("cpu"))


def small_vae(seed: int = 1, **changes):
    """The host's VAE that enlarges four times."""
    import comfy.ldm.models.autoencoder
    import comfy.sd

    config = {"ddconfig": {**VAE, **changes}, "embed_dim": 4}
    model = comfy.ldm.models.autoencoder.AutoencoderKL(**config)
    randomize(model, seed)
    vae = comfy.sd.VAE(model.state_dict(), config={"params": config}, dtype=torch.float32)
    vae.downscale_ratio = vae.upscale_ratio = 4
    return vae


def randomize(module, seed: int) -> None:
    """Weights that keep signals of about one; norms near the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / max(parameter[0].numel(), 1) ** 0.5)
            else:
                parameter.copy_(0.1 * noise + float(name.endswith("weight")))


def prompt(seed: int = 0, tokens: int = 7):
    """CONDITIONING of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, tokens, CONTEXT, generator=generator), {}]]


def image(height: int, width: int, count: int = 1, channels: int = 3, seed: int = 0):
    """An IMAGE batch of smooth random pictures."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    picture = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return picture.movedim(1, -1).contiguous()


def predicting(model, function):
    """A clone of ``model`` whose prediction of the clean latent is a function of its own.

    function: of the noisy latent, its sigma ``[batch, 1, 1, 1]``, and the low-resolution image,
    all as large as the tile.
    """
    def wrapper(apply_model, arguments):
        sigma = arguments["timestep"].view(-1, 1, 1, 1)
        return function(arguments["input"], sigma, arguments["c"]["c_concat"])

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


def pictures(height: int, width: int) -> dict[str, torch.Tensor]:
    """Named kinds of IMAGE: what seams show on, and what they hide in."""
    down = torch.linspace(0, 1, height)[:, None]
    across = torch.linspace(0, 1, width)[None]
    generator = torch.Generator().manual_seed(5)
    glyphs = (torch.rand(-(-height // 5), -(-width // 3), generator=generator) > 0.6).float()
    text = glyphs.repeat_interleave(5, 0).repeat_interleave(3, 1)[:height, :width]
    text[(torch.arange(height) // 5) % 2 == 1] = 0
    grey = {"gradient": 0.7 * down + 0.3 * across, "flat": torch.full((height, width), 0.6),
            "text": 1 - text, "noise": torch.rand(height, width, generator=generator)}
    return {name: torch.stack([g, 1 - g, 0.5 * g + 0.25], -1)[None].contiguous()
            for name, g in grey.items()}


def seam_energy(picture: torch.Tensor, vertical, horizontal) -> float:
    """How much stronger the differences across tile borders are than elsewhere.

    picture: ``[channels, height, width]``. vertical, horizontal: `Strip`s of its rows and columns.
    Returns the mean absolute difference between neighbours across borders inside of the picture
    over that between all others; the larger one of both directions.
    """
    return max(at / elsewhere for at, elsewhere in _steps(picture, vertical, horizontal))


def added_steps(tiled: torch.Tensor, whole: torch.Tensor, vertical, horizontal) -> float:
    """The steps that tiling put in at tile borders, in units of the picture's own elsewhere.

    Unlike `seam_energy` it sees a seam in a picture that is full of edges, since only what tiling
    changed counts.
    """
    changed = _steps(tiled - whole, vertical, horizontal)
    own = _steps(whole, vertical, horizontal)
    return max(at / elsewhere for (at, _), (_, elsewhere) in zip(changed, own))


def _steps(picture: torch.Tensor, vertical, horizontal) -> list[tuple[float, float]]:
    """Mean differences between neighbours across borders, and elsewhere, for each direction."""
    found = []
    for dim, strip in ((1, vertical), (2, horizontal)):
        borders = {b for start in strip.starts for b in (start, start + strip.length)}
        borders = torch.tensor(sorted(borders - {0, strip.size})) - 1
        step = picture.diff(dim=dim).abs().mean(dim=(0, 3 - dim))
        if len(borders):
            across = torch.zeros(len(step), dtype=torch.bool)
            across[borders] = True
            found.append((step[across].mean().item(), step[~across].mean().item()))
    return found
