"""The readers of upscalers."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .readers_host import json_files, settled, stored_sums, sums
from .run import Files, Reader
from .scratch import folder_files


def upscaler_seeds() -> list[Files]:
    """A tiny x4 upscaler's folder."""
    from quanttune.tests.host.upscalers import tiny_pipeline

    return [folder_files(lambda path: tiny_pipeline().save_pretrained(path / "x4"))]


def read_upscaler(folder: Path, target: str) -> list[dict[str, Tensor]]:
    """What *Load SD 4x Upscale* reads before it builds."""
    from quanttune.host import upscaler_diffusers as parts

    path = folder / "x4"
    parts.check_pipeline(path)
    return [
        part.state for part in (parts.read_unet(path), parts.read_vae(path), parts.read_text(path))
    ]


def check_upscaler(files: Files, found: list[dict[str, Tensor]]) -> str | None:
    """The UNet's and the VAE's numbers are those of the files."""
    for part, state in zip(("unet", "vae"), found):
        wanted = stored_sums(
            files, [n for n in files if n.startswith(f"x4/{part}/") and n.endswith(".safetensors")]
        )
        if isinstance(wanted, str):
            return wanted
        if sums(state.values()) != wanted:
            return f"the {part} has other numbers than its files"
    return None


def load_whole_upscaler(folder: Path, target: str) -> dict[str, Tensor]:
    """*Load SD 4x Upscale* on a folder, to the MODEL."""
    from quanttune.host.load_upscaler import load_folder

    model, _, _ = load_folder(folder / "x4")
    return dict(model.model.diffusion_model.state_dict())


def small(name: str) -> bool:
    """All but the upscaler's table of words, which is larger than the rest."""
    return not name.startswith("x4/text_encoder/model")


def readers() -> list[Reader]:
    """All of this file."""
    return [
        Reader(
            "upscaler folder",
            upscaler_seeds,
            settled(read_upscaler),
            check_upscaler,
            small,
            share=0.06,
        ),
        Reader(
            "upscaler folder to MODEL",
            upscaler_seeds,
            settled(load_whole_upscaler),
            lambda f, t: None,
            json_files,
            share=0.04,
        ),
    ]
