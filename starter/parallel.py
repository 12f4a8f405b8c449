"""Training on a shared machine: one-threaded workers that share weights and optimizer.

On two cores that other programs use too, one process with two threads runs at the speed of its
slower thread. Workers with one thread each add up instead: each computes gradients at the shared
weights and applies its own AdamW step under a lock, so a gradient is at most one step old per
other worker (asynchronous SGD; Recht et al. 2011, "Hogwild!", here with locked updates). One
worker is exactly reproducible; several agree in figures, not in bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
import torch.multiprocessing as mp

from .common import Run, learning_rate


class FlatAdamW:
    """AdamW and a moving average over one flat vector that every parameter is a view of.

    Tensors, all fp32 of the total number of parameters: `weight`, `first`, `second` (moments),
    `average` (EMA), `decays` (1 where weight decay acts: matrices and kernels). `counts` int64:
    steps done. Shared between processes on a CPU.
    """

    def __init__(self, modules: Iterable[torch.nn.Module], decay: float, ema: float):
        self.params = [p for m in modules for p in m.parameters() if p.requires_grad]
        self.weight = torch.cat([p.detach().float().flatten() for p in self.params])
        self.first, self.second = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.average = self.weight.clone()
        self.decays = torch.cat(
            [torch.full((p.numel(),), float(p.dim() > 1), device=p.device) for p in self.params]
        )
        self.counts = torch.zeros(1, dtype=torch.int64)
        self.decay, self.ema = decay, ema
        if not self.weight.is_cuda:
            for tensor in self.tensors().values():
                tensor.share_memory_()
        self.bind(self.weight)
        self.grad = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state to save."""
        names = ("weight", "first", "second", "average", "counts")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Copy a saved state in."""
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])

    def bind(self, flat: torch.Tensor) -> None:
        """Make the parameters views of `flat` (`weight` to train, `average` to export)."""
        at = 0
        for p in self.params:
            p.data = flat[at : at + p.numel()].view(p.shape)
            at += p.numel()

    def own_gradients(self) -> None:
        """Give this process its own gradient vector; call once in each worker."""
        self.grad = torch.zeros_like(self.weight)
        at = 0
        for p in self.params:
            p.grad = self.grad[at : at + p.numel()].view(p.shape)
            at += p.numel()

    @torch.no_grad()
    def step(self, rate: float, clip: float = 1.0, betas=(0.9, 0.99), eps: float = 1e-8) -> None:
        """One AdamW step (Loshchilov & Hutter 2019) with the gradient norm clipped."""
        self.counts += 1
        n = int(self.counts)
        norm = self.grad.norm()
        self.grad.mul_(torch.clamp(clip / (norm + 1e-6), max=1.0))
        self.first.lerp_(self.grad, 1 - betas[0])
        self.second.mul_(betas[1]).addcmul_(self.grad, self.grad, value=1 - betas[1])
        scale = (self.second / (1 - betas[1] ** n)).sqrt_().add_(eps)
        self.weight.addcmul_(self.weight, self.decays, value=-rate * self.decay)
        self.weight.addcdiv_(self.first, scale, value=-rate / (1 - betas[0] ** n))
        self.average.lerp_(self.weight, 1 - min(self.ema, (n + 1) / (n + 20)))
        self.grad.zero_()


def bind_average(modules: Iterable[torch.nn.Module], state: dict[str, torch.Tensor]) -> None:
    """Put the averaged weights of a saved state into modules built as for training."""
    FlatAdamW(modules, 0.0, 0.0).bind(state["average"])


def _work(index: int, run: Run, flat: FlatAdamW, loss_of: Callable, shared, lock, rate: float):
    """One worker's loop: gradients, a locked step, and for worker 0 the clock, log and saves."""
    flat.own_gradients()
    generator = torch.Generator(run.device).manual_seed(index)
    saved, sums, seen, start = time.monotonic(), {}, 0, None
    while float(shared[0]) < 1:
        with lock:
            shared[1] += 1
            ticket = int(shared[1])
        generator.manual_seed(ticket)
        loss, report = loss_of(float(shared[0]), ticket, generator)
        loss.backward()
        with lock:
            flat.step(learning_rate(float(shared[0]), rate))
        for name, value in report.items():
            sums[name] = sums.get(name, 0.0) + float(torch.as_tensor(value).detach())
        seen += 1
        if index:
            continue
        shared[0] = run.tick()
        start = start or (int(flat.counts), run.used)
        if seen % 50 == 0:
            speed = (int(flat.counts) - start[0]) / max(run.used - start[1], 1e-6)
            run.log(
                step=int(flat.counts),
                per_second=round(speed, 2),
                **{k: round(v / seen, 4) for k, v in sums.items()},
            )
            sums, seen = {}, 0
        if time.monotonic() - saved > 60:
            with lock:
                run.save(flat.tensors() | {"ticket": shared[1].clone()})
            saved = time.monotonic()


def train(
    run: Run,
    modules: list,
    loss_of: Callable,
    rate: float,
    decay: float = 1e-2,
    ema: float = 0.999,
    workers: int = 2,
) -> FlatAdamW:
    """Train `modules` within the run's budget and leave the averaged weights in them.

    loss_of(share, ticket, generator) -> (loss, {name: figure}): `share` 0..1 of the budget,
    `ticket` a number that no other step has, `generator` seeded by it. rate: peak learning rate.
    """
    flat = FlatAdamW(modules, decay, ema)
    shared = torch.zeros(2, dtype=torch.float64).share_memory_()
    state = run.load()
    if state:
        flat.load(state)
        shared[1] = state["ticket"]
    shared[0] = run.tick()
    lock = mp.get_context("fork").Lock()
    rest = (run, flat, loss_of, shared, lock, rate)
    if run.device.type == "cpu":
        helpers = [
            mp.get_context("fork").Process(target=_work, args=(i, *rest), daemon=True)
            for i in range(1, workers)
        ]
        for helper in helpers:
            helper.start()
    _work(0, *rest)
    for helper in helpers if run.device.type == "cpu" else []:
        helper.join()
    run.save(flat.tensors() | {"ticket": shared[1].clone()})
    flat.bind(flat.average)
    for p in flat.params:
        p.grad = None
    return flat
