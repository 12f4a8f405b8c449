"""Linear layers in bitsandbytes' 4-bit NormalFloat (Dettmers et al. 2023): the base of QLoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..quant import QuantTuneError
from .bitsandbytes_library import bitsandbytes


@contextmanager
def nf4_layers(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[int]:
    """Put NF4 layers in the place of all Linear layers of a module, and back in the end.

    bitsandbytes has no convolution; those stay as they are.

    Args:
        module: its Linear layers hold floats.
        dtype: to compute in.
        device: of the NF4 layers.

    Yields:
        How many layers were replaced.

    Raises:
        QuantTuneError: bitsandbytes is missing, or cannot quantize on this device.
    """
    library = bitsandbytes("An NF4 base", "put 'Quantize UNet' before the training")
    originals = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    try:
        for name, original in originals.items():
            _replace(module, name, _quantized(library, original, dtype, device))
        # peft asks the model, not the layer.
        module.is_loaded_in_4bit = True
        yield len(originals)
    finally:
        module.__dict__.pop("is_loaded_in_4bit", None)
        for name, original in originals.items():
            _replace(module, name, original)


def _quantized(library, original: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    bias = None if original.bias is None else original.bias.detach().to(dtype)
    layer = library.nn.Linear4bit(original.in_features, original.out_features, bias is not None,
                                  compute_dtype=dtype, quant_type="nf4", device="meta")
    layer.weight = library.nn.Params4bit(original.weight.detach().to(dtype), requires_grad=False,
                                         quant_type="nf4")
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    try:
        return layer.to(device)
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise QuantTuneError(f"bitsandbytes cannot make NF4 weights on this {device.type} "
                             f"({str(error).splitlines()[0]}); put 'Quantize UNet' before the "
                             "training instead.") from error


def _replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, layer)
