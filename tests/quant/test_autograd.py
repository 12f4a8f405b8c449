"""The closed-form gradients against autograd through eq. 5 materialised, and what they keep."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from quanttune.quant import LayerScales, conv2d, linear
from quanttune.tests.quant.reference import random_scales, random_weight, relative

TOLERANCE = 1e-4


def trainable(scales):
    """The same scales as leaves that want gradients."""
    tensors = (scales.r_out, scales.s_in)
    return LayerScales(*(None if t is None else t.clone().requires_grad_() for t in tensors))


def reference(x, qweight, bias, scales, product, groups=1):
    """Eq. 5 sample by sample, differentiable in its scales and ``x``, in float64."""
    outputs = []
    q = qweight.codes().double().view(qweight.shape)
    ones = (1,) * (len(qweight.shape) - 2)
    borders = [0, qweight.shape[1]] if qweight.split is None else [0, qweight.split,
                                                                  qweight.shape[1]]
    for index in range(x.shape[0]):
        row = index * scales.rows // x.shape[0]
        total = 0
        for part, (start, stop) in enumerate(zip(borders, borders[1:])):
            s0 = qweight.scale[:, part].double()
            zero = qweight.zero_point[:, part].double().view(-1, 1, *ones)
            r = scales.r_out[row].double().view(len(borders) - 1, -1)[part]
            weight = (r * s0).view(-1, 1, *ones) * (q[:, start:stop] - zero)
            if scales.s_in is not None:
                s = scales.s_in[row].double().view(groups, 1, -1)[:, :, start:stop]
                rows = weight.shape[0] // groups
                weight = (weight.view(groups, rows, *weight.shape[1:])
                          * s.reshape(groups, 1, -1, *ones)).view(weight.shape)
            dim = -1 if product is F.linear else -3
            piece = x[index:index + 1].double().narrow(dim, start * groups,
                                                       (stop - start) * groups)
            total = total + product(piece, weight)
        outputs.append(total + bias.double().view(-1, *[1] * (0 if product is F.linear else 2)))
    return torch.cat(outputs)


def compare(run, x, qweight, scales, product, groups=1, tolerance=TOLERANCE):
    """Assert output and all gradients of ``run(x, scales)`` against the reference."""
    bias = torch.randn(qweight.shape[0])
    ours, theirs = trainable(scales), trainable(scales)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual = run(x_ours, bias, ours)
    expected = reference(x_theirs, qweight, bias, theirs, product, groups)
    assert relative(actual.detach(), expected.detach()) < tolerance
    grad = torch.randn(expected.shape, dtype=torch.float64)
    actual.backward(grad.to(actual.dtype))
    expected.backward(grad)
    for name, a, b in (("x", x_ours, x_theirs), ("r_out", ours.r_out, theirs.r_out),
                       ("s_in", ours.s_in, theirs.s_in)):
        if b is not None:
            assert a.grad.shape == b.grad.shape and relative(a.grad, b.grad) < tolerance, name


ROWS = st.sampled_from(["one", "each", "half"])


def rows_of(kind, batch):
    return {"one": 1, "each": batch, "half": max(1, batch // 2)}[kind]


@given(st.sampled_from([1, 2, 4]), ROWS, st.sampled_from([2, 3, 4, 8]),
       st.sampled_from([None, 3]), st.booleans(), st.sampled_from([(), (5,), (2, 3)]))
def test_linear(batch, rows, bits, split, with_s_in, middle):
    qweight = random_weight((6, 10), bits, split)
    scales = random_scales(qweight, rows_of(rows, batch), with_s_in=with_s_in)
    compare(lambda x, bias, s: linear(x, qweight, bias, s), torch.randn(batch, *middle, 10),
            qweight, scales, F.linear)


@given(st.sampled_from([1, 2, 4]), ROWS, st.sampled_from([3, 4]), st.sampled_from([None, 3]),
       st.booleans(), st.sampled_from([1, 3]), st.sampled_from([1, 2]),
       st.sampled_from([0, 1, "same", "valid"]), st.sampled_from([1, 2]))
def test_conv2d(batch, rows, bits, split, with_s_in, kernel, stride, padding, dilation):
    if padding == "same":
        stride = 1
    qweight = random_weight((6, 8, kernel, kernel), bits, split)
    scales = random_scales(qweight, rows_of(rows, batch), with_s_in=with_s_in)
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    compare(lambda x, bias, s: conv2d(x, qweight, bias, scales=s, **options),
            torch.randn(batch, 8, 9, 7), qweight, scales,
            lambda x, weight: F.conv2d(x, weight, **options))


@pytest.mark.parametrize("rows", [1, 2])
def test_grouped_convolution(rows):
    qweight = random_weight((6, 4, 3, 3))
    scales = random_scales(qweight, rows, groups=2)
    compare(lambda x, bias, s: conv2d(x, qweight, bias, padding=1, groups=2, scales=s),
            torch.randn(2, 8, 5, 5), qweight, scales,
            lambda x, weight: F.conv2d(x, weight, padding=1, groups=2), groups=2)


@pytest.mark.parametrize("rows", [1, 2])
def test_same_padding_that_is_not_symmetric_still_trains(rows):
    qweight = random_weight((6, 8, 2, 2))
    scales = random_scales(qweight, rows)
    compare(lambda x, bias, s: conv2d(x, qweight, bias, padding="same", scales=s),
            torch.randn(2, 8, 5, 5), qweight, scales,
            lambda x, weight: F.conv2d(x, weight, padding="same"))


@pytest.mark.parametrize("rows", [1, 4])
def test_half_precision_is_as_good_as_its_activations(rows):
    qweight = random_weight((48, 64))
    scales = random_scales(qweight, rows)
    compare(lambda x, bias, s: linear(x.bfloat16(), qweight, bias, s), torch.randn(4, 32, 64),
            qweight, scales, F.linear, tolerance=2e-2)


def test_a_small_change_of_s_in_survives_half_precision():
    """0.1 % of a bfloat16 activation is below its rounding step; folded in the weight it acts."""
    qweight = random_weight((256, 256), 8)
    x = torch.randn(8, 16, 256).bfloat16().requires_grad_()
    ones = LayerScales(torch.ones(1, 256).requires_grad_(), torch.ones(1, 256).requires_grad_())
    moved = LayerScales(ones.r_out, (ones.s_in.detach() * 1.001).requires_grad_())
    base, changed = (linear(x, qweight, None, s).float().detach() for s in (ones, moved))
    slope = (changed - base).flatten() @ base.flatten() / base.square().sum()
    assert 8e-4 < float(slope) < 1.2e-3


def test_autocast_is_respected():
    qweight = random_weight((6, 10))
    scales = trainable(random_scales(qweight, 1))
    x = torch.randn(2, 3, 10, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, qweight, torch.randn(6), scales)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and scales.r_out.grad.dtype == torch.float32


def kept_bytes(run):
    """Bytes of the distinct tensors that autograd saves during ``run()``."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t,
            lambda t: t):
        out = run()
    del out
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def test_nothing_of_the_size_of_a_weight_is_kept():
    qweight = random_weight((512, 512))
    x = torch.randn(1, 2, 512, requires_grad=True)
    scales = trainable(random_scales(qweight, 1))
    budget = x.nbytes + scales.r_out.nbytes + scales.s_in.nbytes + 2 * 512 * 4
    assert kept_bytes(lambda: linear(x, qweight, None, scales)) <= budget


def test_what_does_not_train_keeps_nothing():
    qweight = random_weight((64, 64))
    x = torch.randn(100, 64, requires_grad=True)
    frozen = random_scales(qweight, 1)
    assert kept_bytes(lambda: linear(x, qweight, None, frozen)) <= 2 * 64 * 4
    only_r = LayerScales(frozen.r_out.clone().requires_grad_(), None)
    y_bytes = 100 * 64 * 4
    assert kept_bytes(lambda: linear(x, qweight, None, only_r)) <= y_bytes + 64 * 4


def test_weights_that_the_host_made_in_inference_mode_train():
    with torch.inference_mode():
        qweight, bias = random_weight((6, 10)), torch.randn(6)
    scales = trainable(random_scales(qweight, 1))
    y = linear(torch.randn(2, 10, requires_grad=True), qweight, bias, scales)
    y.sum().backward()
    assert torch.isfinite(scales.r_out.grad).all() and scales.s_in.grad.abs().sum() > 0


def test_a_scale_of_zero_does_not_end_in_nan():
    qweight = random_weight((6, 10))
    scales = LayerScales(torch.ones(1, 6), torch.ones(1, 10))
    scales.r_out[0, 2] = 0.0
    scales = trainable(scales)
    linear(torch.randn(2, 10), qweight, None, scales).square().sum().backward()
    assert torch.isfinite(scales.r_out.grad).all() and torch.isfinite(scales.s_in.grad).all()


def test_checkpointed_layers_give_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    qweight = random_weight((10, 10))
    gradients = []
    for use in (False, True):
        scales, x = trainable(random_scales(qweight, 1)), torch.linspace(-1, 1, 20).view(2, 10)

        def block(value, scales=scales):
            return torch.tanh(linear(value, qweight, None, scales))

        y = checkpoint(block, x, use_reentrant=False) if use else block(x)
        y.square().sum().backward()
        gradients.append((scales.r_out.grad, scales.s_in.grad))
    for plain, recomputed in zip(*gradients):
        assert torch.equal(plain, recomputed)
