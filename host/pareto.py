"""The Pareto front of a MODEL: uniform bits, searched plans and integer products, measured."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.model_management as management
import comfy.utils
import torch

from ..metrics.layer_times import LayerTimes
from ..metrics.pareto import Point
from ..metrics.sensitivity import Sensitivity
from ..metrics.similarity import ssim
from ..quant import QuantSpec, QuantTuneError
from ..quant.limits import is_finite
from ..quant.plan import FLOAT_BYTES
from .benchmark import one_step, wait_for
from .build import quantized_model
from .dynamic_int8 import dynamic_int8, fast_float, float_changes
from .plan import SEARCHED, TIME, bit_plan
from .quantize import quantizable_layers, quantize_model
from .samples import Samples
from .sensitivity import SensitivitySettings, record_forwards

FLOAT = "float"


@dataclass(frozen=True)
class Candidates:
    """What is compared with the float model.

    Attributes:
        bits: uniform widths.
        budgets: bits a weight of searched plans.
        int8: *Dynamic INT8*, too.
        rounds: of timed steps, the float model's and a candidate's in turns.
        pictures: made with each and compared by SSIM; 0 for none.
        time_budgets: of searched plans for *Dynamic INT8*, over the time of a step in float.
    """

    bits: tuple[int, ...] = (8, 4, 3, 2)
    budgets: tuple[float, ...] = ()
    int8: bool = True
    rounds: int = 5
    pictures: int = 0
    time_budgets: tuple[float, ...] = ()


def budgets_of(text: str) -> tuple[float, ...]:
    """Bits a weight, separated by commas or blanks. Raises QuantTuneError for anything else."""
    return _numbers(text, 1, 16, "among the budgets is no number of bits from 1 to 16; write "
                                 "something like '3, 4, 5, 6, 8'")


def time_budgets_of(text: str) -> tuple[float, ...]:
    """Shares of a time, separated by commas or blanks. Raises QuantTuneError for anything else."""
    return _numbers(text, 0.01, 1, "among the time budgets is no share of the float model's time "
                                   "from 0.01 to 1; write something like '0.6, 0.8'")


def _numbers(text: str, least: float, most: float, wrong: str) -> tuple[float, ...]:
    found = []
    for word in text.replace(",", " ").split():
        try:
            value = float(word)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise QuantTuneError(f"'{word}' {wrong}.")
        found.append(value)
    return tuple(dict.fromkeys(found))


def pareto(patcher, vae, latent: dict, positive: Sequence, negative: Sequence,
           how: SensitivitySettings, candidates: Candidates, sensitivity: Sensitivity | None = None,
           node_id: str | None = None, times: LayerTimes | None = None) -> list[Point]:
    """Quantize a float MODEL in several ways and measure size, time, error and pictures of each.

    Args:
        patcher: float MODEL.
        vae: the host's, for pictures; else None.
        latent, positive, negative, how: what the models are run on.
        candidates: the ways.
        sensitivity: of the same model, for searched plans.
        node_id: of the node that shows progress, or None.
        times: of the same model, for plans of a time.

    Raises:
        QuantTuneError: a quantized MODEL, no candidate, plans without a sensitivity or times,
            pictures without a VAE, or float ones that hold NaN. A candidate that computes NaN
            is a point whose error is NaN.
    """
    if quantized_model(patcher) is not None:
        raise QuantTuneError("This MODEL is quantized already; connect the float model, which is "
                             "quantized here in several ways.")
    if (candidates.budgets or candidates.time_budgets) and sensitivity is None:
        raise QuantTuneError("Searched plans need a sensitivity; connect 'Layer Sensitivity', or "
                             "clear the budgets.")
    if candidates.time_budgets and times is None:
        raise QuantTuneError("Plans of a time need the layers' times; connect 'Layer Times', or "
                             "clear the time budgets.")
    if candidates.pictures and vae is None:
        raise QuantTuneError("Pictures need a VAE; connect it, or set pictures to 0.")
    ways = _ways(patcher, candidates, sensitivity, times, how.range)
    if not ways:
        raise QuantTuneError("There is nothing to compare; switch on some bits or write budgets.")
    samples = Samples(latent, positive, negative, how)
    if candidates.pictures and not samples.generates:
        raise QuantTuneError("Pictures are made from noise; connect 'Empty Latent Image', or set "
                             "pictures to 0.")
    layers = {n: m.weight.numel() for n, m in quantizable_layers(patcher.model).items()}
    numel = sum(layers.values())
    bar = comfy.utils.ProgressBar(len(ways) + 1, node_id=node_id)
    record = record_forwards(patcher, samples, how.forwards)
    floats = _pictures(patcher, vae, samples, candidates.pictures)
    if floats is not None and not is_finite(floats):
        raise QuantTuneError("The pictures of the float MODEL hold NaN or infinite values already; "
                             "run the VAE in float32 (--fp32-vae), or set pictures to 0.")
    points = [Point(FLOAT, numel * FLOAT_BYTES, 8.0 * FLOAT_BYTES, 1.0, 0.0,
                    1.0 if candidates.pictures else None, False)]
    bar.update(1)
    changes = float_changes(patcher)
    if changes and (candidates.int8 or candidates.time_budgets):
        # First, so that integers are not praised for what bfloat16 and attention gain.
        ways = {", ".join([FLOAT, *changes]): lambda: fast_float(patcher), **ways}
    for name, make in ways.items():
        management.throw_exception_if_processing_interrupted()
        model = make()
        management.load_models_gpu([model])
        quantized = quantized_model(model).checkpoint.layers
        weights = sum(w.nbytes for w in quantized.values()) + sum(
            count * FLOAT_BYTES for n, count in layers.items() if n not in quantized)
        error = record.error(model)
        made = _pictures(model, vae, samples, candidates.pictures)
        alike = None
        if made is not None and is_finite(made):
            alike = float(ssim(made, floats).mean())
        elif made is not None:
            error = math.nan
        points.append(Point(name, weights, 8 * weights / numel,
                            _time(patcher, model, samples, how.cfg, candidates.rounds), error,
                            alike, bool(quantized)))
        bar.update(1)
        del model, quantized  # before the next one is made
    return points


def _ways(patcher, candidates: Candidates, sensitivity, times,
          range_: str) -> dict[str, Callable]:
    """Name to a function that makes the MODEL, one at a time so that memory holds one."""
    ways: dict[str, Callable] = {}
    for bits in candidates.bits:
        ways[f"{bits} bits"] = lambda b=bits: quantize_model(
            patcher, QuantSpec(b, range=range_))[0]
    for budget in candidates.budgets:
        plan, _ = bit_plan(patcher, SEARCHED, sensitivity, budget)
        if plan.kept() == set(plan.bits):
            raise QuantTuneError(f"A budget of {budget:g} bits leaves every layer in float, which "
                                 "is compared in any case; ask for less.")
        ways[f"plan {budget:g}"] = lambda p=plan: quantize_model(
            patcher, QuantSpec(4, range=range_), plan=p)[0]
    for share in candidates.time_budgets:
        plan, _ = bit_plan(patcher, SEARCHED, sensitivity, 0.0, times, TIME, share)
        if plan.kept() == set(plan.bits):
            raise QuantTuneError(f"A time budget of {share:g} leaves every layer in float, which "
                                 "is compared in any case; ask for less.")
        ways[f"time plan {share:g}"] = lambda p=plan: dynamic_int8(
            patcher, precision=times.precision, plan=p)[0]
    if candidates.int8:
        ways["INT8 products"] = lambda: dynamic_int8(patcher)[0]
    return ways


def _pictures(patcher, vae, samples: Samples, count: int) -> torch.Tensor | None:
    """``[n, 3, H, W]`` in 0..1, from the noise and prompts of the first samples."""
    if not count:
        return None
    found = [vae.decode(samples.run(patcher, index))[:1].float().cpu() for index in range(count)]
    return torch.cat([p.reshape(-1, *p.shape[-3:])[:1] for p in found]).movedim(-1, 1).clamp(0, 1)


def _time(reference, patcher, samples: Samples, cfg: float, rounds: int) -> float:
    """A step's time over the float model's: the median of the rounds' ratios."""
    device = management.get_torch_device()

    def step(model):
        management.load_models_gpu([model])
        wait_for(device)
        start = time.perf_counter()
        one_step(model, samples.latent, samples.positive[0], samples.negative, cfg)
        wait_for(device)
        return time.perf_counter() - start

    step(reference), step(patcher)
    return statistics.median(step(patcher) / step(reference) for _ in range(rounds))
