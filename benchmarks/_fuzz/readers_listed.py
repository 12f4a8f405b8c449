"""What looks at files to list them, and the files that ship with the pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quanttune.quant.qdiffusion import is_qdiffusion
from quanttune.quant.safe_file import is_cut_short

from . import readers_host, readers_pickled, readers_pictures, readers_quant
from .run import Files, Reader
from .scratch import written

ROOT = Path(__file__).resolve().parents[2]


def listing_seeds() -> list[Files]:
    """Files of every kind that lies in a model folder."""
    return [
        *readers_quant.unet_seeds()[:1],
        *readers_quant.plain_seeds(),
        *readers_pickled.pickled_seeds("a.pt"),
        *readers_pickled.qdiffusion_seeds()[:1],
        *readers_pickled.tuneqdm_seeds()[:1],
        {
            n.removeprefix("sd/"): v
            for n, v in readers_host.pipeline().items()
            if not n.endswith(".safetensors")
        },
        *readers_pictures.dataset_seeds("parquet")[:1],
        *readers_pictures.dataset_seeds("arrow")[:1],
    ]


def read_listing(folder: Path, target: str) -> Any:
    """What a node's list of choices asks of each file and folder."""
    from quanttune.host import tuneqdm, unet_files, upscaler_files
    from quanttune.host.bnb_file import is_bnb_file
    from quanttune.host.captions import metadata_file
    from quanttune.host.dataset_folder import is_dataset
    from quanttune.host.model_places import is_pipeline
    from quanttune.host.unet_source import is_unet

    path = str(folder / target)
    unet_files._KINDS.clear()
    upscaler_files._KINDS.clear()
    names = [p.name for p in folder.iterdir()]
    metadata_file(folder)
    return [
        unet_files._holds_unet(path),
        unet_files._holds_diffusers_unet(str(folder), names),
        bool(upscaler_files.file_kind(path)),
        upscaler_files._is_upscaler(str(folder)),
        is_bnb_file(path),
        tuneqdm.is_tuneqdm(path),
        is_qdiffusion(path),
        is_dataset(folder),
        is_pipeline(str(folder), names),
        is_unet(folder),
        is_cut_short(path),
    ]


def check_listing(files: Files, found: Any) -> str | None:
    """Each of them says yes or no."""
    odd = [f for f in found if type(f) is not bool]
    return f"an answer {odd[0]!r:.80}" if odd else None


def starter_seeds() -> list[Files]:
    """The starter's text encoder and UNet, the latter's weights left as they are."""
    return [
        {
            n: (ROOT / "starter" / n).read_bytes()
            for n in ("clip.safetensors", "unet.safetensors", "vae.safetensors")
        }
    ]


def read_starter(folder: Path, target: str) -> Any:
    """*Load Starter Model*."""
    from quanttune.starter.load import load_starter

    model, clip, vae = load_starter(folder=folder)
    return {
        **model.model.diffusion_model.state_dict(),
        **clip.cond_stage_model.state_dict(),
        **vae.first_stage_model.state_dict(),
    }


def upscaler_seeds() -> list[Files]:
    """The small upscaler."""
    return [
        {"x.safetensors": (ROOT / "starter" / "upscale" / "starter-x4.safetensors").read_bytes()}
    ]


def read_upscaler(folder: Path, target: str) -> Any:
    """*Load SD 4x Upscale* on a file that names its own sizes."""
    from quanttune.starter.load_upscaler import load_starter_upscaler

    model, _, vae = load_starter_upscaler(folder / target)
    return {**model.model.diffusion_model.state_dict(), **vae.first_stage_model.state_dict()}


def tuneqdm_seeds() -> list[Files]:
    """A state of TuneQDM that the pack wrote itself, with its note."""
    from quanttune.host.tuneqdm import export_tuneqdm
    from quanttune.tests.host import models

    with torch.inference_mode():
        quantized, _ = models.quantize(models.small_model(), 4, split_shortcuts=False)
        checkpoint = models.quantized_model(quantized).checkpoint
        return [{"s.pt": written("s.pt", lambda path: export_tuneqdm(checkpoint, path))}]


def read_tuneqdm(folder: Path, target: str) -> Any:
    """*Load Quantized UNet* on a state, before it builds."""
    from quanttune.host.tuneqdm import read_tuneqdm

    found, scales, _ = read_tuneqdm(folder / target)
    return readers_host.checkpoint_tensors(found) | {
        str(i): t for i, t in enumerate(scales.tensors())
    }


def read_encoded(folder: Path, target: str) -> Any:
    """Pictures that a training has encoded before; what is damaged is encoded again."""
    from quanttune.host.encode import _read

    return _read(folder / target, "quanttune.latent")


def check_encoded(files: Files, found: Any) -> str | None:
    """Nothing, or the finite numbers of the file."""
    if found is None:
        return None
    wanted = readers_quant.told(files["x.safetensors"])
    if isinstance(wanted, str):
        return wanted
    return readers_quant.differing(found, wanted[1]) or readers_quant.finite(wanted[1])


def encoded_seeds() -> list[Files]:
    """A latent in the cache."""
    from quanttune.quant.whole_file import write_safetensors

    return [
        {
            "x.safetensors": written(
                "x.safetensors",
                lambda path: write_safetensors(
                    path, {"latent": torch.ones(4, 8, 8)}, {"format": "quanttune.latent"}
                ),
            )
        }
    ]


def read_losses(folder: Path, target: str) -> Any:
    """The losses of a run."""
    from quanttune.training.history import read_losses

    return read_losses(folder)


def loss_seeds() -> list[Files]:
    """Three steps."""
    return [
        {
            "loss.csv": b"step,loss,rate,expert,gradient_norm\r\n1,0.5,0.001,-1,2.5\r\n"
            b"2,0.25,1e-05,0,0.1\r\n3,nan,0.0,3,0.0\r\n"
        }
    ]


def check_finite(files: Files, found: Any) -> str | None:
    """Whatever was read is finite."""
    odd = [n for n, t in found.items() if not bool(t.float().isfinite().all())]
    return f"{odd[0]} is not finite" if odd else None


def readers() -> list[Reader]:
    """All of this file."""
    run = readers_host.settled
    return [
        Reader("TuneQDM state to UNet", tuneqdm_seeds, run(read_tuneqdm), check_finite, share=0.05),
        Reader("starter model", starter_seeds, run(read_starter), check_finite, share=0.03),
        Reader("small upscaler", upscaler_seeds, run(read_upscaler), check_finite, share=0.03),
        Reader("encoded pictures", encoded_seeds, read_encoded, check_encoded, share=1),
        Reader("losses", loss_seeds, read_losses, lambda files, found: None, share=0.5),
        Reader("listings", listing_seeds, run(read_listing), check_listing, quiet=True, share=0.15),
    ]
