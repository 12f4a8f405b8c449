"""Backends of graphics cards: what they refuse here, and their kernels in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quanttune.quant.int8 import (
    BACKENDS,
    ConvGeometry,
    KitchenBackend,
    TritonBackend,
    choose,
    triton_backend,
)

CARD = torch.device("cuda", 0)
CONV = ConvGeometry((3, 3))


def test_kernels_equal_the_reference():
    """In a process of its own: Triton reads on import whether it is to interpret."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider",
         "--import-mode=importlib", str(Path(__file__).with_name("interpreted.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1"}, text=True, capture_output=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    skipped = [line for line in run.stdout.splitlines() if line.startswith("SKIPPED")]
    assert not [line for line in skipped if "without VNNI" not in line]


@pytest.mark.parametrize("backend", [KitchenBackend(), TritonBackend()], ids=lambda b: b.name)
def test_processors_are_refused(backend):
    assert "graphics cards only" in backend.refuses(torch.device("cpu"), None, (64, 64))


@pytest.fixture
def card(monkeypatch):
    """A card as far as declarations go; nothing is computed on it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(triton_backend, "trial", lambda device: None)
    monkeypatch.setattr("quanttune.quant.int8.kitchen.trial", lambda device: None)


def test_linear_goes_to_kitchen_and_convolutions_to_triton(card):
    assert choose(BACKENDS, CARD, None, (64, 64))[0].name == "comfy-kitchen"
    assert choose(BACKENDS, CARD, CONV, (64, 64))[0].name == "Triton"
    assert "gains nothing" in choose(BACKENDS, CARD, CONV, (4, 64))[1]["Triton"]


def test_old_cards_are_refused_in_words(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    backend, reasons = choose(BACKENDS, CARD, None, (64, 64))
    assert backend is None and "7.5" in reasons["Triton"] and "7.5" in reasons["comfy-kitchen"]


def test_sums_that_may_overflow_are_refused(card):
    assert "32 bits" in choose(BACKENDS, CARD, None, (70_000, 64))[1]["comfy-kitchen"]
    assert "32 bits" in choose(BACKENDS, CARD, CONV, (8_000, 64))[1]["Triton"]


def test_a_card_that_fails_its_trial_falls_back_and_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))

    def broken(*args):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(triton_backend, "quantize_tensor", broken)
    triton_backend.trial.cache_clear()
    try:
        assert triton_backend.trial(torch.device("cpu")) == "it does not run here (no compiler)"
    finally:
        triton_backend.trial.cache_clear()
