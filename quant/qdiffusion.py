"""Checkpoints of Q-Diffusion (Li et al., ICCV 2023) as packed integers with their own scales.

Such a file holds the float weights and how to round them, all in float32:

    <layer>.weight, <layer>.bias                the original ones
    <layer>.weight_quantizer.delta              step of each output channel, [out, 1, ...]
    <layer>.weight_quantizer.zero_point         whole numbers, also outside of 0 .. 2**b - 1
    <layer>.weight_quantizer.alpha              AdaRound's choice for each weight
    <layer>.weight_quantizer_0.{...}            of a split shortcut's second inputs

and the integers are ``clamp(floor(weight / delta) + (alpha >= 0) + zero_point, 0, 2**b - 1)``, or
with ``round`` where there is no alpha. The bit width is not in the file. Quantizers of activations
are left out: they fit the authors' fixed ranges alone.

Nothing is read before it is needed, and then a few rows at a time.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import QuantTuneError
from .limits import INTEGER_TYPES, LARGEST_SCALE, LARGEST_ZERO, is_finite, is_whole, largest
from .paging import let_go
from .qdiffusion_layer import QDiffusionLayer, Rounding
from .qdiffusion_names import FIRST, without_prefix
from .safe_file import refuse_pipe
from .spec import SUPPORTED_BITS
from .torch_archive import StoredTensor, TensorArchive, is_archive

SECOND = ".weight_quantizer_0."
ACTIVATIONS = ".act_quantizer"
PARTS = ("delta", "zero_point", "alpha")
WIDTHS = ((64.0, 8), (10.0, 4), (5.0, 3))
"""Steps between a channel's lowest and highest weight, and the bits of more than that; else 2."""
LEAST_USED = 4
"""A declared width is refused when a typical channel uses less than this part of its integers."""
MOST_CUT, DOUBTFUL_CUT = 0.6, 0.25
"""Parts of all weights that a width, declared or found, may cut off at an end of its range: with
more than the first it is refused, with more than the second it is told. Steps searched for the
least error cut off the tails alone (below 0.2); one bit too few cuts half of all weights, two bits
most of them."""
PICKLED, NAMES_WITHIN = b"\x80", 2**20
"""How a file of torch's old format begins, and in how many bytes the first layers' names stand."""


@dataclass
class QDiffusionCheckpoint:
    """What `load_qdiffusion` found in a file.

    Attributes:
        bits: of every layer.
        layers: name, as in LDM or DDPM and without a prefix, to `QDiffusionLayer`.
        floats: every other tensor by name (biases, norms), float32.
        doubtful: layers whose own weights look like another width than ``bits``.
        cut: the part of all weights that these bits cut off at an end of their range.
    """

    bits: int
    layers: dict[str, QDiffusionLayer]
    floats: dict[str, Tensor]
    doubtful: list[str]
    cut: float = 0.0


def load_qdiffusion(path: str | os.PathLike[str], bits: int | None = None) -> QDiffusionCheckpoint:
    """Open a checkpoint of Q-Diffusion and check it.

    All weights are looked at once, a few rows at a time, to learn the bit width; their integers
    are computed where they are asked for. The file stays open as long as any layer is in use.

    Args:
        path: a .pth, .pt or .ckpt file.
        bits: 2, 3, 4 or 8 when the file's own weights mislead; None: the median over all channels
            of (highest - lowest weight) / delta tells, more than 64 being 8 bits, than 10 4, than
            5 3, else 2.

    Raises:
        QuantTuneError: a file that is missing, damaged, pickled code or of another kind; a layer
            that lacks a tensor or has one of a wrong shape, NaN, or a step that is not above 0;
            bits that the file cannot have: too many for what its weights span, or so few that
            most weights would be cut off; also those that its weights look like.
    """
    if bits is not None and (type(bits) is not int or bits not in SUPPORTED_BITS):
        raise QuantTuneError(f"bits is {bits!r}, but a checkpoint has 2, 3, 4 or 8.")
    archive = TensorArchive(path)
    tensors = without_prefix(archive)
    names = [key.removesuffix(f"{FIRST}delta") for key in tensors if key.endswith(f"{FIRST}delta")]
    found = {name: _Reader(archive.path, name, tensors, bits).read() for name in names}
    for key in tensors:
        if ".weight_quantizer" in key:
            layer = key.partition(".weight_quantizer")[0]
            raise _wrong(archive.path, layer, f"lacks the tensor {layer}{FIRST}delta")
    bits, typical, cut = _bits(archive.path, found, bits)
    layers = {
        name: QDiffusionLayer(
            name,
            bits,
            weight.shape,
            split,
            torch.stack([r.delta for r in roundings], 1),
            torch.stack([r.zero_point for r in roundings], 1),
            weight,
            roundings,
        )
        for name, (weight, split, roundings, _) in found.items()
    }
    doubtful = [name for name, steps in typical.items() if (_width(steps) == 8) != (bits == 8)]
    floats = {
        key: _float(archive.path, tensor)
        for key, tensor in tensors.items()
        if ACTIVATIONS not in key
    }
    return QDiffusionCheckpoint(bits, layers, floats, doubtful, cut)


def is_qdiffusion(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a checkpoint of PyTorch with quantizers of Q-Diffusion in it.

    One in torch's format from before 1.6 is one, too, though `load_qdiffusion` only says so.
    """
    if not is_archive(path):
        try:
            refuse_pipe(path)
            with open(path, "rb") as file:  # names stand before the numbers there
                start = file.read(NAMES_WITHIN)
            return start.startswith(PICKLED) and f"{FIRST}delta".encode() in start
        except (OSError, ValueError):
            return False
    try:
        return any(key.endswith(f"{FIRST}delta") for key in TensorArchive(path).tensors)
    except QuantTuneError:
        return False


def _float(path: str, tensor: StoredTensor) -> Tensor:
    """A tensor that stays float."""
    kind = "complex" if tensor.dtype.is_complex else "boolean" if tensor.dtype == torch.bool else ""
    if kind:
        raise QuantTuneError(
            f"The file {path} has {kind} numbers in {tensor.name[:100]!r}; download it again or "
            "choose another checkpoint."
        )
    values = tensor.read()
    if not is_finite(values):
        raise QuantTuneError(
            f"The file {path} has NaN or infinite values in {tensor.name[:100]!r}; download it "
            "again or choose another checkpoint."
        )
    return values


def _wrong(path: str, layer: str, what: str) -> QuantTuneError:
    return QuantTuneError(
        f"The file {path} is damaged: the layer {layer[:100]!r} {what}; download it again or "
        "choose another checkpoint."
    )


class _Reader:
    """Takes one layer's tensors out of those of a file and checks them."""

    def __init__(
        self, path: str, name: str, tensors: dict[str, StoredTensor], declared: int | None
    ):
        self.path, self.name, self.tensors = path, name, tensors
        self.cut = dict.fromkeys(SUPPORTED_BITS if declared is None else (declared,), 0)

    def wrong(self, what: str) -> QuantTuneError:
        return _wrong(self.path, self.name, what)

    def take(self, key: str) -> StoredTensor | None:
        return self.tensors.pop(f"{self.name}{key}", None)

    def needed(self, key: str) -> StoredTensor:
        if (tensor := self.take(key)) is None:
            raise self.wrong(f"lacks the tensor {key[1:]}")
        return tensor

    def read(self) -> tuple[StoredTensor, int | None, tuple[Rounding, ...], dict[int, int]]:
        """The weight, its split, one or two roundings, and bits to how many weights they cut off.

        The bits are the declared ones, or else all that there may turn out to be.
        """
        weight = self.needed(".weight")
        let_go(8 * weight.numel)  # the blocks of the layer before, or of one much like it
        if (
            not 2 <= len(weight.shape) <= 5
            or weight.numel == 0
            or not weight.dtype.is_floating_point
        ):
            raise self.wrong(f"has a weight of shape {list(weight.shape)} and type {weight.dtype}")
        quantizers = [self.quantizer(FIRST, weight)]
        if any(f"{self.name}{SECOND}{part}" in self.tensors for part in PARTS):
            quantizers.append(self.quantizer(SECOND, weight))
        split = self.split(weight, [alpha for _, _, alpha in quantizers])
        for prefix in (FIRST, SECOND):  # whatever else the authors' versions keep there
            for key in [k for k in self.tensors if k.startswith(f"{self.name}{prefix}")]:
                del self.tensors[key]
        return weight, split, self.roundings(weight, split, quantizers), self.cut

    def quantizer(self, prefix: str, weight: StoredTensor):
        """Step, zero point (both ``[out]``) and alpha."""
        expected = (weight.shape[0], *[1] * (len(weight.shape) - 1))
        values = []
        for part in PARTS[:2]:
            tensor = self.needed(f"{prefix}{part}")
            if tensor.shape != expected:
                raise self.wrong(
                    f"has a {prefix[1:]}{part} of shape {list(tensor.shape)} and not "
                    f"{list(expected)}"
                )
            whole = part == "zero_point" and tensor.dtype in INTEGER_TYPES
            if not (whole or tensor.dtype.is_floating_point):
                raise self.wrong(f"has a {prefix[1:]}{part} of type {tensor.dtype}")
            values.append(tensor.read().reshape(-1))
        delta, zero_point = values
        low = float(delta.min())
        if not is_finite(delta) or low <= 0:
            raise self.wrong(f"has a {prefix[1:]}delta that is NaN, infinite or not above 0")
        if low < torch.finfo(torch.float32).tiny:
            raise self.wrong(f"has a {prefix[1:]}delta of {low:.3g}, which no channel has")
        if (most := largest(delta)) > LARGEST_SCALE:
            raise self.wrong(f"has a {prefix[1:]}delta of {most:.3g}, which no channel has")
        if not is_whole(zero_point):
            raise self.wrong(f"has a {prefix[1:]}zero_point that is not a whole number")
        if largest(zero_point) > LARGEST_ZERO:
            raise self.wrong(f"has a {prefix[1:]}zero_point that no channel has")
        alpha = self.take(f"{prefix}alpha")
        if alpha is not None and not alpha.dtype.is_floating_point:
            raise self.wrong(f"has a {prefix[1:]}alpha of type {alpha.dtype}")
        return delta, zero_point, alpha

    def split(self, weight: StoredTensor, alphas: list[StoredTensor | None]) -> int | None:
        """Input channels of the first part, from the shapes of the alphas."""
        shape = weight.shape
        if len(alphas) == 1:
            if alphas[0] is not None and alphas[0].shape != shape:
                raise self.wrong(
                    f"has an alpha of shape {list(alphas[0].shape)} for a weight of "
                    f"shape {list(shape)}"
                )
            return None
        missing = [p for p, alpha in zip((FIRST, SECOND), alphas) if alpha is None]
        if missing:
            raise self.wrong(
                f"is split, but lacks the tensor {missing[0][1:]}alpha, whose shape tells where"
            )
        first, second = (alpha.shape for alpha in alphas)
        fit = len(first) == len(second) == len(shape) and first[1] + second[1] == shape[1]
        if not fit or any(
            (s[0], *s[2:]) != (shape[0], *shape[2:]) or s[1] < 1 for s in (first, second)
        ):
            raise self.wrong(
                f"is split into alphas of shape {list(first)} and {list(second)}, "
                f"which do not make up its weight of shape {list(shape)}"
            )
        return first[1]

    def roundings(self, weight: StoredTensor, split: int | None, quantizers):
        """The quantizers with how many of their steps the weights of each channel span."""
        inner = math.prod(weight.shape[2:])
        columns = [slice(None)]
        if split is not None:
            columns = [slice(0, split * inner), slice(split * inner, None)]
        steps = [torch.empty_like(delta) for delta, _, _ in quantizers]
        for block, values in weight.blocks():
            for (delta, zero_point, _), out, part in zip(quantizers, steps, columns):
                own = values.flatten(1)[:, part]
                low, high = torch.aminmax(own, dim=1)
                if not bool((low.isfinite() & high.isfinite()).all()):
                    raise self.wrong("has NaN or infinite weights")
                most = max(-float(low.min()), float(high.max()))
                if most > LARGEST_SCALE:
                    raise self.wrong(f"has a weight of size {most:.3g}, which no model has")
                out[block] = (high - low) / delta[block]
                # Whichever way alpha rounds: what lies outside by half a step or more.
                u = own.div_(delta[block, None]).add_(zero_point[block, None])
                below = int((u < -0.5).sum())
                for bits in self.cut:
                    self.cut[bits] += below + int((u > 2**bits - 0.5).sum())
                del own, u  # not beside the next block
            del values
        return tuple(Rounding(*q, s) for q, s in zip(quantizers, steps))


def _width(steps: float) -> int:
    return next((bits for least, bits in WIDTHS if steps > least), 2)


def _bits(path: str, found: dict, declared: int | None) -> tuple[int, dict[str, float], float]:
    """The bit width, the median steps that a channel of each layer spans, and what is cut off."""
    each = {
        name: torch.cat([r.steps for r in roundings])
        for name, (_, _, roundings, _) in found.items()
    }
    median = float(torch.cat(list(each.values())).median())
    if declared is not None and median * LEAST_USED < 2**declared - 1:
        raise QuantTuneError(
            f"The file {path} cannot have {declared} bits: its weights span {median:.1f} steps in "
            f"the median, as {_width(median)} bits do, of {2**declared - 1}; set bits to "
            f"{_width(median)} or leave it to the file."
        )
    own = _width(median)
    bits = declared or own
    cut = sum(c[bits] for *_, c in found.values()) / sum(w.numel for w, *_ in found.values())
    if cut > MOST_CUT:
        cure = "download it again or choose another checkpoint"
        if declared is None:
            cure = f"set bits to those that it was made with, {cure}"
        elif own != declared:
            cure = f"set bits to {own} or leave it to the file"
        looks = "" if declared else ", which its weights look like"
        raise QuantTuneError(
            f"The file {path} cannot have {bits} bits{looks}: {cut:.0%} of its weights lie outside "
            f"of 0 to {2**bits - 1}, and would be cut off; {cure}."
        )
    return bits, {name: float(s.median()) for name, s in each.items()}, cut
