"""ComfyUI operations whose Linear and Conv2d hold packed integers and take routed scales.

A model built with :class:`QuantTuneOps` keeps every other layer the host's own (``manual_cast``).
A Linear or Conv2d may hold packed integers or floats; both apply the pair of scale vectors that
the router (``host.routing``) put on ``active_scales`` at the start of the forward:
``y = r_out * f(x * s_in) + b`` (TuneQDM eq. 5).
"""

from __future__ import annotations

import comfy.ops
import torch

from ..quant import QuantTuneError, functional
from .layout import QuantizedTensor, is_packed, is_uniform, unwrap


class _ScaledOp:
    """What Linear and Conv2d share: loading, moving, patching and fetching a packed weight."""

    comfy_cast_weights = True
    active_scales = None
    low_rank = None
    """What LoRAs add to a packed weight, a `quant.LowRank` (``host.lora``)."""
    int8 = None
    """``int8(input, scales)`` when this forward multiplies integers (``host.int8``)."""
    int8_ready = None
    """What was prepared for that from the weight where it is now, kept between forwards."""
    fake_quant = None
    """``fake_quant(input, bias)`` while a training simulates integers (``host.qat``)."""

    def _init_weights(self, device, dtype):
        self._load_device, self._load_dtype = device, dtype
        self.weight_function, self.bias_function = [], []

    @property
    def weight_scale(self):
        """``s0``, float32 [out, parts], of a packed weight (eq. 2)."""
        return self.weight._params.scale

    @property
    def weight_zero_point(self):
        """``z``, float32 [out, parts] holding integers, of a packed weight (eq. 1)."""
        return self.weight._params.zero_point

    def reset_parameters(self):
        return None

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys,
                              unexpected_keys, error_msgs):
        for name in ("weight", "bias"):
            current = self._parameters.get(name)
            value = state_dict.get(prefix + name)
            if current is None:
                if value is not None:
                    unexpected_keys.append(prefix + name)
                continue
            if value is None:
                missing_keys.append(prefix + name)
                continue
            if tuple(value.shape) != tuple(current.shape):
                error_msgs.append(f"{prefix}{name} has shape {tuple(value.shape)}, "
                                  f"the model expects {tuple(current.shape)}")
                continue
            if not isinstance(value, QuantizedTensor):
                value = value.to(device=self._load_device, dtype=self._load_dtype)
            elif self._load_device is not None:
                value = value.to(device=self._load_device)
            self._parameters[name] = torch.nn.Parameter(value, requires_grad=False)

    def state_dict(self, *args, destination=None, prefix="", **kwargs):
        """Weight (packed or float) and bias, and for packed weights their scale and zero-point.

        The host takes a module's size from here, so everything resident is listed.
        """
        destination = {} if destination is None else destination
        for name, value in self._parameters.items():
            if value is not None:
                destination[prefix + name] = value
        if is_uniform(self.weight):
            destination[prefix + "weight_scale"] = self.weight_scale
            destination[prefix + "weight_zero_point"] = self.weight_zero_point
        elif is_packed(self.weight):
            destination[prefix + "weight_scale"] = self.weight_scale
        return destination

    def _apply(self, fn, recurse=True):
        for name, value in self._parameters.items():
            if value is None:
                continue
            moved = fn(value)
            if moved.is_inference() and not torch.is_inference_mode_enabled():
                moved = _usable(moved)
            elif moved is value:
                continue
            self.int8 = self.int8_ready = None
            # A model made outside inference mode may be moved inside it, and the other way round.
            with torch.inference_mode(moved.is_inference()):
                self._parameters[name] = torch.nn.Parameter(moved, requires_grad=False)
        return self

    def convert_weight(self, weight, inplace=False, **kwargs):
        """The float weight that a patch (LoRA, merge) is added to."""
        return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """Take a patched float weight from the host.

        Integers stay as they are: after each load ``host.lora`` makes the patch act in the
        forward, so that nothing is rounded again and no float copy is kept. ``inplace_update`` is
        how the host applies hooks (patches scheduled over the steps), which swap weights in
        mid-sampling.
        """
        if inplace_update and is_packed(self.weight):
            raise QuantTuneError(
                "A LoRA scheduled by hooks cannot act on quantized layers; use 'Load LoRA' or a "
                "float model instead.")
        weight = weight.to(self.weight.dtype)
        if return_weight:
            return weight
        if is_packed(self.weight):
            return None
        if inplace_update:
            self.weight.data.copy_(weight)
            return None
        self._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
        return None

    def forward(self, input, *args, **kwargs):
        comfy.ops.run_every_op()
        if self.fake_quant is not None:
            return self.fake_quant(input, self.bias)
        if self.int8 is not None and not (torch.is_grad_enabled() and input.requires_grad):
            return self.int8(input, self.active_scales)
        # Asking for the weight's own dtype keeps it packed unless a patch has to act on it.
        weight, bias, offloaded = comfy.ops.cast_bias_weight(
            self, dtype=self.weight.dtype, device=input.device, bias_dtype=input.dtype,
            offloadable=True, compute_dtype=input.dtype)
        if is_uniform(weight):
            output = self._packed_forward(input, unwrap(weight, self.low_rank), bias)
        elif is_packed(weight) and torch.is_grad_enabled() and input.requires_grad:
            output = self._trained_forward(input, weight, bias)
        else:
            if is_packed(weight):  # in the layout of another library
                weight = weight.dequantize()
            if self.low_rank is not None:  # or something else asked for a float weight
                weight = self.low_rank.added_to(weight)
            output = self._float_forward(input, weight.to(input.dtype), bias)
        comfy.ops.uncast_bias_weight(self, weight, bias, offloaded)
        return output

    def scale_split(self):
        """Input channels of the first part when the packed weight has two, else None."""
        return self.weight._params.split if is_uniform(self.weight) else None


class QuantTuneOps(comfy.ops.manual_cast):
    """Operations class for ``model_options['custom_operations']``."""

    class Linear(_ScaledOp, torch.nn.Linear, comfy.ops.CastWeightBiasOp):
        """Linear over packed integers or floats, with routed scales."""

        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Linear.__init__(self, in_features, out_features, bias, "meta", dtype)
            self._init_weights(device, dtype)

        def _packed_forward(self, input, weight, bias):
            return functional.linear(input, weight, bias, self.active_scales)

        def _trained_forward(self, input, weight, bias):
            return functional.apply_scales(
                input, lambda x, w, b: DequantizedProduct.apply(x, w, b, self.low_rank),
                functional.LINEAR_CHANNELS, weight, bias, self.active_scales)

        def _float_forward(self, input, weight, bias):
            return functional.scaled_linear(input, weight, bias, self.active_scales,
                                            self.scale_split())

    class Conv2d(_ScaledOp, torch.nn.Conv2d, comfy.ops.CastWeightBiasOp):
        """Conv2d (any groups, stride, dilation; zero padding) over packed integers or floats."""

        def __init__(self, *args, device=None, dtype=None, **kwargs):
            torch.nn.Conv2d.__init__(self, *args, device="meta", dtype=dtype, **kwargs)
            if self.padding_mode != "zeros":
                raise QuantTuneError(
                    f"A convolution with padding mode '{self.padding_mode}' cannot be quantized; "
                    "use the model unquantized.")
            self._init_weights(device, dtype)

        def _conv_args(self):
            return self.stride, self.padding, self.dilation, self.groups

        def _laid_out(self, input):
            """``input`` channels first, as the weight is, where that reorders less.

            Integer products leave images channels last. On a processor PyTorch then brings the
            whole weight into that layout in every call, up to twice the time of the product.
            """
            if (input.device.type != "cpu" or self.kernel_size == (1, 1)
                    or input.numel() >= self.weight.numel()):
                return input
            return input.contiguous()

        def _packed_forward(self, input, weight, bias):
            return functional.conv2d(self._laid_out(input), weight, bias, *self._conv_args(),
                                     scales=self.active_scales)

        def _float_forward(self, input, weight, bias):
            if weight.is_contiguous():
                input = self._laid_out(input)
            return functional.scaled_conv2d(input, weight, bias, *self._conv_args(),
                                            scales=self.active_scales, split=self.scale_split())


class DequantizedProduct(torch.autograd.Function):
    """A Linear over a frozen packed weight, which is dequantized again for the gradient of the
    input in place of being kept: ``apply(x, weight, bias, low_rank)``."""

    @staticmethod
    def forward(ctx, x, weight, bias, low_rank):
        """``x @ (weight + low_rank).T + bias``; ``weight`` is a `QuantizedTensor`."""
        ctx.weight, ctx.low_rank = weight, low_rank
        return torch.nn.functional.linear(x, _floats(weight, low_rank, x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient):
        """The gradient of ``x`` alone."""
        weight = _floats(ctx.weight, ctx.low_rank, gradient.dtype)
        return gradient @ weight, None, None, None


def _floats(weight, low_rank, dtype):
    weight = weight.dequantize()
    return (weight if low_rank is None else low_rank.added_to(weight)).to(dtype)


def _usable(tensor: torch.Tensor) -> torch.Tensor:
    """What was made in inference mode as something that autograd may save; memory is shared.

    The host moves a MODEL outside that mode when it lets go of it: copying integers there would
    read all of the file that they are mapped to.
    """
    if isinstance(tensor, QuantizedTensor):
        return tensor._copy_with(qdata=torch.from_dlpack(tensor._qdata))
    return torch.from_dlpack(tensor)


def scaled_layers(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Name to module of every layer of ``module`` that can hold integers and take scales."""
    return {name: m for name, m in module.named_modules() if isinstance(m, _ScaledOp)}
