"""What ranges an activation takes: a histogram that grows, and four ways to choose a range from it.

A range that holds every value wastes codes on outliers. Static quantization decides once, from
calibration data, how much to clip (Diffusia: the 99.9th percentile).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum

import torch
from torch import Tensor

from .activation import STEPS, check_finite

BINS = 2048
"""Of a histogram, half of them below 0: at least four a code."""
SAMPLED = 65536
"""Values of one tensor that are counted; its extremes are exact."""
SHRINKS = 48
"""Ranges that the searches try for each end."""


class RangeEstimator(str, Enum):
    """How a static range is chosen from what was observed.

    ``MINMAX`` holds every value; ``PERCENTILE`` the middle 99.9 %; ``MSE`` has the least squared
    error of clipping and rounding together; ``ENTROPY`` the least Kullback-Leibler divergence
    between the observed and the quantized distribution.
    """

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"


class RangeObserver:
    """Extremes and histogram of everything it is shown.

    Bins are ``width`` wide, a power of two, and lie symmetrically around 0. A value outside makes
    them twice as wide, which joins them in pairs, so nothing that was counted is ever guessed.

    Attributes:
        low, high: the smallest and the largest value, 0 included.
        width: of a bin; 0 before the first value other than 0.
        counts: int64 ``[BINS]``.
        tensors: how many it was shown.
    """

    def __init__(self):
        self.tensors = 0
        self.low = self.high = self.width = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def observe(self, values: Tensor) -> None:
        """Count a tensor of any shape; of a large one, `SAMPLED` values drawn at random.

        Raises:
            QuantTuneError: NaN or infinite values.
        """
        if not values.numel():
            return
        low, high = torch.stack(torch.aminmax(values.detach())).float().tolist()
        self.low = min(self.low, check_finite(low))
        self.high = max(self.high, check_finite(high))
        self._grow(max(-low, high))
        flat = values.detach().flatten()
        if flat.numel() > SAMPLED:
            # At random: any regular distance shares factors with some number of channels.
            generator = torch.Generator().manual_seed(self.tensors)
            chosen = torch.randint(flat.numel(), (SAMPLED,), generator=generator)
            flat = flat[chosen.to(flat.device)]
        self.tensors += 1
        if self.width:
            places = (flat.float() / self.width).floor_().add_(BINS // 2).clamp_(0, BINS - 1)
            self.counts += torch.bincount(places.long(), minlength=BINS).cpu()

    def _grow(self, largest: float) -> None:
        """Make the bins reach ``largest``."""
        if largest <= 0:
            return
        wanted = 2.0 ** math.ceil(math.log2(largest / (BINS // 2 - 1)))
        if not self.width:
            self.width = wanted
        while self.width < wanted:
            # Pairs of bins with a common border at 0.
            joined = self.counts.view(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[BINS // 4 : BINS // 4 + BINS // 2] = joined
            self.width *= 2

    def range(self, estimator: RangeEstimator, percentile: float = 99.9) -> tuple[float, float]:
        """``(low, high)``, containing 0 and within the extremes.

        Args:
            estimator: how to choose.
            percentile: share in percent of the values that `RangeEstimator.PERCENTILE` keeps; half
                of the rest is clipped at either end.
        """
        if not self.width or estimator is RangeEstimator.MINMAX or not int(self.counts.sum()):
            return self.low, self.high
        choose = {
            RangeEstimator.PERCENTILE: lambda: self._percentile(percentile),
            RangeEstimator.MSE: self._least_error,
            RangeEstimator.ENTROPY: self._least_divergence,
        }[estimator]
        low, high = choose()
        return min(0.0, max(low, self.low)), max(0.0, min(high, self.high))

    def _percentile(self, percentile: float) -> tuple[float, float]:
        share = (1 - percentile / 100) / 2
        total = torch.cumsum(self.counts.double(), 0)
        ends = []
        for wanted in (share * total[-1], (1 - share) * total[-1]):
            index = int(torch.searchsorted(total, wanted).clamp(max=BINS - 1))
            count = float(self.counts[index])
            part = float(total[index] - wanted) / count if count else 0.0
            ends.append((index + 1 - part - BINS // 2) * self.width)
        return ends[0], ends[1]

    def _centers(self) -> Tensor:
        return (torch.arange(BINS, dtype=torch.float64) + 0.5 - BINS // 2) * self.width

    def _least_error(self) -> tuple[float, float]:
        """Minimum over a grid of both ends of ``clipped**2 + step**2 / 12``, summed over values."""
        centers, counts = self._centers(), self.counts.double()
        shrink = torch.linspace(1 / SHRINKS, 1.0, SHRINKS, dtype=torch.float64)
        lows, highs = shrink * self.low, shrink * self.high
        above = ((centers - highs[:, None]).clamp(min=0).square() * counts).sum(1)
        below = ((lows[:, None] - centers).clamp(min=0).square() * counts).sum(1)
        step = (highs[None, :] - lows[:, None]) / STEPS
        error = below[:, None] + above[None, :] + counts.sum() * step.square() / 12
        best = int(error.argmin())
        return float(lows[best // SHRINKS]), float(highs[best % SHRINKS])

    def _least_divergence(self) -> tuple[float, float]:
        """Minimum over ranges shrunk at both ends alike."""
        centers, counts = self._centers(), self.counts.double()
        best, found = math.inf, (self.low, self.high)
        for shrink in torch.linspace(1.0, 1 / SHRINKS, SHRINKS).tolist():
            low, high = shrink * self.low, shrink * self.high
            divergence = _divergence(centers, counts, low, high)
            if divergence < best:
                best, found = divergence, (low, high)
        return found

    def state(self) -> dict:
        """What `restore` takes, as numbers and a tensor."""
        ends = {"low": self.low, "high": self.high, "width": self.width, "tensors": self.tensors}
        return {**ends, "counts": self.counts.clone()}

    @classmethod
    def restore(cls, state: Mapping) -> RangeObserver:
        """An observer as it was."""
        observer = cls()
        observer.low, observer.high, observer.width = (
            float(state[k]) for k in ("low", "high", "width")
        )
        observer.counts, observer.tensors = state["counts"].clone(), int(state["tensors"])
        if observer.counts.shape != (BINS,):
            raise ValueError("not a histogram of this version")
        return observer


def _divergence(centers: Tensor, counts: Tensor, low: float, high: float) -> float:
    """Kullback-Leibler divergence of the clipped histogram from its quantized form."""
    inside = (centers >= low) & (centers <= high)
    first = int(inside.int().argmax())
    last = first + int(inside.sum()) - 1
    if last < first or not inside.any():
        return math.inf
    kept = counts[first : last + 1].clone()
    # What is quantized does not know what was clipped; what it should look like does.
    level = ((centers[first : last + 1] - low) * (STEPS / (high - low))).round().long()
    level = level.clamp(0, STEPS)
    filled = (kept > 0).double()
    totals = torch.zeros(STEPS + 1, dtype=torch.float64).index_add_(0, level, kept)
    members = torch.zeros(STEPS + 1, dtype=torch.float64).index_add_(0, level, filled)
    quantized = (totals / members.clamp(min=1))[level] * filled
    wanted = kept
    wanted[0] += counts[:first].sum()
    wanted[-1] += counts[last + 1 :].sum()
    wanted, quantized = wanted / wanted.sum(), quantized / quantized.sum().clamp(min=1e-300)
    filled = wanted > 0
    ratio = wanted[filled] / quantized[filled].clamp(min=1e-12)
    return float((wanted[filled] * ratio.log()).sum())
