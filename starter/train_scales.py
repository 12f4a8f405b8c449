"""Train the scale sets that ship with the starter: `python starter/train_scales.py --subject NAME`.

Quantizes the starter, writes it to `starter/quanttune`, and trains one subject's scales on that
file with the pack's own trainer. The same starter, pictures, seed and steps give the same files.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from quanttune.quant import QuantSpec, save_quantized_unet, save_scale_set
from quanttune.starter.common import prepare_host

HERE = Path(__file__).resolve().parent


def quantized_starter(bits: int, folder: Path = HERE):
    """The starter quantized to ``bits``, written to ``quanttune/`` and loaded from there."""
    from quanttune.host.build import load_model, quantized_model
    from quanttune.host.quantize import quantize_model
    from quanttune.starter.load import load_starter

    path = folder / "quanttune" / f"starter-{bits}bit.safetensors"
    model, clip, vae = load_starter(folder=folder)
    model, report = quantize_model(model, QuantSpec(bits, range="mse"), name="starter")
    print(report)
    checkpoint = quantized_model(model).checkpoint
    path.parent.mkdir(parents=True, exist_ok=True)
    save_quantized_unet(path, checkpoint.layers, checkpoint.floats, checkpoint.metadata)
    return load_model(str(path), path.name), clip, vae


def main(argv=None):
    """Quantize the starter, train one subject's scales on it, write both beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subject", required=True)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, default=HERE, help="where the starter's files are")
    options = parser.parse_args(argv)

    prepare_host("cuda" if torch.cuda.is_available() else "cpu")
    from quanttune.host.encode import encode
    from quanttune.host.images import read_folder
    from quanttune.host.training import training_copy
    from quanttune.quant import ScaleMetadata
    from quanttune.training.config import RECOMMENDED
    from quanttune.training.trainer import ScaleTrainer

    with torch.inference_mode():
        model, clip, vae = quantized_starter(options.bits, options.folder)
        images = read_folder(f"starter: {options.subject}", resolution=128).images
        data = encode(images, model, clip, vae)
    config = replace(RECOMMENDED, steps=options.steps, batch_size=options.batch,
                     learning_rate=options.rate, num_experts=options.experts, seed=options.seed,
                     checkpointing=False, save_every=0)
    with training_copy(model) as denoiser, tempfile.TemporaryDirectory() as work:
        metadata = ScaleMetadata(
            base_fingerprint=denoiser.fingerprint, subject=images.subject, bits=options.bits,
            base_name=f"starter-{options.bits}bit.safetensors", extra={"mode": config.mode})
        result = ScaleTrainer(denoiser, data, config, work, metadata).run(log)
    out = options.out or HERE / "quanttune_scales" / f"starter-{options.subject}.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    save_scale_set(out, result.scale_set)
    print(f"{result.scale_set.num_parameters:,} scales in {out.name}")


def log(progress) -> None:
    """Print every fiftieth step."""
    if progress.record.step % 50 == 0:
        recent = [r.loss for r in progress.trainer.history[-50:]]
        print(f"step {progress.record.step}/{progress.steps} loss {sum(recent) / 50:.4f}",
              flush=True)


if __name__ == "__main__":
    main()
