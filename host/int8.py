"""Integer products in a MODEL: which layers, prepared when, from which weight."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from ..quant import LowRank, QuantizedWeight, QuantSpec
from ..quant.int8 import (
    BACKENDS,
    ActivationRanges,
    ConvGeometry,
    Granularity,
    Int8Layer,
    SharedActivation,
    choose,
)
from ..quant.paging import let_go, page_out
from .layout import is_uniform, unwrap
from .ops import scaled_layers

OPTION = "quanttune_int8"
"""Key in ``transformer_options`` of the `Int8Mode` of a forward."""
PATCHED = QuantSpec(8, symmetric=True)
"""How a weight is quantized again when a patch that is no plain LoRA has changed it."""


@dataclass(frozen=True)
class Int8Mode:
    """Which layers of a MODEL multiply integers, and how their activations are quantized.

    Attributes:
        layers: their names.
        granularity: what shares an activation scale; None for what suits the backend.
        ranges: calibrated ranges; layers without any take the range of the moment.
        model: the host's model, whose sampling says what its timesteps mean; needed with ranges.
        scales: what `routing.ScaleRouter.digest` was at the calibration, "" without scales. With
            others the activations are others, and ranges of the moment are taken.
        patches: the same of its patches, by `patches.changes_digest`.
    """

    layers: frozenset[str]
    granularity: Granularity | None = None
    ranges: ActivationRanges | None = None
    model: object = None
    scales: str = ""
    patches: str = ""


class _Ready:
    """An `Int8Layer` with its bias, and what both were made from."""

    def __init__(self, module, layer: Int8Layer):
        self.layer, self.bias = layer, module.bias
        for function in module.bias_function if self.bias is not None else ():
            self.bias = function(self.bias)
        if self.bias is not None:
            self.bias = self.bias.detach().float()

    def __call__(self, x, scales):
        return self.layer(x, self.bias, scales)


def prepare(diffusion_model, layers: dict, mode: Int8Mode | None, device: torch.device,
            buckets: tuple[int, ...] = ()) -> None:
    """Give each of ``layers`` what its next forward needs, or None for the ordinary path.

    Weights are brought into the backend's form once and kept, whatever clones do, until the host
    moves them. Called outside of compiled code, at the start of each forward.

    Args:
        device: of the activations. Weights that wait elsewhere for their turn (a model larger than
            the card's memory) take the ordinary path, for which the host fetches them.
        buckets: those of the samples, for static ranges.
    """
    shared = diffusion_model.__dict__.get("quanttune_int8")
    if mode is None and shared is None:
        return
    if shared is None:
        shared = diffusion_model.__dict__["quanttune_int8"] = defaultdict(SharedActivation)
    for activation in shared.values():
        activation.forget()
    ranges = None if mode is None else mode.ranges
    static = {} if ranges is None else ranges.select(buckets, device)
    for name, module in layers.items():
        wanted = mode is not None and name in mode.layers and module.weight.device == device
        module.int8 = _ready(shared, name, module, mode) if wanted else None
        if module.int8 is not None:
            module.int8.layer.static = static.get(name)
            module.int8.layer.low_rank = _beside(module)


def forget_prepared(model: torch.nn.Module) -> None:
    """Drop what `prepare` made of the weights of ``model``; its next forward makes it again."""
    for module in scaled_layers(model).values():
        module.int8 = module.int8_ready = None


def rest(model: torch.nn.Module) -> None:
    """Let the system drop the packed integers of ``model`` that `prepare` has made others of.

    Whoever read them since then (an observation, a file) is done.
    """
    for module in scaled_layers(model).values():
        if module.int8_ready is not None and is_uniform(module.weight):
            page_out(unwrap(module.weight).packed)


def _ready(shared: dict, name: str, module, mode: Int8Mode) -> _Ready | None:
    rounded_in = None if _beside(module) else module.low_rank
    weight = unwrap(module.weight).packed if is_uniform(module.weight) else module.weight
    source = (weight, *module.weight_function, rounded_in, module.bias,
              *module.bias_function, mode.granularity)
    known = module.int8_ready
    if known is None or not _same(known[0], source):
        # First what was there, so that a card need not hold both.
        module.int8 = module.int8_ready = None
        ready = _make(module, mode)
        parent, _, role = name.rpartition(".")
        if ready is not None and role in ("to_q", "to_k", "to_v"):
            ready.layer.shared = shared[parent]
        known = module.int8_ready = (source, ready)
    return known[1]


def _same(a: tuple, b: tuple) -> bool:
    return len(a) == len(b) and all(_same_one(x, y) for x, y in zip(a, b))


def _same_one(a, b) -> bool:
    """Whether two are one object, or tensors over the same memory: the host wraps a layer's weight
    anew whenever it takes a LoRA on or off."""
    if a is b or not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return a is b
    return (a.data_ptr(), a.shape, a.dtype, a.device) == (b.data_ptr(), b.shape, b.dtype, b.device)


def _make(module, mode: Int8Mode) -> _Ready | None:
    """None for a layer that cannot take integers: no backend, odd padding, unknown patches."""
    patches = module.weight_function
    if not is_uniform(module.weight):
        return None
    if not all(getattr(p, "is_lowvram_patch", False) for p in patches):
        return None
    backend, _ = backend_for(module)
    if backend is None:
        return None
    rounded_in = None if _beside(module) else module.low_rank
    packed = unwrap(module.weight, rounded_in)
    if patches or rounded_in is not None:
        packed = _patched(packed, patches)
    ready = integer_product(module, packed, backend, mode.granularity)
    # What it multiplies is its own; the packed integers are read again when something changes.
    page_out(unwrap(module.weight).packed)
    let_go(2 * module.weight.numel())
    return ready


def _beside(module) -> LowRank | None:
    """The plain LoRAs of a layer, which are computed beside the integers; None for those that a
    grouped convolution has to have in its weight."""
    return module.low_rank if getattr(module, "groups", 1) == 1 else None


def integer_product(module, packed: QuantizedWeight, backend,
                    granularity: Granularity | None = None):
    """What goes into the ``int8`` of one of our layers so that it multiplies ``packed``.

    ``backend`` is that of `backend_for`, ``granularity`` as in `Int8Mode`.
    """
    return _Ready(module, Int8Layer(packed, geometry(module), backend, granularity))


def _patched(packed: QuantizedWeight, patches) -> QuantizedWeight:
    """The weight with its patches, rounded to 8 bits whatever it had before."""
    weight = packed.dequantize()
    for patch in patches:
        weight = patch(weight)
    return QuantizedWeight.quantize(weight, PATCHED, packed.split)


def geometry(module) -> ConvGeometry | None:
    """How a Conv2d walks, or None for a Linear and for paddings that differ left and right."""
    if not isinstance(module, torch.nn.Conv2d):
        return None
    padding = module.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size)]
        if any(s % 2 for s in spans):
            return None
        padding = tuple(s // 2 for s in spans)
    return ConvGeometry(module.kernel_size, module.stride, padding, module.dilation, module.groups)


def backend_for(module, device: torch.device | None = None):
    """The backend that multiplies a Linear or Conv2d in integers, and why others do not.

    Returns:
        ``(backend or None, {name of a backend: reason})``.
    """
    conv = geometry(module)
    if conv is None and isinstance(module, torch.nn.Conv2d):
        return None, {"any": f"padding {module.padding} is not the same on both sides"}
    outputs, inputs = module.weight.shape[:2]
    channels = inputs * getattr(module, "groups", 1), outputs
    return choose(BACKENDS, device or module.weight.device, conv, channels)
