"""The bridge between the host-free layers (quant, training, metrics) and ComfyUI.

Only this package and ``nodes`` import ComfyUI. It knows how our packed weights live inside the
host's modules (``layout``, ``ops``), how a model is built around them (``build``, ``quantize``),
how timestep-routed scales reach the layers (``routing``) and how stock LoRAs act on them without
requantization (``lora``).
"""
