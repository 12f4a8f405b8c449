"""A Linear or Conv2d that multiplies integers (W8A8, W4A8), with TuneQDM's scales folded in."""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import QuantTuneError
from ..functional import multiply, per_sample
from ..low_rank import LowRank
from ..scales import LayerScales
from ..weight import QuantizedWeight
from . import op
from .activation import Granularity, QuantizedActivation
from .backend import Backend, ConvGeometry
from .ranges import Qparams
from .weight import Int8Weight


class SharedActivation:
    """The last activation that layers with one input quantized, so that it is done once.

    The query, key and value projections of an attention run one after the other on one tensor. A
    tensor that is still the same object has the same values then; call `forget` before each
    forward of the model, between which it need not.
    """

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        """Drop what is kept."""
        self._source, self._how, self._quantized = lambda: None, None, None

    def get(self, x: Tensor, how: object) -> QuantizedActivation | None:
        """The quantized ``x`` if it was the last one and quantized in the same way."""
        return self._quantized if self._source() is x and self._how == how else None

    def put(self, x: Tensor, how: object, quantized: QuantizedActivation) -> None:
        """Keep a quantized ``x``, as long as something else keeps ``x`` itself."""
        self._source = weakref.ref(x, lambda _: self.forget())
        self._how, self._quantized = how, quantized


class Int8Layer:
    """``y = r_out * f(q(x * s_in)) + b`` with ``f`` an integer product.

    ``s_in`` multiplies the activation where it is quantized and ``r_out`` the output scale, so that
    the scales of one expert cost nothing. Samples with experts of their own are scaled one by one.

    Args:
        qweight: any packed weight; 4 bits and fewer are unpacked to 8 (W4A8).
        conv: None for a Linear.
        backend: see `backend.choose`.
        granularity: what shares an activation scale; None for what suits the backend.

    Attributes:
        shared: where layers that read the same tensor find it quantized, or None.
        static: scale and zero point of the activation, a pair for each part of the input channels,
            to be set before a forward (`ranges.ActivationRanges.select`); None quantizes by the
            range that the activation has then.
        low_rank: what a LoRA adds to the weight, or None; not for grouped convolutions. It is
            computed in float beside the integers: rounded into them, a change of less than half
            a step would be gone.

    Raises:
        QuantTuneError: a grouped convolution with split input channels.
    """

    def __init__(
        self,
        qweight: QuantizedWeight,
        conv: ConvGeometry | None,
        backend: Backend,
        granularity: Granularity | None = None,
    ):
        if qweight.split is not None and conv is not None and conv.groups != 1:
            raise QuantTuneError(
                "A grouped convolution cannot have its input channels split for quantization; "
                "quantize this layer without a split."
            )
        self.conv, self.backend = conv, backend
        self.shared: SharedActivation | None = None
        self.static: Qparams | None = None
        self.low_rank: LowRank | None = None
        # One row of scales would have to follow each pixel through the window of a convolution.
        self.granularity = granularity or backend.granularity
        if conv is not None:
            self.granularity = Granularity.TENSOR
        self.parts = [
            _Part(columns, weight, conv, backend) for columns, weight in Int8Weight.parts(qweight)
        ]

    def __call__(
        self, x: Tensor, bias: Tensor | None = None, scales: LayerScales | None = None
    ) -> Tensor:
        """The layer's output in the dtype of ``x``, as `functional.linear` or `conv2d` give it.

        Args:
            x: ``[batch, ..., in]``, or ``[batch, in, height, width]`` for a convolution, best in
                channels-last memory, which is what comes out.
            bias: ``[out]`` or None.
            scales: one row for all samples or one row a sample.
        """
        if self.conv is None:
            y = self._forward(x, bias, scales)
        else:
            y = self._forward(x.movedim(1, -1), bias, scales).movedim(-1, 1)
        return y if self.low_rank is None else self._with_low_rank(y, x, scales)

    def _with_low_rank(self, y: Tensor, x: Tensor, scales: LayerScales | None) -> Tensor:
        """``y + r_out * (up @ down) (x * s_in)``; writes into ``y``, which is the product's own."""
        axis = -1 if self.conv is None else -3
        whole = self.low_rank.to(x.device, x.dtype)
        down = whole.down.view(whole.rank, x.shape[axis], -1)
        r_out = s_in = None
        if scales is not None:
            r_out, s_in = scales.r_out.chunk(len(self.parts), dim=1), scales.s_in
        total = y if self.conv is None else y.movedim(1, -1)
        for index, part in enumerate(self.parts):
            inputs, lower, upper = x, down[:, part.columns], whole.up
            if len(self.parts) > 1:
                inputs = x[..., part.columns] if self.conv is None else x[:, part.columns]
            if s_in is not None:
                own = s_in[:, part.columns].to(x.dtype)
                if own.shape[0] == 1:
                    lower = lower * own[0, :, None]
                else:
                    inputs = inputs * per_sample(own, inputs, axis)
            hidden = self._hidden(inputs, lower)
            if r_out is not None and r_out[index].shape[0] > 1:
                term = F.linear(hidden, upper)
                total += multiply(term, per_sample(r_out[index], term, -1))
                continue
            if r_out is not None:
                upper = upper * r_out[index][0, :, None].to(x.dtype)
            # One pass over the outputs, where they lie as a matrix.
            if total.is_contiguous():
                total.view(-1, len(upper)).addmm_(hidden.reshape(-1, whole.rank), upper.t())
            else:
                total += F.linear(hidden, upper)
        return y

    def _hidden(self, x: Tensor, down: Tensor) -> Tensor:
        """``down`` ``[R, in, kernel]`` times the inputs, ``[..., R]``, channels last for images."""
        if self.conv is None:
            return F.linear(x, down.flatten(1))
        c = self.conv
        if down.shape[2] == 1 and c.stride == (1, 1) and c.padding == (0, 0):
            return F.linear(x.movedim(1, -1), down.flatten(1))
        down = down.unflatten(2, c.kernel).contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, down, None, c.stride, c.padding, c.dilation).movedim(1, -1)

    def _forward(self, x, bias, scales):
        r_out = s_in = None
        if scales is not None:
            r_out = scales.r_out.chunk(len(self.parts), dim=1)
            s_in = scales.s_in
        one_expert = r_out is None or r_out[0].shape[0] == 1
        folds = one_expert and len(self.parts) == 1 and self.parts[0].offset is None
        if folds and s_in is None and self._fuses():
            return self._fused(x, r_out, bias)
        total = None
        for index, part in enumerate(self.parts):
            q = self._quantize(x, s_in, index)
            out_scale = part.scale
            if r_out is not None and one_expert:
                out_scale = out_scale * r_out[index][0]
            y = part(q, out_scale, bias if folds else None, x.dtype)
            y = y.view(*x.shape[:-1], -1) if self.conv is None else y
            if not one_expert:
                y = multiply(y, per_sample(r_out[index], y, -1))
            total = y if total is None else total + y
        return total if folds or bias is None else total + bias.to(total.dtype)

    def _fuses(self) -> bool:
        return (
            self.static is None
            and self.granularity is Granularity.TOKEN
            and hasattr(self.parts[0].prepared, "fused")
            and not torch.compiler.is_compiling()
        )

    def _fused(self, x: Tensor, r_out, bias: Tensor | None) -> Tensor:
        (part,) = self.parts
        out_scale = part.scale if r_out is None else part.scale * r_out[0][0]
        y = part.prepared.fused(x.reshape(-1, x.shape[-1]), out_scale, bias, x.dtype)
        return y.view(*x.shape[:-1], -1)

    def _quantize(self, x: Tensor, s_in: Tensor | None, part: int) -> QuantizedActivation:
        """``x * s_in`` in 8 bits, as tokens ``[n, in]`` or as images, channels last."""
        qparams = None if self.static is None else self.static[part]
        columns = self.parts[part].columns
        shares = (
            self.shared is not None
            and s_in is None
            and len(self.parts) == 1
            and not torch.compiler.is_compiling()
        )
        # Equal ranges are one object (`ranges.ActivationRanges.select`).
        how = (self.granularity if qparams is None else id(qparams)) if shares else None
        known = self.shared.get(x, how) if shares else None
        if known is not None:
            return known
        inputs = x if len(self.parts) == 1 else x[..., columns]
        if s_in is not None:
            s_in = per_sample(s_in[:, columns], inputs, -1)
        if self.conv is None:
            tokens = inputs.reshape(-1, inputs.shape[-1])
            if s_in is not None and s_in.dim() > 1:
                s_in = s_in.expand(inputs.shape).reshape(tokens.shape)
            inputs = tokens
        if qparams is None and self.granularity is Granularity.TOKEN:
            quantized = self.backend.quantize_tokens(inputs, s_in)
        else:
            quantized = self.backend.quantize_tensor(inputs, s_in, qparams)
        if shares:
            self.shared.put(x, how, quantized)
        return quantized


class _Part:
    """One integer product over some of the input channels."""

    def __init__(self, columns: slice, weight: Int8Weight, conv, backend):
        self.columns, self.scale, self.offset = columns, weight.scale, weight.offset
        self.conv = conv
        self.prepared = backend.prepare(weight, conv)
        self.handle = op.register(self.prepared)

    def __call__(self, q: QuantizedActivation, out_scale, bias, dtype) -> Tensor:
        # What an offset adds may be far larger than the sum: both in float32.
        kind = dtype if self.offset is None else torch.float32
        if torch.compiler.is_compiling():
            y = op.product(q, out_scale, bias, self.handle, kind, self.conv)
        else:
            y = self.prepared(q, out_scale, bias, kind)
        return y if self.offset is None else (y + self._offset(q, out_scale)).to(dtype)

    def _offset(self, q: QuantizedActivation, out_scale: Tensor) -> Tensor:
        """``out_scale * offset`` times the sum of the activations that each output reads."""
        values = q.values.float() - q.zero_point
        if self.conv is None:
            sums = values.sum(-1, keepdim=True) * q.scale
        else:
            c = self.conv
            grouped = values.unflatten(-1, (c.groups, -1)).sum(-1).movedim(-1, 1)
            window = torch.ones(c.groups, 1, *c.kernel, device=values.device)
            sums = F.conv2d(grouped, window, None, c.stride, c.padding, c.dilation, c.groups)
            sums = sums.movedim(1, -1) * q.scale
            sums = sums.repeat_interleave(out_scale.shape[0] // c.groups, dim=-1)
        return sums * (out_scale * self.offset)
