"""The layers of the DDPM UNet for CIFAR-10 (Ho et al. 2020), for counting: no forward.

Named as in the DDIM authors' PyTorch port, which Q-Diffusion and TuneQDM quantize.
"""

from __future__ import annotations

from torch import nn

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


class Attention(nn.Module):
    """Single-head attention over pixels, its projections being 1x1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, nn.Conv2d(channels, channels, 1))


class Level(nn.Module):
    """One resolution: blocks, their attentions, and the change to the next resolution."""

    def __init__(self, blocks: list[Block], attention_channels: int | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        attended = [] if attention_channels is None else blocks
        self.attn = nn.ModuleList(Attention(attention_channels) for _ in attended)


class Resample(nn.Module):
    """The convolution of a down- or upsampling."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3)


class DDPMUNet(nn.Module):
    """All parameters of the DDPM UNet, under the names of the PyTorch port."""

    def __init__(
        self,
        channels: int,
        multipliers: tuple[int, ...],
        blocks: int,
        attention_levels: tuple[int, ...],
        image_channels: int,
    ) -> None:
        super().__init__()
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
                self.down[-1].downsample = Resample(width)
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
                levels[0].upsample = Resample(width)
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(32, current)
        self.conv_out = nn.Conv2d(current, image_channels, 3, padding=1)
