"""LoRA over packed integers with peft, the opponent of the training benchmarks."""

from __future__ import annotations


def inject_lora(unet, names, rank: int) -> list:
    """Put LoRA adapters of ``rank`` on the layers ``names`` of a UNet; returns their parameters.

    peft makes a convolution's adapters with the class of the layer itself, which here is one that
    waits for weights from a file; they become ordinary convolutions with peft's initialisation.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    from quanttune.host.ops import QuantTuneOps

    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=list(names)), unet)
    parameters = []
    for module in list(unet.modules()):
        for kind in ("lora_A", "lora_B"):
            adapters = getattr(module, kind, None)
            for key, adapter in list((adapters or {}).items()):
                if isinstance(adapter, QuantTuneOps.Conv2d):
                    plain = torch.nn.Conv2d(
                        adapter.in_channels, adapter.out_channels, adapter.kernel_size,
                        adapter.stride, adapter.padding, adapter.dilation, bias=False)
                    if kind == "lora_A":
                        torch.nn.init.kaiming_uniform_(plain.weight, a=5**0.5)
                    else:
                        torch.nn.init.zeros_(plain.weight)
                    adapters[key] = adapter = plain
                # peft takes the dtype of the base, which for packed integers says nothing.
                adapter.to(next(p.device for p in unet.parameters() if not p.is_meta),
                           torch.float32)
                parameters += list(adapter.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters
