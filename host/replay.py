"""Repeat recorded forwards of a diffusion model from the first layer that has changed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import comfy.model_management
import torch

from .observe import ForwardRecord

CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)
"""Hold blocks and compute nothing of their own."""
SHARE = 0.5
"""Of the free memory of the device that kept outputs may take."""
TRIED = 8
"""Places a forward is taken up at, once, to see that it gives what the whole one gives."""


def blocks_of(unet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Name to module of what ``unet`` is a row of: its children, those of containers instead."""
    found, rest = {}, [("", unet)]
    while rest:
        prefix, parent = rest.pop()
        for name, child in parent.named_children():
            if isinstance(child, CONTAINERS):
                rest.append((f"{prefix}{name}.", child))
            else:
                found[f"{prefix}{name}"] = child
    return found


class Replay:
    """A `ForwardRecord` whose forwards begin where a change begins: before, outputs are known.

    Outputs of each block of the unchanged model are kept on its device, as long as memory lasts;
    forwards beyond run from the start. So do all, if taking one up in its middle does not give
    exactly the output of the whole (a model that writes into activations of earlier blocks).

    Args:
        record: of the model.
        patcher: MODEL, loaded, unchanged now.

    Attributes:
        kept: how many of the forwards are taken up in the middle.
    """

    def __init__(self, record: ForwardRecord, patcher):
        self.record, self.patcher = record, patcher
        self.blocks = blocks_of(patcher.model.diffusion_model)
        self._known: list[list[tuple[str, object]]] = []
        self._left = SHARE * comfy.model_management.get_free_memory(patcher.load_device)
        options = patcher.model_options["transformer_options"]
        self.options = {**options, "wrappers": patcher.wrappers}
        try:
            for index in range(len(record.calls)):
                calls = self._watch(index)
                if self._left < 0:
                    break
                self._known.append(calls)
            if self._known and not self._exact():
                self._known = []
        except torch.OutOfMemoryError:
            self._known = []
            comfy.model_management.soft_empty_cache()

    @property
    def kept(self) -> int:
        """See the class."""
        return len(self._known)

    def again(self, index: int, layers: Collection[str]) -> torch.Tensor:
        """The output of forward ``index`` when nothing but ``layers`` may have changed."""
        first = self._first(index, layers) if index < len(self._known) else 0
        with self._taken_up(index, first):
            return self.record.again(index, self.patcher, self.options)

    def _watch(self, index: int) -> list[tuple[str, object]]:
        """Name and output of each block in the order they are called."""
        calls: list[tuple[str, object]] = []

        def look(name):
            def hook(module, args, output):
                self._left -= _bytes(output)
                if self._left >= 0:
                    calls.append((name, _copied(output)))
            return hook

        hooks = [m.register_forward_hook(look(n)) for n, m in self.blocks.items()]
        try:
            self._whole(index)
        finally:
            for hook in hooks:
                hook.remove()
        return calls

    def _first(self, index: int, layers: Collection[str]) -> int:
        """The place of the first call that ``layers`` have a part in."""
        calls = [name for name, _ in self._known[index]]
        own = {b for b in self.blocks if any(n == b or n.startswith(f"{b}.") for n in layers)}
        outside = any(not any(n == b or n.startswith(f"{b}.") for b in own) for n in layers)
        # What was never seen to be called may be reached in another way, at any place.
        if outside or not own or own - set(calls):
            return 0
        return next(i for i, name in enumerate(calls) if name in own)

    def _whole(self, index: int) -> torch.Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self.record.again(index, self.patcher, self.options)

    @contextmanager
    def _taken_up(self, index: int, first: int) -> Iterator[None]:
        """Inside, the calls before the one at place ``first`` give what is known of them."""
        waiting: dict[str, list] = {}
        for name, output in self._known[index][:first] if first else []:
            waiting.setdefault(name, []).append(output)
        # The host puts forwards of its own on modules, too.
        before = {}
        for name, outputs in waiting.items():
            module = self.blocks[name]
            before[name] = module.__dict__.get("forward")
            module.__dict__["forward"] = _answering(module.forward, outputs)
        try:
            yield
        finally:
            for name, forward in reversed(before.items()):
                self.blocks[name].__dict__.pop("forward", None)
                if forward is not None:
                    self.blocks[name].__dict__["forward"] = forward

    def _exact(self) -> bool:
        """Whether the first forward, taken up at some places, gives what the whole gives."""
        whole = self._whole(0)
        count = len(self._known[0])
        for place in sorted({count * (i + 1) // (TRIED + 1) for i in range(TRIED)}):
            with self._taken_up(0, place):
                if not torch.equal(self._whole(0), whole):
                    return False
        return True


def _answering(compute, outputs: list):
    """A forward that gives ``outputs`` in turn, and computes when they are all given."""
    rest = iter(outputs)

    def forward(*args, **kwargs):
        for output in rest:
            # A copy: what follows may write into it.
            return _copied(output)
        return compute(*args, **kwargs)

    return forward


def _copied(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return type(value)(_copied(v) for v in value)
    return value


def _bytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, (tuple, list)) else 0
