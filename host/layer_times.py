"""Seconds of each layer of a MODEL in float and in integers, on what a sampler gives it to read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import comfy.model_management as management
import comfy.utils
import torch

from ..metrics.layer_times import LayerTimes, take_turns
from ..quant import QuantizedWeight, QuantTuneError, shortcut_splits
from .benchmark import machine, one_step, wait_for
from .build import quantized_model
from .dynamic_int8 import SPEC, fast_float
from .explain import explained
from .int8 import backend_for, integer_product
from .ops import scaled_layers
from .samples import Samples
from .sensitivity import SensitivitySettings

STEP = "step"
"""Stands for the whole step among what is timed; layers are pairs."""
ON_A_CARD = 1e-3
"""Seconds that one measurement takes at least on a graphics card, whose calls return at once."""


@dataclass
class _Case:
    """What layers with one shape of weight and input have in common.

    Attributes:
        module: one of them.
        split: input channels of the first part of its weight, or None.
        x: what it read.
        calls: layer name to how often it reads such an input in a step.
        ready: what multiplies integers in its place, or None.
    """

    module: torch.nn.Module
    split: int | None
    x: torch.Tensor
    calls: dict[str, int] = field(default_factory=dict)
    ready: object = None


def layer_times(patcher, latent: dict, positive: Sequence, negative: Sequence, cfg: float = 7.0,
                rounds: int = 5, precision: str = "auto",
                node_id: str | None = None) -> LayerTimes:
    """Measure each layer of a float MODEL as float and as product of integers.

    One step of the sampler shows what each layer reads; then layers, one of each shape, and the
    whole step take turns. Attention is PyTorch's where *Dynamic INT8* would take it. A layer is
    timed alone: a tensor that query, key and value quantize together counts for each of them.

    Args:
        patcher: float MODEL, LoRAs included.
        latent: the host's LATENT: size and batch.
        positive, negative: CONDITIONING.
        cfg: guidance; 1 runs the model once a step instead of for both prompts.
        rounds: of measurements, whose median counts.
        precision: of what is float, as in *Dynamic INT8*.
        node_id: of the node that shows progress, or None.

    Raises:
        QuantTuneError: a quantized MODEL, no prompt or latent, no integer products on this
            machine, or a MODEL that cannot run on these inputs.
    """
    if quantized_model(patcher) is not None:
        raise QuantTuneError("This MODEL is quantized already; connect the float model, whose "
                             "layers are timed both ways.")
    if rounds < 1:
        raise QuantTuneError(f"rounds is {rounds}, but it has to be at least 1.")
    samples = Samples(latent, positive, negative, SensitivitySettings(cfg=cfg))
    device = management.get_torch_device()
    model = fast_float(patcher, precision)
    management.load_models_gpu([model], force_full_load=True)
    layers = scaled_layers(model.model.diffusion_model)

    def step():
        one_step(model, samples.latent, samples.positive[0], samples.negative, cfg)

    shape = list(samples.latent.shape)
    with _watching(layers) as cases, explained(
            f"The model cannot run on latents of shape {shape} and this conditioning ({{reason}}); "
            "connect what was made for this model."):
        step()
    for case in cases.values():
        management.throw_exception_if_processing_interrupted()
        case.ready = _integers(case)
    if not any(case.ready for case in cases.values()):
        _refuse(layers, device)
    ways: dict[Hashable, Callable] = {STEP: step}
    for key, case in cases.items():
        ways[key, "float"] = _timed(case, None)
        if case.ready is not None:
            ways[key, "integers"] = _timed(case, case.ready)
    bar = comfy.utils.ProgressBar(len(ways) * (rounds + 1), node_id=node_id)

    def before():
        management.throw_exception_if_processing_interrupted()
        bar.update(1)

    least = ON_A_CARD if device.type == "cuda" else 0.0
    seconds = take_turns(ways, rounds, lambda: wait_for(device), least, before)
    floats = dict.fromkeys(layers, 0.0)
    integers: dict[str, float | None] = dict.fromkeys(layers)
    for key, case in cases.items():
        for name, count in case.calls.items():
            floats[name] += count * seconds[key, "float"]
            if case.ready is not None:
                integers[name] = (integers[name] or 0.0) + count * seconds[key, "integers"]
    shapes = {name: tuple(m.weight.shape) for name, m in layers.items()}
    together = sum(floats.values()) / seconds[STEP]
    if together > 1:
        # Alone each fills the caches anew: told in proportion, so that the step is what it is.
        floats = {n: s / together for n, s in floats.items()}
        integers = {n: None if s is None else s / together for n, s in integers.items()}
    kind = str(model.model.manual_cast_dtype or model.model.get_dtype())
    height, width = samples.latent.shape[-2:]
    setting = (f"{machine(device)}; float is {kind.removeprefix('torch.')}; latents {height} x "
               f"{width}, batch {len(samples.latent)}, guidance {cfg:g}; median of {rounds} "
               f"rounds, {len(cases)} kinds of layers.")
    if together > 1:
        setting += (f" The layers, each alone, took {together:.2f} x the time of the whole step; "
                    "their times are scaled down to it.")
    return LayerTimes(shapes, floats, integers, seconds[STEP], precision, setting)


@contextmanager
def _watching(layers: dict[str, torch.nn.Module]) -> Iterator[dict[tuple, _Case]]:
    """Inside, collect the cases that the forwards of the layers make up."""
    cases: dict[tuple, _Case] = {}
    shapes = {name: tuple(m.weight.shape) for name, m in layers.items()}
    splits = shortcut_splits(shapes)

    def look(name):
        def hook(module, args):
            x = args[0]
            walk = (module.stride, module.padding, module.dilation,
                    module.groups) if isinstance(module, torch.nn.Conv2d) else None
            weight = module.weight
            key = (shapes[name], weight.device, weight.dtype, walk, module.bias is None,
                   splits.get(name), tuple(x.shape), x.stride(), x.dtype)
            if key not in cases:
                # A copy: the model may go on to write into it. Its order in memory is kept, gaps
                # between its rows are not.
                cases[key] = _Case(module, splits.get(name), x.detach().clone())
            calls = cases[key].calls
            calls[name] = calls.get(name, 0) + 1
        return hook

    hooks = [module.register_forward_pre_hook(look(name)) for name, module in layers.items()]
    try:
        yield cases
    finally:
        for hook in hooks:
            hook.remove()


def _integers(case: _Case):
    """Of a layer whose weight is on the device, as for the products of a forward; else None."""
    module = case.module
    backend, _ = backend_for(module)
    if module.weight.device != case.x.device or backend is None:
        return None
    packed = QuantizedWeight.quantize(module.weight.detach().float(), SPEC, case.split)
    return integer_product(module, packed, backend)


def _timed(case: _Case, ready) -> Callable:
    """A call of the layer as the model makes it, in float or with what multiplies integers."""
    def run():
        case.module.int8 = ready
        try:
            return case.module(case.x)
        finally:
            case.module.int8 = None
    return run


def _refuse(layers: dict[str, torch.nn.Module], device: torch.device) -> None:
    largest = max(layers.values(), key=lambda m: m.weight.numel())
    backend, refused = backend_for(largest, device)
    reasons = "; ".join(f"{n}: {reason}" for n, reason in refused.items())
    if backend is not None or not reasons:
        reasons = "its weights do not fit the memory there"
    raise QuantTuneError(f"Integer products are not available on {device} for any layer of this "
                         f"MODEL ({reasons}), so that no plan can save time; use a plan of a size.")
