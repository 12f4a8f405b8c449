"""Which colours the small upscaler's latents show: `python starter/upscaler_preview.py`.

While it samples, the host shows the latent itself, each place's four numbers as one colour. The
factors it comes with belong to the full-size upscaler's autoencoder, and give this one's pictures
false colours. Here they are fitted by least squares to the shipped autoencoder's latents of
training scenes; what is printed stands in `upscaler_config.py`.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

if __package__ in (None, ""):
    import runpy

    runpy.run_module("quanttune.starter.upscaler_preview", run_name="__main__", alter_sys=True)
    raise SystemExit

from .generator import SIZE, render
from .upscaler_config import FACTOR, SCALE_FACTOR
from .upscaler_data import scene_of


def scenes(count: int, first: int = 0) -> torch.Tensor:
    """Training scenes, large: (count, 512, 512, 3) in 0..1."""
    large = [render(scene_of(first + i), SIZE * FACTOR) for i in range(count)]
    return torch.from_numpy(np.stack(large)).float() / 255


def colours(pictures: torch.Tensor) -> torch.Tensor:
    """The mean of each 4 x 4 pixels of pictures (n, h, w, 3) in 0..1: (n, h/4, w/4, 3), -1..1."""
    means = torch.nn.functional.avg_pool2d(pictures.movedim(-1, 1), FACTOR)
    return means.movedim(1, -1) * 2 - 1


@torch.inference_mode()
def fit(vae, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Factors (4, 3) and bias (3,) from latents, as the diffusion model sees them, to colours in
    -1..1, and how far they are off (root of the mean square, same units).

    vae: the host's VAE; pictures: (n, h, w, 3) in 0..1.
    """
    latents = torch.cat([vae.encode(p[None]).float().cpu() for p in pictures]) * SCALE_FACTOR
    seen = latents.movedim(1, -1).reshape(-1, 4).double()
    wanted = colours(pictures).reshape(-1, 3).double()
    seen = torch.cat([seen, torch.ones(len(seen), 1, dtype=seen.dtype)], 1)
    found = torch.linalg.lstsq(seen, wanted).solution
    off = (seen @ found - wanted).square().mean().sqrt()
    return found[:4], found[4], float(off)


def main(argv: list[str] | None = None) -> None:
    """Print the factors and the bias."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=64, help="of scenes")
    args = parser.parse_args(argv)
    from .common import prepare_host

    prepare_host("cpu")
    from .load_upscaler import load_vae
    from .upscaler_config import FILE

    with torch.inference_mode():
        vae = load_vae(str(FILE))
    factors, bias, off = fit(vae, scenes(args.count))
    for row in factors:
        print([round(float(v), 4) for v in row])
    print("bias", [round(float(v), 4) for v in bias], "off", round(off, 4))


if __name__ == "__main__":
    main()
