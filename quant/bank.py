"""All scales of a model as a few flat tensors, so that routing costs a few tensor operations.

For the whole model and one timestep, `ScaleBank.resolve` computes
``r = 1 + sum_i strength_i * (r_i[expert_i] - 1)`` over the blended scale sets ``i``, and the same
for ``s_in``. Sets may differ in their numbers of experts and timesteps.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .errors import QuantTuneError
from .scales import LayerScales, ScaleSet, expert_index

CACHE_SIZE = 32
"""Expert combinations kept resolved; SD1.5's take 2.5 MB each."""


def check_strength(strength: float) -> float:
    """Return a finite float, else raise `QuantTuneError`."""
    try:
        value = float(strength)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise QuantTuneError(
            f"The strength is {strength!r}, but it has to be a finite number; "
            "0 is the base model and 1 the trained scales."
        )
    return value


class ScaleBank:
    """Scale sets of one model, flattened and ready to be routed.

    Args:
        base_layers: layer name to ``(P * out, in)`` of the model's layers.
        entries: scale sets and their strengths; 0 is the base model, 1 as trained, and anything
            finite between and beyond interpolates.

    Raises:
        QuantTuneError: a strength that is not finite, a layer that the model does not have, or
            channels that do not match.
    """

    def __init__(
        self,
        base_layers: Mapping[str, tuple[int, int]],
        entries: Iterable[tuple[ScaleSet, float]],
    ) -> None:
        self.entries = [(scale_set, check_strength(strength)) for scale_set, strength in entries]
        for scale_set, _ in self.entries:
            check_fits(scale_set, base_layers)
        touched = {name for scale_set, _ in self.entries for name in scale_set.layers}
        self.names = [name for name in base_layers if name in touched]
        self._r_sizes = [base_layers[name][0] for name in self.names]
        self._s_sizes = [
            base_layers[name][1] if any(_has_s_in(s, name) for s, _ in self.entries) else 0
            for name in self.names
        ]
        # Normal tensors even when the host builds the bank inside inference mode, so that a later
        # training run may save what is computed from them.
        with torch.inference_mode(False), torch.no_grad():
            self._flat = [self._flatten(scale_set) for scale_set, _ in self.entries]
        self._cache: OrderedDict[tuple[int, ...], dict[str, LayerScales]] = OrderedDict()

    def _flatten(self, scale_set: ScaleSet) -> tuple[Tensor, Tensor]:
        """``r_out`` and ``s_in`` of all layers side by side, ``[N, total]`` float32 each."""
        count = scale_set.num_experts
        r_parts, s_parts = [], []
        for name, r_size, s_size in zip(self.names, self._r_sizes, self._s_sizes):
            scales = scale_set.layers.get(name)
            r_out = torch.ones(count, r_size) if scales is None else scales.r_out
            r_parts.append(r_out.detach().to("cpu", torch.float32))
            has_s_in = scales is not None and scales.s_in is not None
            s_in = scales.s_in if has_s_in else torch.ones(count, s_size)
            s_parts.append(s_in.detach().to("cpu", torch.float32))
        empty = torch.ones(count, 0)
        return torch.cat(r_parts or [empty], dim=1), torch.cat(s_parts or [empty], dim=1)

    @property
    def device(self) -> torch.device:
        """Where the flat scales live."""
        return self._flat[0][0].device if self._flat else torch.device("cpu")

    @property
    def nbytes(self) -> int:
        """Bytes of the flat scales."""
        return sum(t.numel() * t.element_size() for pair in self._flat for t in pair)

    def to(self, device: torch.device | str) -> ScaleBank:
        """This bank if it is on ``device`` already, else a copy there."""
        device = torch.device(device)
        same = device.type == self.device.type and device.index in (None, self.device.index)
        if same or not self._flat:
            return self
        moved = object.__new__(ScaleBank)
        moved.__dict__.update(self.__dict__)
        with torch.inference_mode(False), torch.no_grad():
            moved._flat = [(r.to(device), s.to(device)) for r, s in self._flat]
        moved._cache = OrderedDict()
        return moved

    def experts(
        self, timesteps: Tensor, num_timesteps: float | None = None
    ) -> list[tuple[int, ...]]:
        """For every sample, the expert of each scale set; see `resolve`."""
        # One transfer to the host however many sets there are.
        steps = timesteps.detach().reshape(-1).tolist()
        return [
            tuple(
                expert_index(t, s.num_experts, num_timesteps or s.num_timesteps)
                for s, _ in self.entries
            )
            for t in steps
        ]

    def resolve(
        self, timesteps: Tensor, num_timesteps: float | None = None
    ) -> dict[str, LayerScales]:
        """The effective scales of every touched layer for a batch.

        Args:
            timesteps: ``[B]``, in units in which the model counts from 0 to T.
            num_timesteps: that T; by default each scale set's own.

        Returns:
            Layer name to `LayerScales` with one row if all samples use the same experts (kept, so
            that the next step of the same experts costs nothing), else one row per sample. The
            tensors are views of two flat ones. Layers that no set touches are absent.
        """
        experts = self.experts(timesteps, num_timesteps)
        if not self.names or not experts:
            return {}
        if any(e != experts[0] for e in experts):
            return self._resolve(experts)
        resolved = self._cache.pop(experts[0], None)
        if resolved is None:
            resolved = self._resolve(experts[:1])
        self._cache[experts[0]] = resolved
        while len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
        return resolved

    def _resolve(self, experts: list[tuple[int, ...]]) -> dict[str, LayerScales]:
        with torch.inference_mode(False), torch.no_grad():
            r_flat = self._blend(experts, 0)
            s_flat = self._blend(experts, 1)
            r_views = r_flat.split(self._r_sizes, dim=1)
            s_views = s_flat.split(self._s_sizes, dim=1)
        return {
            name: LayerScales(r, s if s.shape[1] else None)
            for name, r, s in zip(self.names, r_views, s_views)
        }

    def _blend(self, experts: list[tuple[int, ...]], which: int) -> Tensor:
        """Rows of ``r_out`` (0) or ``s_in`` (1) of all sets, blended: ``[rows, total]``."""
        total = None
        for index, (flat, (_, strength)) in enumerate(zip(self._flat, self.entries)):
            rows = flat[which][[sample[index] for sample in experts]]
            if len(self.entries) == 1 and strength == 1.0:
                return rows
            part = rows.sub_(1.0).mul_(strength)
            total = part if total is None else total.add_(part)
        return total.add_(1.0)


def _has_s_in(scale_set: ScaleSet, name: str) -> bool:
    scales = scale_set.layers.get(name)
    return scales is not None and scales.s_in is not None


def check_fits(scale_set: ScaleSet, base_layers: Mapping[str, tuple[int, int]]) -> None:
    """Raise `QuantTuneError` unless every layer of the set is in the model with its channels."""
    source = scale_set.metadata.base_name
    cure = f"load the base model it was trained on{f' ({source})' if source else ''}."
    for name, scales in scale_set.layers.items():
        if name not in base_layers:
            raise QuantTuneError(
                f"The scale set has a layer {name} that this model does not have; {cure}"
            )
        outputs, inputs = base_layers[name]
        for label, tensor, channels in (
            ("output", scales.r_out, outputs),
            ("input", scales.s_in, inputs),
        ):
            if tensor is not None and tensor.shape[1] != channels:
                raise QuantTuneError(
                    f"The scale set has {tensor.shape[1]} {label} scales for layer {name}, which "
                    f"needs {channels} in this model; {cure}"
                )
