"""Watch what the layers of a MODEL read while the host samples from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ..quant import QuantTuneError
from ..quant.gptq import InputMoments, sample_rows
from ..quant.int8 import RangeObserver
from ..quant.limits import is_finite
from .routing import buckets_of, timesteps_of

RUN_TIME = ("cond_or_uncond", "sigmas", "sample_sigmas")
"""Of the transformer options, what the sampler tells each forward and patches may read."""


class ActivationWatch:
    """Ranges, and where asked for second moments, of the inputs of a MODEL's layers.

    Args:
        patcher: the MODEL, float or quantized.
        splits: layer name to the number of input channels of its first part, or None, for each
            layer whose ranges are wanted.
        num_buckets: intervals of the denoising process that have ranges of their own.

    Attributes:
        observers: layer name to ``[bucket][part]`` of `RangeObserver`.
        moments: layer name to `InputMoments`, for those put there before the next forward.
        rows: positions a layer and a forward that go into the moments.
    """

    def __init__(self, patcher, splits: Mapping[str, int | None], num_buckets: int):
        self.model, self.splits, self.num_buckets = patcher.model, splits, num_buckets
        self.observers = {
            name: [[RangeObserver() for _ in range(1 if split is None else 2)]
                   for _ in range(num_buckets)]
            for name, split in splits.items()}
        self.moments: dict[str, InputMoments] = {}
        self.rows = 0
        self._buckets: tuple[int, ...] = (0,)
        self._generator = torch.Generator()

    @contextmanager
    def watching(self, ranges: bool = True) -> Iterator[None]:
        """Look at every forward inside; without ``ranges`` for the moments alone."""
        unet = self.model.diffusion_model
        modules = dict(unet.named_modules())
        names: Collection[str] = self.splits if ranges else self.moments
        hooks = [unet.register_forward_pre_hook(self._start, with_kwargs=True)]
        hooks += [modules[name].register_forward_pre_hook(self._looking(name, ranges))
                  for name in names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def seed(self, number: int) -> None:
        """Make the choice of positions depend on ``number`` alone."""
        self._generator.manual_seed(number)

    def _start(self, unet, args, kwargs) -> None:
        timesteps = timesteps_of(args, kwargs)
        if timesteps is None:
            if self.num_buckets > 1:
                raise QuantTuneError(
                    f"A {type(unet).__name__} model is not told the timestep in a way that ranges "
                    "can follow; set timestep_buckets to 1.")
            return
        self._buckets = buckets_of(timesteps, self.model.model_sampling, self.num_buckets)

    def _looking(self, name: str, ranges: bool) -> Callable:
        def look(module, args):
            x = args[0].detach()
            scales = getattr(module, "active_scales", None)
            if scales is not None and scales.s_in is not None and scales.s_in.shape[0] == 1:
                shape = (-1, 1, 1) if isinstance(module, torch.nn.Conv2d) else (-1,)
                x = x * scales.s_in.view(shape)
            if ranges:
                try:
                    self._observe(name, x, 1 if isinstance(module, torch.nn.Conv2d) else -1)
                except QuantTuneError as error:
                    raise QuantTuneError(
                        f"Layer '{name}' cannot be calibrated: {error}") from error
            if name in self.moments:
                rows = sample_rows(x, module, self.rows, self._generator)
                if not is_finite(rows):
                    raise QuantTuneError(
                        f"Layer '{name}' cannot be calibrated: it reads NaN or infinite values; "
                        "use a precision the model can run in, or another file.")
                self.moments[name].add(rows)
        return look

    def _observe(self, name: str, x: torch.Tensor, channels: int) -> None:
        split = self.splits[name]
        parts = [x] if split is None else x.tensor_split([split], dim=channels)
        rows, rest = divmod(x.shape[0], len(self._buckets))
        for index, part in enumerate(parts):
            for bucket in sorted(set(self._buckets)):
                own = part
                if len(set(self._buckets)) > 1 and not rest:
                    own = torch.cat([part[i * rows : (i + 1) * rows]
                                     for i, b in enumerate(self._buckets) if b == bucket])
                self.observers[name][bucket][index].observe(own)

    def state(self) -> dict:
        """The observers as what `restore` takes."""
        return {name: [[o.state() for o in parts] for parts in buckets]
                for name, buckets in self.observers.items()}

    def restore(self, state: Mapping) -> None:
        """Go on from a `state`."""
        self.observers = {name: [[RangeObserver.restore(o) for o in parts] for parts in buckets]
                          for name, buckets in state.items()}


class ForwardRecord:
    """Some forwards of a diffusion model, to be run again on a changed one.

    Args:
        wanted: says of the number of a forward, counted from 0, whether it is kept; None keeps all.

    Attributes:
        calls: ``(args, kwargs, output)`` of each.
        options: transformer options of the forward that ``wanted`` is asked about.
    """

    def __init__(self, wanted: Callable[[int], bool] | None = None):
        self.wanted = wanted or (lambda number: True)
        self.calls, self.options = [], {}
        self._seen, self._given = 0, None

    @contextmanager
    def recording(self, unet: torch.nn.Module) -> Iterator[None]:
        """Keep the wanted forwards of ``unet`` inside."""
        hooks = [unet.register_forward_pre_hook(self._before, with_kwargs=True),
                 unet.register_forward_hook(self._after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _before(self, unet, args, kwargs) -> None:
        # Before, because a forward takes the residuals of a ControlNet out of their lists.
        self._given = None
        self.options = kwargs.get("transformer_options") or {}
        if self.wanted(self._seen):
            told = {name: self.options[name] for name in RUN_TIME if name in self.options}
            self._given = _copied(args), _copied({**kwargs, "transformer_options": told})
        self._seen += 1

    def _after(self, unet, args, output) -> None:
        if self._given is not None:
            self.calls.append((*self._given, output.detach().float().cpu()))
            self._given = None

    def copy(self) -> ForwardRecord:
        """The same calls in tensors of their own, which autograd may keep."""
        copy = ForwardRecord(self.wanted)
        with torch.inference_mode(False):
            copy.calls = [_mapped(call, torch.clone) for call in self.calls]
        return copy

    def again(self, index: int, patcher, options: dict) -> torch.Tensor:
        """The output of the MODEL ``patcher`` (loaded) for a kept call.

        ``options`` are the transformer options to run it with; what the sampler told in the kept
        call is added to them.
        """
        model, device = patcher.model, patcher.load_device
        dtype = model.manual_cast_dtype or model.get_dtype()
        timesteps = self.timesteps(index)

        def moved(value):
            # The host keeps timesteps in float32, and so bfloat16 would move them by up to four.
            casts = value.is_floating_point() and value is not timesteps
            return value.to(device, dtype if casts else value.dtype)

        args, kwargs = self.calls[index][:2]
        told = _mapped(kwargs.get("transformer_options", {}), lambda value: value.to(device))
        args, kwargs = _mapped(args, moved), _mapped(
            {k: v for k, v in kwargs.items() if k != "transformer_options"}, moved)
        return model.diffusion_model(*args, **kwargs, transformer_options={**options, **told})

    def timesteps(self, index: int) -> torch.Tensor | None:
        """Of a kept call."""
        return timesteps_of(*self.calls[index][:2])

    def error(self, patcher, indices: Sequence[int] | None = None) -> float:
        """Relative difference of the outputs of the MODEL ``patcher`` (loaded) from the kept.

        ``indices`` are the calls to compare; None for all.
        """
        options = {**patcher.model_options["transformer_options"], "wrappers": patcher.wrappers}
        squared = norm = 0.0
        for index in range(len(self.calls)) if indices is None else indices:
            output = self.calls[index][2]
            again = self.again(index, patcher, options)
            squared += float((again.float().cpu() - output).square().sum())
            norm += float(output.square().sum())
        return (squared / norm) ** 0.5 if norm else 0.0


def _mapped(value, change):
    """``value``, tensors in mappings and sequences included, with ``change`` made to each."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: _mapped(v, change) for k, v in value.items()}
    if isinstance(value, list):
        return [_mapped(v, change) for v in value]
    return tuple(_mapped(v, change) for v in value) if isinstance(value, tuple) else value


def _copied(value):
    return _mapped(value, lambda t: (t.detach().float() if t.is_floating_point() else t).cpu())
