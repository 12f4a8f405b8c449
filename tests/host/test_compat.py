"""What older hosts lack, shown on this host by taking it away."""

import contextlib

import comfy.model_management
import comfy.quant_ops
import pytest
import torch
from comfy.model_patcher import LowVramPatch

from quanttune.host import compat
from quanttune.host.save import save_for_stock
from quanttune.tests.host import models


class NewConfig:
    def set_inference_dtype(self, dtype, manual_cast_dtype, device=None):
        self.told = (dtype, manual_cast_dtype, device)


class OldConfig:
    def set_inference_dtype(self, dtype, manual_cast_dtype):
        self.told = (dtype, manual_cast_dtype)


@pytest.mark.parametrize("kind", [NewConfig, OldConfig])
def test_the_device_is_told_to_hosts_that_ask(kind):
    config, told = kind(), (torch.float16, torch.float32, torch.device("cpu"))
    compat.set_inference_dtype(config, *told)
    assert config.told == (told if kind is NewConfig else told[:2])


def test_the_hosts_patch_of_a_weight_is_known_with_and_without_its_mark(monkeypatch):
    class Marked:
        is_lowvram_patch = True

    patch = LowVramPatch("key", {})
    assert compat.is_weight_patch(patch) and compat.is_weight_patch(Marked())
    assert not compat.is_weight_patch(lambda weight: weight)
    monkeypatch.delattr(LowVramPatch, "is_lowvram_patch", raising=False)
    assert compat.is_weight_patch(patch)


def test_a_lora_acts_once_where_patches_have_no_mark(monkeypatch):
    """Twice would be silent: the host's own patch and ours in its place."""
    from quanttune.tests.host import test_lora

    monkeypatch.delattr(LowVramPatch, "is_lowvram_patch", raising=False)
    with torch.inference_mode():
        test_lora.test_equal_to_the_lora_on_the_dequantized_float_model(4, 100_000)


def test_a_host_of_one_gpu_has_it_current(monkeypatch):
    monkeypatch.delattr(comfy.model_management, "cuda_device_context", raising=False)
    context = compat.device_context(torch.device("cpu"))
    assert isinstance(context, contextlib.nullcontext)


@pytest.mark.parametrize("known", [True, False])
def test_a_host_that_cannot_read_the_file_it_writes_says_so(known, host_folders, monkeypatch):
    formats = {"int8_tensorwise": {}} if known else {}
    monkeypatch.setattr(comfy.quant_ops, "QUANT_ALGOS", formats)
    with torch.inference_mode():
        quantized, _ = models.quantize(models.small_model(), 8)
        told = save_for_stock(quantized, "m")[1]
    assert ("too old to load" in told) != known


def test_only_hosts_that_know_intermediate_outputs_are_told_of_them(monkeypatch):
    from comfy_api.latest import io

    class Old:
        def __init__(self, node_id, is_output_node=False):
            pass

    class New:
        def __init__(self, node_id, has_intermediate_output=False):
            pass

    monkeypatch.setattr(io, "Schema", New)
    assert compat.kept_output() == {"has_intermediate_output": True}
    monkeypatch.setattr(io, "Schema", Old)
    assert compat.kept_output() == {}
