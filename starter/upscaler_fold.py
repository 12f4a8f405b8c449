"""Group norms that leave flat colours alone, in a form that the host need not know.

With two channels a group, a group norm maps any flat picture to plus and minus one: what colour it
was is lost, and a tile of a picture comes out in other colours than the whole. A larger eps cures
that, (x - m) / sqrt(v + eps) being nearly linear where v is smaller than eps, but the host's eps is
fixed. Multiplying what a norm reads by k is the same as dividing its eps by k squared:

    (k x - k m) / sqrt(k^2 v + eps) = (x - m) / sqrt(v + eps / k^2)

So the upscaler is trained with eps / k^2 (`soften`), and for the file every layer that writes what
a norm reads is multiplied by k (`fold`), which changes no output.
"""

from __future__ import annotations

import torch

UNET_SCALE = 1e-2
"""k of the UNet: eps 0.1 in residual blocks, 0.01 before attention."""
VAE_SCALE = 2e-3
"""k of the autoencoder: eps 0.25."""


def soften(model: torch.nn.Module, scale: float) -> torch.nn.Module:
    """Divide the eps of every group norm by the square of `scale`, in place."""
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps /= scale**2
    return model


@torch.no_grad()
def fold(model: torch.nn.Module, scale: float) -> torch.nn.Module:
    """Undo `soften` and scale the layers instead, in place; the model computes the same.

    model: a UNetModel, Encoder or Decoder of the host, or a module that holds some.
    """
    writers, carriers = _stream_layers(model)
    for layer in writers:
        layer.weight.mul_(scale)
    for layer in writers + carriers:
        if layer.bias is not None:
            layer.bias.mul_(scale)
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps *= scale**2
    return model


def _stream_layers(model: torch.nn.Module) -> tuple[list, list]:
    """Layers that turn normed or outside values into what norms read, and layers that read and
    write what norms read, of which only the bias is to be scaled."""
    import comfy.ldm.modules.diffusionmodules.model as vae
    import comfy.ldm.modules.diffusionmodules.openaimodel as unet
    from comfy.ldm.modules.attention import SpatialTransformer

    writers, carriers = [], []
    for module in model.modules():
        if isinstance(module, unet.UNetModel):
            writers.append(module.input_blocks[0][0])
        elif isinstance(module, unet.ResBlock):
            writers += [module.in_layers[2], module.out_layers[3]]
            if not module.use_scale_shift_norm:  # else it acts behind the norm
                writers.append(module.emb_layers[1])
            carriers.append(module.skip_connection)
        elif isinstance(module, unet.Downsample):
            carriers.append(module.op)
        elif isinstance(module, unet.Upsample | vae.Upsample | vae.Downsample):
            carriers.append(module.conv)
        elif isinstance(module, SpatialTransformer | vae.AttnBlock):
            writers.append(module.proj_out)
        elif isinstance(module, vae.Encoder | vae.Decoder):
            writers.append(module.conv_in)
        elif isinstance(module, vae.ResnetBlock):
            writers += [module.conv1, module.conv2]
            carriers.append(getattr(module, "nin_shortcut", None))
    return writers, [layer for layer in carriers if hasattr(layer, "bias")]
