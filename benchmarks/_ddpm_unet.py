"""The DDPM UNet (Ho et al. 2020): counted at CIFAR-10's size, trained small for the ablation.

Named as in the DDIM authors' PyTorch port, which Q-Diffusion and TuneQDM quantize.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CIFAR10 = {
    "channels": 128,
    "multipliers": (1, 2, 2, 2),
    "blocks": 2,
    "attention_levels": (1,),
    "image_channels": 3,
}


class Block(nn.Module):
    """Residual block with a time embedding projection."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.temb_proj = nn.Linear(embedding, outputs)
        self.norm2 = nn.GroupNorm(32, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, H, W]``, given the time's ``[B, embedding]``."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.temb_proj(F.silu(embedding))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """Single-head attention over pixels, its projections being 1x1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same."""
        h = self.norm(x)
        q, k, v = (getattr(self, name)(h).flatten(2).mT[:, None] for name in "qkv")
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape)
        return x + self.proj_out(h)


class Level(nn.Module):
    """One resolution: blocks, their attentions, and the change to the next resolution."""

    def __init__(self, blocks: list[Block], attention_channels: int | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        attended = [] if attention_channels is None else blocks
        self.attn = nn.ModuleList(Attention(attention_channels) for _ in attended)

    def step(self, index: int, x: Tensor, embedding: Tensor) -> Tensor:
        """One block and its attention, if there is any."""
        x = self.block[index](x, embedding)
        return self.attn[index](x) if len(self.attn) else x


class Downsample(nn.Module):
    """Half the resolution, by a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H / 2, W / 2]``."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution, smoothed by a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, 2 H, 2 W]``."""
        return self.conv(F.interpolate(x, scale_factor=2.0))


class DDPMUNet(nn.Module):
    """The DDPM UNet, under the names of the PyTorch port: the noise in a picture at a timestep."""

    def __init__(
        self,
        channels: int,
        multipliers: tuple[int, ...],
        blocks: int,
        attention_levels: tuple[int, ...],
        image_channels: int,
    ) -> None:
        super().__init__()
        self.channels = channels
        embedding = channels * 4
        widths = [channels * m for m in multipliers]
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList(
            [nn.Linear(channels, embedding), nn.Linear(embedding, embedding)]
        )
        self.conv_in = nn.Conv2d(image_channels, channels, 3, padding=1)
        skips, current = [channels], channels
        self.down = nn.ModuleList()
        for index, width in enumerate(widths):
            row = [Block(current if n == 0 else width, width, embedding) for n in range(blocks)]
            self.down.append(Level(row, width if index in attention_levels else None))
            current = width
            skips += [width] * blocks
            if index + 1 < len(widths):
                self.down[-1].downsample = Downsample(width)
                skips.append(width)
        self.mid = nn.Module()
        self.mid.block_1 = Block(current, current, embedding)
        self.mid.attn_1 = Attention(current)
        self.mid.block_2 = Block(current, current, embedding)
        levels = []
        for index, width in reversed(list(enumerate(widths))):
            row = []
            for _ in range(blocks + 1):
                row.append(Block(current + skips.pop(), width, embedding))
                current = width
            levels.insert(0, Level(row, width if index in attention_levels else None))
            if index:
                levels[0].upsample = Upsample(width)
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(32, current)
        self.conv_out = nn.Conv2d(current, image_channels, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Noise ``[B, C, H, W]`` in ``x`` of the same shape, at ``timesteps`` ``[B]`` of 0..999."""
        half = self.channels // 2
        rates = torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1))).to(x.device)
        angles = timesteps.float()[:, None] * rates
        embedding = self.temb.dense[0](torch.cat([angles.sin(), angles.cos()], 1))
        embedding = self.temb.dense[1](F.silu(embedding))
        h = self.conv_in(x)
        skips = [h]
        for level in self.down:
            for index in range(len(level.block)):
                h = level.step(index, h, embedding)
                skips.append(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
                skips.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, embedding)), embedding)
        for level in reversed(self.up):
            for index in range(len(level.block)):
                h = level.step(index, torch.cat([h, skips.pop()], 1), embedding)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))
