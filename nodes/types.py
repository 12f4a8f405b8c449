"""Kinds of wires that several nodes share."""

from comfy_api.latest import io

BIT_PLAN = io.Custom("QUANTTUNE_BIT_PLAN")
"""A ``quant.plan.BitPlan``."""
SENSITIVITY = io.Custom("QUANTTUNE_SENSITIVITY")
"""A ``metrics.sensitivity.Sensitivity``."""
LAYER_TIMES = io.Custom("QUANTTUNE_LAYER_TIMES")
"""A ``metrics.layer_times.LayerTimes``."""
LORA_MODEL = io.Custom("LORA_MODEL")
"""The host's own: names and tensors of a LoRA; from our nodes a ``host.lora_file.LoraWeights``."""
