"""The command line's LoRA training: the node's own code, told by a TOML file instead of a graph."""

from __future__ import annotations

import sys
from pathlib import Path

from ..quant import QuantTuneError
from ..training.lora_config import LoraTraining
from .command import (
    Console,
    images_of,
    load_float,
    load_quantized,
    output_of,
    read_config,
    start_host,
)
from .command_checks import check_base, run_watched, validation_of


def train_lora(path: str | Path) -> int:
    """Train as a configuration file says; Ctrl-C stops after the step and keeps everything.

    Under ``accelerate launch`` each process trains on its share of the batch. Returns the exit
    status.
    """
    config = read_config(path)
    words = dict(config.get("training", {}))
    epochs = words.pop("epochs", 0)
    if type(epochs) is not int or epochs < 0:
        raise QuantTuneError(f"The configuration {path} has epochs = {epochs!r} in [training]; it "
                             "has to be a whole number of at least 0.")
    training, base = LoraTraining.from_dict(words), config["base"]
    check_base(path, base, scales=False)
    start_host(base.get("device", "auto"))
    import torch
    from accelerate import Accelerator

    from ..training.history import usable_trackers
    from ..training.lora_trainer import LoraTrainer
    from ..training.run_lock import alone
    from .encode import encode, encode_empty
    from .lora_file import read_lora, save_lora
    from .lora_train import AS_IT_IS, NF4, exported_lora, key_of, lora_watcher, pupil

    folder, target, trackers = output_of(config, path, "lora", "scales")
    start = read_lora(base["lora"]) if base.get("lora") else None
    with torch.inference_mode():
        load = load_quantized if "quantized_unet" in base or "bits" in base else load_float
        model, clip, vae, _ = load(base)
        images = images_of(config)
        data = encode(images, model, clip, vae, folder / ".cache")
        empty = encode_empty(model, clip, data) if training.caption_dropout else None
    with pupil(model, training, NF4 if base.get("nf4") else AS_IT_IS, clip, start) as learner:
        device = learner.denoiser.device
        accelerator = Accelerator(cpu=device.type == "cpu", project_dir=str(folder),
                                  log_with=usable_trackers(trackers) or None)
        if epochs:
            # Each process takes a batch of its own, so that they see the images sooner.
            training = training.replace(steps=data.steps(
                epochs, training.batch_size * accelerator.num_processes,
                training.gradient_accumulation))

        def keep(place, layers):
            return save_lora(place, exported_lora(layers, learner, model, clip, training,
                                                  target.stem, images.subject, trainer.step))

        main, look = accelerator.is_main_process, validation_of(config, training.seed, clip, vae)
        with alone(folder, accelerator):
            trainer = LoraTrainer(
                learner.denoiser, learner.learns, data, training, folder, empty, learner.reader,
                key_of(start), keep, trackers, accelerator)
            watcher = lora_watcher(learner, training, look, folder) if main and look else None
            result = run_watched(trainer, watcher, Console(main))
        if main:
            keep(target, result.layers)
            print(f"{training.mode} on {learner.bits}: {len(result.history)} of {training.steps} "
                  f"steps, {result.num_parameters:,} parameters in {target}")
            for note in learner.notes(training):
                print(note)
            if result.message:
                print(result.message, file=sys.stderr)
    return 0 if result.finished else 130
