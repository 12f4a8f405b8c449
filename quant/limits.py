"""Numbers beyond which those of no model are: files that hold such are damaged, or not weights."""

from __future__ import annotations

import torch

INTEGER_TYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
"""Types of tensors that may hold integers or zero points."""
LARGEST_SCALE = 2.0**24
"""Of a quantization scale; weights themselves end at 65504, float16's largest."""
LARGEST_ZERO = 2.0**40
"""Of a zero point. A channel whose weights are all alike gets a step of 1e-8 from both authors'
quantizers, and so a zero point of 1e8 for each 1 of its weights."""
