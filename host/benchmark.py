"""Benchmark Model: steps of several MODELs that take turns, as the sampler runs them."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence

import comfy.model_management as management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch

from ..metrics.cost import Cost, CostReport
from ..metrics.memory import peak_memory
from ..quant import QuantTuneError
from .explain import explained
from .int8 import forget_prepared


def benchmark(models: Sequence[tuple[str, object]], latent: dict, positive, negative, cfg: float,
              runs: int, warm_up: int, steps: int, node_id: str | None = None) -> CostReport:
    """Measure one step of each MODEL, round by round, so that a drift of the machine meets all.

    A step is what the sampler does at the middle of the schedule: guidance, conditioning and the
    host's own work included, text encoder and VAE not.

    Args:
        models: name and MODEL of each; the first is what the others are compared with.
        latent: the host's LATENT: size and batch.
        positive, negative: CONDITIONING that all of them understand.
        cfg: guidance; 1 runs the model once a step instead of for both prompts.
        runs: timed steps of each.
        warm_up: steps before them, at least one, whose first is told apart.
        steps: that a picture takes, for pictures an hour.
        node_id: of the node that shows progress, or None.

    Raises:
        QuantTuneError: fewer than one run, or a MODEL that cannot run on these inputs.
    """
    if runs < 1 or warm_up < 1 or steps < 1:
        raise QuantTuneError("runs, warm_up and steps have to be at least 1.")
    samples = latent["samples"]
    if not samples.numel() or not len(positive):
        raise QuantTuneError("There is nothing to run the models on; connect 'Empty Latent Image' "
                             "and a prompt.")
    device = management.get_torch_device()
    bar = comfy.utils.ProgressBar(len(models) * (runs + warm_up + 1), node_id=node_id)

    def step(name, patcher):
        management.throw_exception_if_processing_interrupted()
        start = time.perf_counter()
        with explained(f"The model '{name}' cannot run on this latent and conditioning "
                       "({reason}); connect models of one family."):
            one_step(patcher, samples, positive, negative, cfg)
        wait_for(device)
        bar.update(1)
        return time.perf_counter() - start

    first, peaks = [], []
    for name, patcher in models:
        # Alone on the card, so that its peak is its own.
        management.unload_all_models()
        management.soft_empty_cache()
        management.load_models_gpu([patcher])
        # Integers that an earlier run, or another model that shares them, has laid out already.
        forget_prepared(patcher.model)
        # The first step, too: a processor's allocator keeps what was freed, and integer products
        # lay out their weights then.
        with peak_memory(device) as found:
            first.append(step(name, patcher))
            step(name, patcher)
        peaks.append(found.extra)
    for _ in range(warm_up - 1):
        for name, patcher in models:
            management.load_models_gpu([patcher])
            step(name, patcher)
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(runs):
        for own, (name, patcher) in zip(seconds, models):
            management.load_models_gpu([patcher])
            wait_for(device)
            own.append(step(name, patcher))
    costs = tuple(Cost(name, tuple(own), warm, patcher.model_size(), peak)
                  for (name, patcher), own, warm, peak in zip(models, seconds, first, peaks))
    return CostReport(costs, len(samples), steps, _setting(device, samples, runs))


def one_step(patcher, samples, positive, negative, cfg) -> None:
    """One step from the middle of the schedule."""
    samples = comfy.sample.fix_empty_latent_channels(patcher, samples)
    noise = comfy.sample.prepare_noise(samples, 0)
    sigma = float(patcher.get_model_object("model_sampling").percent_to_sigma(0.5))
    comfy.sample.sample_custom(patcher, noise, cfg, comfy.samplers.sampler_object("euler"),
                               torch.tensor([sigma, 0.0]), positive, negative, samples,
                               disable_pbar=True, seed=0)


def wait_for(device: torch.device) -> None:
    """Until a graphics card has done all that it was told; a processor has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The device in words: of a processor how many threads compute, too."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return (f"{platform.processor() or platform.machine()}, {threads} "
            f"{'thread' if threads == 1 else 'threads'}")


def machine(device: torch.device) -> str:
    """Where something is measured, in words."""
    return f"{device_name(device)}, PyTorch {torch.__version__}"


def _setting(device, samples, runs: int) -> str:
    height, width = samples.shape[-2:]
    return (f"{machine(device)}; latents {height} x {width}, batch {len(samples)}; median of "
            f"{runs} steps each, taking turns.")
