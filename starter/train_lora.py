"""Train the LoRAs that ship with the starter: `python starter/train_lora.py --subject NAME`.

Trains a subject's LoRA on the starter's 4-bit file with the pack's own trainer. The same starter,
pictures, seed and steps give the same file.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from quanttune.starter.common import prepare_host
from quanttune.starter.train_scales import log

HERE = Path(__file__).resolve().parent
TARGETS = "attention + feed-forward + convolutions"


def main(argv=None):
    """Train one subject's LoRA, write it beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subject", required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)

    prepare_host("cuda" if torch.cuda.is_available() else "cpu")
    from quanttune.host.build import load_model
    from quanttune.host.encode import encode
    from quanttune.host.images import read_folder
    from quanttune.host.lora_file import save_lora
    from quanttune.host.lora_train import exported_lora, pupil
    from quanttune.starter.load import load_starter
    from quanttune.training.lora_config import LoraTraining
    from quanttune.training.lora_trainer import LoraTrainer

    out = options.out or HERE / "loras" / f"starter-{options.subject}-lora.safetensors"
    with torch.inference_mode():
        _, clip, vae = load_starter()
        path = HERE / "quanttune" / "starter-4bit.safetensors"
        model = load_model(str(path), path.name)
        images = read_folder(f"starter: {options.subject}", resolution=128).images
        data = encode(images, model, clip, vae)
    config = LoraTraining(steps=options.steps, batch_size=options.batch, rank=options.rank,
                          learning_rate=options.rate, targets=TARGETS, seed=options.seed,
                          checkpointing=False, save_every=0)
    with pupil(model, config) as learner, tempfile.TemporaryDirectory() as work:
        result = LoraTrainer(learner.denoiser, learner.learns, data, config, work).run(log)
        lora = exported_lora(result.layers, learner, model, clip, config, out.stem,
                             images.subject, options.steps)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_lora(out, lora, torch.float16)
    print(f"{result.num_parameters:,} parameters in {out.name}")


if __name__ == "__main__":
    main()
