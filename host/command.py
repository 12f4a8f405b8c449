"""The command line's training: the nodes' own code, told by a TOML file instead of a graph."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..quant import QuantSpec, QuantTuneError, save_scale_set
from ..training.config import ScaleTraining
from .command_checks import VALIDATION, check_base, check_validation, run_watched, validation_of

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

_IMAGES = {"folder": str, "captions": str, "phrase": str, "resolution": int, "fit": str,
           "caption_column": str, "limit": int}
SECTIONS: dict[str, dict[str, type] | None] = {
    "base": {"starter": bool, "checkpoint": str, "quantized_unet": str, "bits": int,
             "keep_float": str, "device": str, "nf4": bool, "lora": str},
    "images": _IMAGES,
    "class_images": _IMAGES,
    "validation": VALIDATION,
    "output": {"folder": str, "scales": str, "lora": str, "trackers": list},
    "training": None,
}
"""The words of each section and what they are; those of [training] are those of
`ScaleTraining` or `LoraTraining`."""
TYPE_NAMES = {str: "a text in quotes", int: "a whole number", bool: "true or false",
              list: "a list", float: "a number"}


def read_config(path: str | Path) -> dict[str, dict[str, Any]]:
    """The sections of a configuration file; ``images`` is a list of tables, one a subject.

    Raises QuantTuneError for a file that is missing, no TOML, or has unknown words.
    """
    try:
        config = tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise QuantTuneError(f"The configuration {path} cannot be read ({error.strerror}); give "
                             "the path of a TOML file.") from error
    except (ValueError, RecursionError) as error:  # also for a number of thousands of digits
        raise QuantTuneError(f"The configuration {path} is no valid TOML: {error}.") from error
    for name, values in config.items():
        if name not in SECTIONS:
            raise QuantTuneError(f"The configuration {path} has a section [{name}]; the sections "
                                 f"are {', '.join(SECTIONS)}.")
        several = name == "images" and isinstance(values, list)
        for table in values if several else [values]:
            _check_table(path, name, table)
    for name in ("base", "images", "output"):
        if name not in config:
            raise QuantTuneError(f"The configuration {path} has no section [{name}]; add one.")
    if isinstance(config["images"], Mapping):
        config["images"] = [config["images"]]
    if not config["images"]:
        raise QuantTuneError(f"The configuration {path} has no [images]; add a folder of them.")
    for name in config["output"].get("trackers", []):
        if not isinstance(name, str):
            raise QuantTuneError(f"The configuration {path} has {name!r} among the trackers in "
                                 "[output]; they are texts in quotes.")
    check_validation(path, config)
    return config


def _check_table(path, name: str, table: Any) -> None:
    """Raise QuantTuneError for a section that is no table, or holds what it should not."""
    if not isinstance(table, Mapping):
        raise QuantTuneError(f"In the configuration {path}, '{name}' has to be a section: "
                             f"[{name}] on a line of its own, then a line for each setting.")
    known = SECTIONS[name]
    if known is None:
        return
    for word, value in table.items():
        if word not in known:
            raise QuantTuneError(f"The configuration {path} has '{word}' in [{name}]; "
                                 f"known there are {', '.join(sorted(known))}.")
        if type(value) is not known[word] and (type(value), known[word]) != (int, float):
            raise QuantTuneError(f"The configuration {path} has {word} = {value!r} in [{name}]; "
                                 f"it has to be {TYPE_NAMES[known[word]]}.")


def train_scales(path: str | Path) -> int:
    """Train as a configuration file says; Ctrl-C stops after the step and keeps everything.

    Under ``accelerate launch`` each process trains on its share of the batch.
    """
    config = read_config(path)
    check_base(path, config["base"], scales=True)
    training = ScaleTraining.from_dict(config.get("training", {}))
    start_host(config["base"].get("device", "auto"))
    import torch
    from accelerate import Accelerator

    from ..training.history import usable_trackers
    from ..training.run_lock import alone
    from ..training.trainer import ScaleTrainer
    from .encode import encode, encode_empty
    from .train import scale_watcher
    from .training import training_copy

    folder, target, trackers = output_of(config, path, "scales", "lora")
    with torch.inference_mode():
        model, clip, vae, name = load_quantized(config["base"])
        images = images_of(config)
        data = encode(images, model, clip, vae, folder / ".cache")
        empty = encode_empty(model, clip, data) if training.caption_dropout else None
    with training_copy(model, training.precision) as denoiser:
        accelerator = Accelerator(cpu=denoiser.device.type == "cpu", project_dir=str(folder),
                                  log_with=usable_trackers(trackers) or None)
        metadata = _metadata(denoiser, model, name, images.subject, training)
        main, look = accelerator.is_main_process, validation_of(config, training.seed, clip, vae)
        with alone(folder, accelerator):
            trainer = ScaleTrainer(denoiser, data, training, folder, metadata, empty, trackers,
                                   accelerator)
            watcher = scale_watcher(denoiser, training, look, folder) if main and look else None
            result = run_watched(trainer, watcher, Console(main))
    if accelerator.is_main_process:
        save_scale_set(target, result.scale_set)
        done = len(result.history)
        print(f"{training.mode}: {done} of {training.steps} steps, "
              f"{result.scale_set.num_parameters:,} scales in {target}")
        if result.message:
            print(result.message, file=sys.stderr)
    return 0 if result.finished else 130


def output_of(config: Mapping, path, word: str, other: str) -> tuple[Path, Path, list[str]]:
    """``(folder, file of what is learnt, trackers)`` of [output], the folders made.

    Raises QuantTuneError for places that cannot be written, and for ``other``, the word of
    another command, in place of ``word``.
    """
    output = config["output"]
    if other in output:
        raise QuantTuneError(f"The configuration {path} has '{other}' in [output], which this "
                             f"command does not write; write '{word}'.")
    folder = Path(output.get("folder", "run"))
    target = Path(output.get(word, folder / f"{word}.safetensors"))
    if os.path.isdir(target):
        raise QuantTuneError(f"The file {target}, '{word}' of [output] in {path}, is a folder; "
                             "give the name of a file.")
    for place in (folder, target.parent):
        make_folder(place, f"of [output] in {path}")
    try:
        # As long as the name it has while it is written; only looked for.
        os.lstat(f"{target}.00000000.tmp")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise QuantTuneError(f"The file {str(target)[-100:]!r}, '{word}' of [output] in {path}, "
                             f"cannot be written ({getattr(error, 'strerror', None) or error}); "
                             "choose another name.") from error
    return folder, target, list(output.get("trackers", []))


def make_folder(folder: Path, whose: str) -> None:
    """Before anything is computed: a folder that cannot be written would be found out last.

    ``whose`` says in the message where the user named it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # the latter for a NUL
        raise QuantTuneError(f"The folder {str(folder)!r} {whose} cannot be written "
                             f"({getattr(error, 'strerror', None) or error}); choose another one."
                             ) from error


def start_host(device: str) -> None:
    """Set the host's options as its command line would, before anything imports its models."""
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import torch
    from comfy.cli_args import args

    if device not in ("auto", "cpu", "cuda"):
        raise QuantTuneError(f"The device is {device!r}, but it has to be auto, cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise QuantTuneError("The device is cuda, but PyTorch finds no graphics card that it can "
                             "use; choose auto or cpu, or install PyTorch for your card.")
    args.cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    args.use_pytorch_cross_attention = True
    if not args.cpu and torch.cuda.is_available():
        # Before the host chooses: under `accelerate launch` each process has a card of its own.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


def load_float(base: Mapping[str, Any]):
    """``(float MODEL, CLIP, VAE, name)`` of ``starter`` or ``checkpoint``."""
    import comfy.sd

    if base.get("starter"):
        from ..starter.load import load_starter

        return *load_starter(), "starter"
    if not base.get("checkpoint"):
        raise QuantTuneError("[base] needs 'checkpoint' (a file with text encoder and VAE) or "
                             "'starter = true'.")
    name = str(base["checkpoint"])
    if not os.path.isfile(name):
        raise QuantTuneError(f"The checkpoint {name!r} is not there; give the path of a file "
                             "with model, text encoder and VAE.")
    try:
        model, clip, vae = comfy.sd.load_checkpoint_guess_config(name)[:3]
    except Exception as error:  # whatever the host meets in a file that is none
        raise QuantTuneError(f"The file {name} is no checkpoint that ComfyUI can load "
                             f"({_reason(error)}); give one with model, text encoder and VAE."
                             ) from error
    if None in (model, clip, vae):
        raise QuantTuneError(f"The checkpoint {name} lacks a model, text encoder or VAE; give "
                             "a file with all three.")
    return model, clip, vae, Path(name).name


def _reason(error: Exception) -> str:
    """Why a file could not be loaded, in words that a user can do something with."""
    # PyTorch advises to load such a file all the same, which would run the code in it.
    if (
            type(error).__name__ == "UnpicklingError"
            or isinstance(error, (LookupError, EOFError, AttributeError))):
        return "it is damaged, or holds more than tensors"
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def load_quantized(base: Mapping[str, Any]):
    """``(quantized MODEL, CLIP, VAE, name)``."""
    from .build import load_model
    from .quantize import quantize_model

    model, clip, vae, name = load_float(base)
    if base.get("quantized_unet"):
        path = str(base["quantized_unet"])
        return load_model(path, Path(path).name), clip, vae, Path(path).name
    spec = QuantSpec(base.get("bits", 4), range="mse")
    model, _ = quantize_model(model, spec, base.get("keep_float", "none"), name=name)
    return model, clip, vae, name


def images_of(config):
    """All subjects' pictures, and class images."""
    from .images import read_folder

    found = None
    tables = [(t, False) for t in config["images"]]
    if "class_images" in config:
        tables.append((config["class_images"], True))
    for table, prior in tables:
        if "folder" not in table:
            raise QuantTuneError("[images] needs 'folder', the path of the pictures.")
        reading = read_folder(str(table["folder"]), **{k: v for k, v in table.items()
                                                       if k != "folder"}, prior=prior)
        for warning in reading.warnings:
            print(warning, file=sys.stderr)
        found = reading.images if found is None else found.joined(reading.images)
    return found


def _metadata(denoiser, model, name, subject, training):
    from ..quant import ScaleMetadata
    from .build import quantized_model

    bits = [w.bits for w in quantized_model(model).checkpoint.layers.values()]
    return ScaleMetadata(base_fingerprint=quantized_model(model).fingerprint, base_name=name,
                         subject=subject,
                         bits=max(set(bits), key=bits.count),
                         extra={"mode": training.mode, "settings": training.asdict()})


class Console:
    """The trainer's callback: a line now and then, and Ctrl-C."""

    def __init__(self, speaks: bool):
        self.speaks, self.stopped = speaks, False
        signal.signal(signal.SIGINT, self._stop)

    def _stop(self, *_):
        self.stopped = True

    def __call__(self, progress) -> bool:
        """Told after each step; True asks the trainer to stop."""
        record = progress.record
        if self.speaks and (record.step % 10 == 0 or record.step in (1, progress.steps)):
            recent = [r.loss for r in progress.trainer.history[-25:]]
            left = int((progress.steps - record.step) * progress.seconds_per_step)
            print(f"step {record.step}/{progress.steps}  loss {sum(recent) / len(recent):.4f}  "
                  f"{progress.seconds_per_step:.2f} s a step, {left // 60}:{left % 60:02d} left",
                  flush=True)
        return self.stopped
