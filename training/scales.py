"""The trainable scales of a model: for each expert one flat vector of each kind."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..quant import LayerScales, QuantTuneError, ScaleMetadata, ScaleSet


class TrainableScales(nn.Module):
    """``r_out`` and ``s_in`` of all layers and experts, starting at 1 (TuneQDM eq. 5-6).

    An expert's scales of one kind are one flat parameter, whatever the number of layers: a step of
    the optimizer is a handful of operations, and experts that a step did not sample have no
    gradient at all.

    Attributes:
        r_out: N parameters ``[sum of P * out]``: ``r_out`` itself, or the absolute ``s_out``.
        s_in: N parameters ``[sum of in]``; empty for PEQA.
        unit: ``[sum of P * out]``, what ``r_out`` is divided by to be relative: ``s0`` where
            absolute scales train, else ones.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        num_experts: int,
        with_s_in: bool = True,
        base_scales: Mapping[str, Tensor] | None = None,
        s_in_noise: float = 0.0,
        seed: int = 0,
    ):
        """Start from ones.

        Args:
            shapes: layer name to ``(P * out, in)``.
            num_experts: N.
            with_s_in: False for PEQA.
            base_scales: layer name to its ``s0`` ``[out, P]``, to train absolute output scales.
            s_in_noise: standard deviation of ``s_in`` at the start (Alg. 1).
            seed: of that noise.
        """
        super().__init__()
        if not shapes:
            raise QuantTuneError("The model has no quantized layer whose scales could be trained; "
                                 "put 'Quantize UNet' before it.")
        self.names = list(shapes)
        self.sizes = ([shapes[n][0] for n in self.names], [shapes[n][1] for n in self.names])
        outputs, inputs = (sum(s) for s in self.sizes)
        unit = torch.ones(outputs)
        if base_scales is not None:
            unit = torch.cat([base_scales[n].detach().float().cpu().t().reshape(-1)
                              for n in self.names])
        self.register_buffer("unit", unit)
        generator = torch.Generator().manual_seed(seed)
        noise = s_in_noise * torch.randn(num_experts, inputs, generator=generator)
        self.r_out = nn.ParameterList(nn.Parameter(unit.clone()) for _ in range(num_experts))
        self.s_in = nn.ParameterList(
            nn.Parameter(1 + noise[i]) for i in range(num_experts if with_s_in else 0))

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.r_out)

    @property
    def num_parameters(self) -> int:
        """Trainable values over all experts."""
        return sum(p.numel() for p in self.parameters())

    def of_expert(self, index: int) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters of an expert: output scales, input scales (none for PEQA)."""
        return [self.r_out[index]], ([self.s_in[index]] if len(self.s_in) else [])

    def select(self, experts: list[int]) -> dict[str, LayerScales]:
        """Differentiable scales by layer: one row if all experts are the same, else one each."""
        if all(e == experts[0] for e in experts):
            experts = experts[:1]
        r = torch.stack([self.r_out[e] for e in experts]) / self.unit
        rs = r.split(self.sizes[0], dim=1)
        ss: tuple[Tensor | None, ...] = (None,) * len(self.names)
        if len(self.s_in):
            ss = torch.stack([self.s_in[e] for e in experts]).split(self.sizes[1], dim=1)
        return {name: LayerScales(a, b) for name, a, b in zip(self.names, rs, ss)}

    @torch.no_grad()
    def copy_expert(self, source: int = 0) -> None:
        """Make all experts equal to one."""
        for parameters in (self.r_out, self.s_in):
            for index, parameter in enumerate(parameters):
                if index != source:
                    parameter.copy_(parameters[source])

    @torch.no_grad()
    def flat(self) -> tuple[Tensor, Tensor | None]:
        """Relative scales of all experts: output ``[N, ...]``, and input ``[N, ...]`` or None."""
        r = torch.stack(list(self.r_out)) / self.unit
        return r, (torch.stack(list(self.s_in)) if len(self.s_in) else None)

    def scale_set(
        self,
        num_timesteps: int,
        metadata: ScaleMetadata | None = None,
        values: tuple[Tensor, Tensor | None] | None = None,
    ) -> ScaleSet:
        """A copy as a `ScaleSet` on the CPU; ``values`` replace the present ones (see `flat`)."""
        r, s = values or self.flat()
        rs = r.cpu().split(self.sizes[0], dim=1)
        ss = (None,) * len(self.names) if s is None else s.cpu().split(self.sizes[1], dim=1)
        layers = {name: LayerScales(a.clone(), None if b is None else b.clone())
                  for name, a, b in zip(self.names, rs, ss)}
        return ScaleSet(layers, self.num_experts, num_timesteps, metadata or ScaleMetadata())
