"""Optimizers by name, separate learning rates, and the schedules."""

import pytest
import torch

from quanttune.training.config import ScaleTraining
from quanttune.training.optimizers import build_optimizer, rate_factor, set_learning_rate
from quanttune.training.settings import OPTIMIZERS, SCHEDULERS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_minimises(name):
    target = torch.linspace(0.9, 1.1, 5000)
    r, s = (torch.nn.Parameter(torch.ones(5000)) for _ in range(2))
    config = ScaleTraining(optimizer=name, learning_rate=2e-3)
    optimizer = build_optimizer(config, [([r], 2e-3), ([s], 2e-3)])
    for _ in range(150):
        optimizer.zero_grad()
        ((r - target).square().mean() + (s - target).square().mean()).backward()
        optimizer.step()
    for values in (r, s):
        assert float((values.detach() - target).abs().mean()) < 0.02


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "adamw"])
def test_a_library_without_its_native_part_is_told_before_the_first_step(name, monkeypatch):
    import bitsandbytes.optim

    from quanttune.quant import QuantTuneError
    from quanttune.training.optimizers import BITSANDBYTES

    def missing(*_):
        raise RuntimeError("\n\U0001f6a8 native library is missing. \nRun python -m\nbitsandbytes")

    monkeypatch.setattr(getattr(bitsandbytes.optim, BITSANDBYTES[name]), "step", missing)
    with pytest.raises(QuantTuneError, match="library is missing.; install .* adamw") as told:
        build_optimizer(ScaleTraining(optimizer=name),
                        [([torch.nn.Parameter(torch.ones(3))], 1e-3)])
    assert "\n" not in str(told.value)


def test_groups_have_rates_of_their_own():
    r, s = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = build_optimizer(ScaleTraining(), [([r], 1e-3), ([s], 1e-2)])
    set_learning_rate(optimizer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [5e-4, 5e-3]
    (r.sum() + s.sum()).backward()
    optimizer.step()
    assert torch.allclose(1 - r, torch.full((3,), 5e-4), rtol=1e-2)
    assert torch.allclose(1 - s, torch.full((3,), 5e-3), rtol=1e-2)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules(name):
    factor = rate_factor(ScaleTraining(steps=100, warmup_steps=10, scheduler=name))
    assert all(0 <= factor(i) <= 1 for i in range(100))
    if name != "constant":
        assert factor(0) == 0 and factor(5) == 0.5
    assert factor(10) == 1
    if name in ("linear", "cosine", "polynomial"):
        assert factor(99) < 0.05
