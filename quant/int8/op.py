"""The integer product as one operator, so that a compiler sees a call and not what is inside.

Prepared weights are opaque to torch (blocked layouts, functions of other libraries), so the
operator gets a *handle*: a one-element tensor that names one of them. As a tensor it is an input of
a compiled graph; as a number it would be compiled in.
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

from .activation import QuantizedActivation
from .backend import ConvGeometry, Prepared

_PREPARED: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def register(prepared: Prepared) -> Tensor:
    """The handle of a prepared weight; it is valid as long as the weight is kept."""
    number = next(_NUMBERS)
    _PREPARED[number] = prepared
    return torch.tensor(number)


def _library() -> tuple[torch.library.Library, str]:
    """A namespace of its own: the pack may be imported by path and as a package in one process."""
    for number in itertools.count(1):
        name = f"quanttune{number}"
        if not hasattr(getattr(torch.ops, name), "int8_product"):
            return torch.library.Library(name, "FRAGMENT"), name


_LIBRARY, _NAME = _library()
_LIBRARY.define(
    "int8_product(Tensor values, Tensor scale, Tensor zero_point, Tensor out_scale, Tensor? bias, "
    "Tensor handle, ScalarType dtype, int[] conv) -> Tensor"
)


def _run(values, scale, zero_point, out_scale, bias, handle, dtype, conv):
    prepared = _PREPARED[int(handle)]
    return prepared(QuantizedActivation(values, scale, zero_point), out_scale, bias, dtype)


def _shape(values, scale, zero_point, out_scale, bias, handle, dtype, conv):
    """The output for the compiler; ``conv`` is kernel, stride, padding and dilation, or empty."""
    shape = [*values.shape[:-1], out_scale.shape[0]]
    for axis in range(2 if conv else 0):
        kernel, stride, padding, dilation = conv[axis::2]
        span = dilation * (kernel - 1) + 1
        shape[1 + axis] = (values.shape[1 + axis] + 2 * padding - span) // stride + 1
    return values.new_empty(shape, dtype=dtype)


_LIBRARY.impl("int8_product", _run, "CompositeExplicitAutograd")
_LIBRARY._register_fake("int8_product", _shape)
_product = getattr(torch.ops, _NAME).int8_product.default


def product(
    x: QuantizedActivation,
    out_scale: Tensor,
    bias: Tensor | None,
    handle: Tensor,
    dtype: torch.dtype,
    conv: ConvGeometry | None,
) -> Tensor:
    """Run the prepared weight that ``handle`` names, in compiled code; see `backend.Prepared`."""
    walk = [] if conv is None else [*conv.kernel, *conv.stride, *conv.padding, *conv.dilation]
    return _product(x.values, x.scale, x.zero_point, out_scale, bias, handle, dtype, walk)
