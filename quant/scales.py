"""Scale sets: what TuneQDM fine-tuning trains, one pair of vectors per layer and expert."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import QuantTuneError
from .limits import is_finite


@dataclass(frozen=True)
class LayerScales:
    """Scales of one layer (eq. 5): ``y = sum_p r_out_p * f_p(x_p * s_in_p) + b``.

    Attributes:
        r_out: ``[N, P * out]`` float32, part by part: the first ``out`` columns scale the first
            part. ``N`` is the number of experts in a scale set, and 1 or the batch in a forward.
        s_in: ``[N, in]`` float32, or None for ones (PEQA).
    """

    r_out: Tensor
    s_in: Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of experts (in a set) or of samples (in a forward)."""
        return self.r_out.shape[0]


@dataclass(frozen=True)
class ScaleMetadata:
    """Where a scale set comes from.

    Attributes:
        base_fingerprint: `fingerprint.fingerprint` of the quantized base it was trained on.
        base_name: file name of that base.
        subject: the words that name the subject in a prompt.
        steps: optimizer steps taken.
        seed: of the training run.
        bits: bit width of the base's layers (the most common one), 0 for a float base.
        extra: further JSON-able facts.
    """

    base_fingerprint: str = ""
    base_name: str = ""
    subject: str = ""
    steps: int = 0
    seed: int = 0
    bits: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


def expert_index(timestep: int | float | Tensor, num_experts: int, num_timesteps: int = 1000):
    """``floor(t * N / T)`` (eq. 6), clamped to ``0 .. N-1``.

    Args:
        timestep: the model's own timestep, 0 to T-1; fractions are fine.
        num_experts, num_timesteps: N and T.

    Returns:
        An int, or an int64 tensor of the timestep tensor's shape and device.
    """
    if isinstance(timestep, Tensor):
        # float64, because t * N / T in float32 may fall just short of a whole number.
        wide = torch.float32 if timestep.device.type == "mps" else torch.float64
        index = (timestep.detach().to(wide) * num_experts / num_timesteps).floor()
        return index.nan_to_num().clamp_(0, num_experts - 1).long()
    position = timestep * num_experts / num_timesteps
    # Clamped first: NaN, which max() turns into 0 here, and infinity have no floor.
    return math.floor(min(max(0, position), num_experts - 1))


@dataclass(frozen=True)
class ScaleSet:
    """The scales of a model for N experts. Layers that are absent keep their identity scales.

    Attributes:
        layers: layer name to `LayerScales` with ``N`` rows.
        num_experts: N, the number of equal timestep intervals.
        num_timesteps: T of the model's schedule.
        metadata: `ScaleMetadata`.

    Raises:
        QuantTuneError: N or T below 1, a shape that does not fit, a value that is not finite.
    """

    layers: Mapping[str, LayerScales]
    num_experts: int
    num_timesteps: int = 1000
    metadata: ScaleMetadata = field(default_factory=ScaleMetadata)

    def __post_init__(self) -> None:
        for label, value in (("experts", self.num_experts), ("timesteps", self.num_timesteps)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise QuantTuneError(
                    f"The number of {label} is {value!r}, but it has to be a whole number of "
                    "at least 1."
                )
        for name, scales in self.layers.items():
            self._check_layer(name, scales)

    def _check_layer(self, name: str, scales: LayerScales) -> None:
        for label, tensor in (("r_out", scales.r_out), ("s_in", scales.s_in)):
            if tensor is None:
                continue
            if tensor.dim() != 2 or tensor.shape[0] != self.num_experts or not tensor.shape[1]:
                raise QuantTuneError(
                    f"The scales {name}.{label} have shape {list(tensor.shape)}, but "
                    f"{self.num_experts} experts need [{self.num_experts}, channels]; "
                    "train or download the scale file again."
                )
            if not tensor.is_floating_point():
                raise QuantTuneError(
                    f"The scales {name}.{label} have type {tensor.dtype}, but they have to be "
                    "float; train or download the scale file again."
                )
            if tensor.device.type != "meta" and not is_finite(tensor):
                raise QuantTuneError(
                    f"The scales {name}.{label} hold NaN or infinite values, so the training "
                    "that made them diverged; train again with a lower learning rate."
                )

    @classmethod
    def identity(
        cls,
        layer_shapes: Mapping[str, tuple[int, int]],
        num_experts: int,
        num_timesteps: int = 1000,
        with_s_in: bool = True,
        metadata: ScaleMetadata | None = None,
        device: torch.device | str = "cpu",
    ) -> ScaleSet:
        """A set of ones, from which training starts.

        Args:
            layer_shapes: layer name to ``(P * out, in)``, as from `layers.scale_shapes`.
            num_experts, num_timesteps: N and T.
            with_s_in: False leaves ``s_in`` out, which makes the set PEQA's.
            metadata: of the new set.
            device: of the new tensors.
        """
        if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 1:
            raise QuantTuneError(
                f"The number of experts is {num_experts!r}, but it has to be a whole number of "
                "at least 1."
            )
        layers = {
            name: LayerScales(
                torch.ones(num_experts, outputs, device=device),
                torch.ones(num_experts, inputs, device=device) if with_s_in else None,
            )
            for name, (outputs, inputs) in layer_shapes.items()
        }
        return cls(layers, num_experts, num_timesteps, metadata or ScaleMetadata())

    @property
    def num_parameters(self) -> int:
        """Number of trainable values, over all experts."""
        return sum(t.numel() for t in self.tensors())

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    @property
    def has_s_in(self) -> bool:
        """False for PEQA, where no layer scales its inputs."""
        return any(scales.s_in is not None for scales in self.layers.values())

    def tensors(self) -> list[Tensor]:
        """Every scale tensor."""
        pairs = ((scales.r_out, scales.s_in) for scales in self.layers.values())
        return [t for pair in pairs for t in pair if t is not None]

    def expert_index(self, timestep: int | float | Tensor):
        """The expert of a timestep, ``floor(t * N / T)``; see `expert_index`."""
        return expert_index(timestep, self.num_experts, self.num_timesteps)

    def expert(self, index: int) -> dict[str, LayerScales]:
        """The one-row scales of expert ``index`` for every layer."""
        return {
            name: LayerScales(
                scales.r_out[index : index + 1],
                None if scales.s_in is None else scales.s_in[index : index + 1],
            )
            for name, scales in self.layers.items()
        }

    def to(self, device: torch.device | str) -> ScaleSet:
        """The same set on another device."""
        layers = {
            name: LayerScales(s.r_out.to(device), None if s.s_in is None else s.s_in.to(device))
            for name, s in self.layers.items()
        }
        return ScaleSet(layers, self.num_experts, self.num_timesteps, self.metadata)
