"""The file that TuneQDM's authors save (``tuneqdm_state.pt``), read safely.

It holds a mapping ``delta_state`` and a mapping ``config`` (older ones the first alone). Of each
layer there are ``weight_int`` (int8 of the weight's shape), ``zero_point`` ``[out, 1, ...]``,
``delta_out_experts`` ``[N, out, 1, ...]`` and ``delta_in_experts`` ``[N, 1, in, ...]``; of
everything else the biases alone, which is why a base has to give the weights of the norms.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .errors import QuantTuneError
from .limits import INTEGER_TYPES, LARGEST_SCALE, LARGEST_ZERO, is_finite, is_whole, largest
from .spec import SUPPORTED_BITS
from .tensor_file import load_unpickled

STATE, CONFIG, OURS, OUR_SCALES = "delta_state", "config", "quanttune", "quanttune_scales"
"""Keys of the file; the last two are in files of this program only, and others look past them."""
INTEGERS, ZERO, OUT, IN = "weight_int", "zero_point", "delta_out_experts", "delta_in_experts"
ALONE = {"delta_out": OUT, "delta_in": IN}
"""Names of the scales where there are no experts, without their dimension."""
PREFIXES = ("module.", "_orig_mod.", "unet.")
"""Before all names, when the model was saved from inside a wrapper."""
DEFAULT_STEPS = 1000
SCALED = "scaled"
"""In our note: name in diffusers of each layer of the scale set, to whether it has input scales."""
AGAIN = "save or download it again"


@dataclass(frozen=True)
class StateLayer:
    """A layer as the authors hold it.

    Attributes:
        integers: ``[out, in, *kernel]`` signed integers, or None in a file of scales alone.
        zero_point: ``[out]`` float32 of whole numbers, or None as above.
        s_out: ``[N, out]`` float32, the whole output scales.
        s_in: ``[N, in]`` float32, or None for ones.
        bits: that the integers are packed to: 2, 3, 4 or 8.
        s0, z: ``[out]`` float32 in a file that this program wrote, else None: what the weight was
            quantized with, zero points with the sign of their zeros.
    """

    integers: Tensor | None
    zero_point: Tensor | None
    s_out: Tensor
    s_in: Tensor | None
    bits: int
    s0: Tensor | None = None
    z: Tensor | None = None


@dataclass(frozen=True)
class TuneqdmState:
    """What a file holds.

    Attributes:
        layers: name in diffusers to `StateLayer`.
        floats: every other tensor by its name there.
        config: the authors' settings as they stand in the file; may be empty.
        num_experts, num_timesteps: N and T.
        width: bits of the signed integers, 1 to 8.
        ours: what this program noted in a file of its own, else empty.
    """

    layers: dict[str, StateLayer]
    floats: dict[str, Tensor]
    config: dict[str, Any]
    num_experts: int
    num_timesteps: int
    width: int = 8
    ours: dict[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the float UNet as far as the file tells, by diffusers' name."""
        found = {f"{name}.weight": tuple(layer.integers.shape)
                 for name, layer in self.layers.items() if layer.integers is not None}
        found |= {name: tuple(value.shape) for name, value in self.floats.items()}
        for name in self.floats:  # a norm's weight is not in the file, and is as long as its bias
            layer, dot, last = name.rpartition(".")
            if last == "bias" and layer not in self.layers:
                found.setdefault(f"{layer}{dot}weight", tuple(self.floats[name].shape))
        return found


def is_state(found: object) -> bool:
    """Whether what a PyTorch file holds is such a state, or one that lacks its scales."""
    endings = tuple(f".{piece}" for piece in (INTEGERS, OUT, IN, *ALONE))
    return isinstance(found, dict) and (STATE in found or any(
        isinstance(key, str) and key.endswith(endings) for key in found))


def read_state(path: str | os.PathLike[str]) -> TuneqdmState:
    """Read a file of the authors, or of `save_state`; nothing in it can run.

    Raises:
        QuantTuneError: a file that is missing, damaged or something else, a layer that lacks a
            piece or has one of another shape, numbers that are not finite, integers outside of the
            bit width that the file says.
    """
    path = os.fspath(path)
    found = load_unpickled(path)
    if not is_state(found):
        raise QuantTuneError(f"The file {path} is no state of TuneQDM: it has no {STATE} with "
                             f"{OUT}; choose the tuneqdm_state.pt of a training.")
    config = found.get(CONFIG) if STATE in found else None
    config = {} if config is None else config
    ours, scales = _ours(found if STATE in found else {})
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise _damaged(path, "its config is no mapping of settings")
    tensors = found.get(STATE, found)
    if not isinstance(tensors, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()):
        raise _damaged(path, f"its {STATE} holds something else than tensors by name")
    while tensors and (prefix := next(
            (p for p in PREFIXES if all(key.startswith(p) for key in tensors)), "")):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    pieces, floats = _pieces(tensors)
    if not any(OUT in own for own in pieces.values()):
        raise QuantTuneError(f"The TuneQDM state {path} lacks the output scales ({OUT}) of every "
                             "layer; choose the tuneqdm_state.pt of a training.")
    experts = {t.shape[0] for own in pieces.values() for k, t in own.items()
               if k in (OUT, IN) and t.dim()}
    said = config.get("num_experts", max(experts, default=1))
    if type(said) is not int or said < 1 or {said} != experts:
        raise _damaged(path, f"it says {str(said)[:20]} experts and has scales of "
                             f"{', '.join(map(str, sorted(experts))) or 'none'}")
    steps = config.get("total_denoising_steps", DEFAULT_STEPS)
    if type(steps) is not int or not 0 < steps < 2**31:
        raise _damaged(path, f"its total_denoising_steps are {str(steps)[:20]}")
    symmetric = config.get("symmetric") is True
    widths = ours.get("bits", {})
    layers = {name: _layer(path, name, own, said, symmetric, scales.get(name))
              for name, own in pieces.items()}
    layers, width = _with_bits(path, layers, config.get("n_bits"), widths)
    for name, value in floats.items():
        _finite(path, name[:100], value)
    return TuneqdmState(layers, floats, dict(config), said, steps, width, ours)


def _finite(path: str, label: str, value: Tensor, limit: float = math.inf) -> Tensor:
    """A tensor of floats as float32; refused with NaN or with more than a model has."""
    numbers = value.to(torch.float32) if value.is_floating_point() else None
    if numbers is None or not is_finite(numbers):
        raise _damaged(path, f"{label} is not finite, or no float")
    if (most := largest(numbers)) > limit:
        raise _damaged(path, f"{label} has a value of {most:.3g}, which no model has")
    return numbers


def _damaged(path: str, how: str) -> QuantTuneError:
    return QuantTuneError(f"The TuneQDM state {path} is damaged: {how}; {AGAIN}.")


def _ours(found: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """This program's note, as far as it is what `to_state` writes."""
    try:
        facts = json.loads(found[OURS])
        bits, told, scaled = facts["bits"], facts.get("scales", {}), facts.get(SCALED, {})
        kinds = {"base_name": str, "subject": str, "bits": int, "steps": int, "seed": int,
                 "extra": dict}
        whole = isinstance(bits, dict) and all(type(b) is int for b in bits.values()) and all(
            type(told[key]) is kinds[key] for key in told) and isinstance(scaled, dict)
        scales = found[OUR_SCALES]
        whole = whole and all(isinstance(s, Tensor) and s.dtype == torch.float32
                              and s.dim() == 2 and len(s) == 2 and is_finite(s)
                              and bool((s[0] > 0).all()) for s in scales.values())
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}, {}
    return (facts, dict(scales)) if whole else ({}, {})


def _pieces(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]],
                                                    dict[str, Tensor]]:
    """The pieces of each layer, and what is no piece of one."""
    pieces: dict[str, dict[str, Tensor]] = {}
    floats: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name, _, last = key.rpartition(".")
        if last in ALONE:
            last, value = ALONE[last], value.unsqueeze(0)
        if name and last in (INTEGERS, ZERO, OUT, IN):
            pieces.setdefault(name, {})[last] = value
        else:
            floats[key] = value
    return pieces, floats


def _layer(path: str, name: str, own: Mapping[str, Tensor], experts: int, symmetric: bool,
           own_scales: Tensor | None) -> StateLayer:
    """Check the pieces of a layer; its bits are not known yet."""
    label = name[:100]
    integers, s_out, s_in = own.get(INTEGERS), own.get(OUT), own.get(IN)
    if s_out is None:
        raise _damaged(path, f"the layer {label} has no {OUT}")
    out = s_out.shape[1] if s_out.dim() > 1 else 0
    if integers is not None and not integers.dim():
        raise _damaged(path, f"{label}.{INTEGERS} is a single number, no weight")
    shape = tuple(integers.shape) if integers is not None else (
        out, s_in.shape[2] if s_in is not None and s_in.dim() > 2 else 0)
    wanted = {OUT: (experts, shape[0]), IN: (experts, 1, *shape[1:2])}
    if integers is not None and (integers.dtype not in INTEGER_TYPES or integers.dim() < 2
                                 or not integers.numel()):
        raise _damaged(path, f"{label}.{INTEGERS} is {list(shape)} {integers.dtype}, no integer "
                             "weight")
    scales: dict[str, Tensor | None] = {OUT: None, IN: None}
    for piece, value in ((OUT, s_out), (IN, s_in)):
        if value is None:
            continue
        start = wanted[piece]
        if tuple(value.shape[:len(start)]) != start or value.numel() != math.prod(start):
            raise _damaged(path, f"{label}.{piece} has the shape {list(value.shape)}, which does "
                                 f"not fit {experts} experts of a weight {list(shape)}")
        scales[piece] = _finite(path, f"{label}.{piece}", value, LARGEST_SCALE).reshape(
            experts, -1)
    zero = own.get(ZERO)
    if zero is None and symmetric:
        zero = torch.zeros(shape[0])
    if zero is None and integers is not None:
        raise _damaged(path, f"the layer {label} has no {ZERO}")
    if zero is not None:
        if zero.numel() != shape[0]:
            raise _damaged(path, f"{label}.{ZERO} has the shape {list(zero.shape)}, which does not "
                                 f"fit a weight {list(shape)}")
        if not zero.is_floating_point() and zero.dtype not in INTEGER_TYPES:
            raise _damaged(path, f"{label}.{ZERO} is {zero.dtype}, no numbers")
        zero = zero.flatten().to(torch.float32)
        if not is_whole(zero):
            raise _damaged(path, f"{label}.{ZERO} is not whole numbers")
        _finite(path, f"{label}.{ZERO}", zero, LARGEST_ZERO)
    s0, z = own_scales if own_scales is not None and own_scales.shape[1:] == shape[:1] else (
        None, None)
    return StateLayer(integers, zero, scales[OUT], scales[IN], 8, s0, z)


def _with_bits(path: str, layers: Mapping[str, StateLayer], said: object,
               widths: Mapping[str, int]) -> tuple[dict[str, StateLayer], int]:
    """The layers with the bits they are packed to; integers outside of what is said are refused."""
    if said is not None and (type(said) is not int or not 1 <= said <= 8):
        raise _damaged(path, f"its n_bits are {str(said)[:20]}, not 1 to 8")
    spans = {name: [int(v) for v in torch.aminmax(layer.integers)]
             for name, layer in layers.items() if layer.integers is not None}
    found = max((_width(*span) for span in spans.values()), default=8)
    width = said or found
    fitted = {}
    for name, layer in layers.items():
        own = widths.get(name, width)
        if own > 8 or (name in spans and _width(*spans[name]) > own):
            low, high = spans.get(name, (0, 0))
            raise _damaged(path, f"it says {min(own, 8)} bits and the layer {name[:100]} has "
                                 f"integers from {low} to {high}")
        integers = None if layer.integers is None else layer.integers.to(torch.int8)
        bits = next(b for b in SUPPORTED_BITS if b >= own)
        fitted[name] = replace(layer, integers=integers, bits=bits)
    return fitted, width


def _width(low: int, high: int) -> int:
    """Bits that signed integers from ``low`` to ``high`` need."""
    return max((-low - 1).bit_length() if low < 0 else 0, high.bit_length() if high > 0 else 0) + 1
