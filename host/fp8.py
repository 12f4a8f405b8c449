"""8-bit floats in the forms that the host's files have: bare, or with a scale a layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quant import QuantTuneError
from ..quant.limits import is_finite
from ..quant.tensor_file import TensorFile
from .lora_keys import brief
from .stock_int8 import MARK

FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
"""What the host calls them in a layer's mark."""
OLD_MARK = "scaled_fp8"
"""An (empty) tensor that says of a whole model that its fp8 layers have scales."""
SCALES = (".weight_scale", ".scale_weight")
"""What follows a layer's name in today's and in older files."""
UNUSED = (".input_scale", ".scale_input")
"""Of products in fp8, which this pack does not compute."""
HEADER = "_quantization_metadata"
"""Key of a file's metadata that may say the same as the marks."""
OTHER_LOADER = "load it with ComfyUI's own loader, or choose an fp16 or bf16 file of the model"


@dataclass(frozen=True)
class Fp8:
    """What an fp8 weight is multiplied by.

    Attributes:
        scale: float32, one number, or one an output channel.
    """

    scale: Tensor

    def to_float(self, weight: Tensor) -> Tensor:
        """The weight in float32."""
        scale = self.scale
        if scale.numel() > 1:
            scale = scale.reshape(-1, *[1] * (weight.dim() - 1))
        return weight.to(torch.float32) * scale


def take_scales(own: dict[str, tuple[TensorFile, str]], files: list[TensorFile], prefix: str,
                where: str) -> dict[str, Fp8]:
    """Take scales and marks out of a UNet's tensors.

    Args:
        own: name without prefix to the file and the name there; what is no weight is removed.
        files: that the tensors lie in.
        prefix: of the UNet's names.
        where: what to call the UNet in messages.

    Returns:
        Name of a weight without prefix to its scale.

    Raises:
        QuantTuneError: layers quantized in another way, a scale that is missing or odd.
    """
    formats = _formats(own, files, prefix, where)
    for name in [k for k in own if k == OLD_MARK or k.endswith((MARK, *UNUSED))]:
        del own[name]
    found = {}
    for name in [k for k in own if k.endswith(SCALES)]:
        layer = name[:-len(SCALES[0])]
        file, key = own.pop(name)
        weight = own.get(f"{layer}.weight")
        if weight is None or weight[0].dtypes[weight[1]] not in FORMATS.values():
            raise QuantTuneError(f"{where} has a scale for the layer '{brief(layer)}', whose "
                                 f"weight is no fp8; {OTHER_LOADER}.")
        shape = weight[0].shapes[weight[1]]
        scale = file.read(key)
        if not scale.is_floating_point() or scale.numel() not in (1, *shape[:1]) or (
                not is_finite(scale)):
            raise QuantTuneError(f"{where} has a damaged scale for the layer '{brief(layer)}'; "
                                 "download it again.")
        found[f"{layer}.weight"] = Fp8(scale.to(torch.float32))
    for layer in formats:
        if f"{layer}.weight" not in found:
            raise QuantTuneError(f"{where} has no scale for the fp8 layer '{brief(layer)}'; "
                                 "download it again.")
    return found


def _formats(own: Mapping, files: list[TensorFile], prefix: str, where: str) -> dict[str, str]:
    """Layer to the fp8 format that its mark says."""
    said: dict[str, object] = {}
    try:
        for file in files:
            layers = json.loads(file.strings.get(HEADER, "{}")).get("layers", {})
            said |= {k.removeprefix(prefix): v["format"] for k, v in layers.items()}
        for name, (file, key) in own.items():
            if name.endswith(MARK):
                text = bytes(file.read(key).to(torch.uint8).tolist())
                said[name.removesuffix(MARK)] = json.loads(text)["format"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise QuantTuneError(f"{where} does not say in a readable way how it is quantized; "
                             f"{OTHER_LOADER}.") from error
    for layer, kind in said.items():
        if kind == "int8_tensorwise":
            raise QuantTuneError(f"{where} is quantized to ComfyUI's INT8 already; load it with "
                                 "'Load Quantized UNet'.")
        if kind not in FORMATS:
            raise QuantTuneError(f"{where} has a layer '{brief(layer)}' quantized as "
                                 f"{brief(kind, 40)}, which this pack does not read; "
                                 f"{OTHER_LOADER}.")
    return said
