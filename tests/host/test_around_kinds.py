"""Scales around layers that hold weights in other ways: the host's own, GGUF, bitsandbytes."""

import json

import pytest
import torch
from torch import nn

from quanttune.tests.host import models
from quanttune.tests.host.models import quantize
from quanttune.tests.host.test_lora import lora_file, with_lora
from quanttune.tests.host.test_routing import apply


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


@pytest.fixture
def pair():
    """A quantized MODEL and the float one of the same weights."""
    quantized, _ = quantize(models.small_model())
    return quantized, models.dequantized_copy(quantized)


def linears(unet):
    return {n: m for n, m in unet.named_modules() if isinstance(m, nn.Linear)}


def replaced(floats, make, kinds=(nn.Linear,)):
    """A copy of a float MODEL whose layers are ``make(layer)``, and its float twin."""
    changed, twin = models.small_model(), models.small_model()
    state = floats.model.diffusion_model.state_dict()
    for model in (changed, twin):
        model.model.diffusion_model.load_state_dict(state)
    for name, layer in list(changed.model.diffusion_model.named_modules()):
        if isinstance(layer, kinds):
            parent, _, leaf = name.rpartition(".")
            made, exact = make(layer)
            setattr(changed.model.diffusion_model.get_submodule(parent), leaf, made)
            twin.model.diffusion_model.get_submodule(name).weight.copy_(exact)
    return changed, twin


def check(pair, changed, twin, tolerance=1e-5):
    """Scaled it is what its twin is scaled, and without scales what it was."""
    quantized, _ = pair
    scales = models.random_scales(quantized)
    for timesteps in ((700.0, 700.0), (999.0, 10.0)):
        arguments = models.inputs(quantized, timesteps)
        base = models.forward(changed, arguments)
        expected = models.forward(apply(twin, scales), arguments)
        got = models.forward(apply(changed, scales), arguments)
        assert models.relative(got, expected) < tolerance
        assert models.relative(base, expected) > 2 * tolerance
        assert torch.equal(models.forward(changed, arguments), base)


def hosts_own(floats, kind, exact):
    """``floats`` with Linear layers that the host itself quantizes, and its float twin."""
    import comfy.supported_models
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    layout = QUANT_ALGOS[kind]["comfy_tensor_layout"]
    config = comfy.supported_models.SD15({**models.COMMON, **models.FAMILIES["SD15"]})
    config.quant_config = {"mixed_ops": True}
    config.set_inference_dtype(torch.float32, torch.float32)
    built = config.get_model({}, "").diffusion_model
    twin = models.small_model()
    unet = twin.model.diffusion_model
    unet.load_state_dict(floats.model.diffusion_model.state_dict())
    state, taken = {}, 0
    for name, layer in linears(unet).items():
        # Some kinds have rules for sizes, and leave other layers in float.
        if layer.in_features % 32 or layer.out_features % 32:
            continue
        options = {"per_channel": True} if kind == "int8_tensorwise" else {}
        try:
            packed = QuantizedTensor.from_float(layer.weight, layout, **options)
        except TypeError:
            packed = QuantizedTensor.from_float(layer.weight, layout)
        state |= packed.state_dict(f"{name}.weight")
        facts = {"format": kind, "full_precision_matrix_mult": exact}
        state[f"{name}.comfy_quant"] = torch.tensor(list(json.dumps(facts).encode()),
                                                    dtype=torch.uint8)
        layer.weight.copy_(packed.dequantize())
        taken += 1
    assert taken > 10
    own = {**unet.state_dict(), **state}
    missing, unexpected = built.load_state_dict(own, strict=False)
    assert not missing and not unexpected
    model = models.small_model()
    model.model.diffusion_model = built
    return model, twin


@pytest.mark.parametrize("kind,exact,tolerance", [
    # int8 and fp8 round activations too, which is no longer linear.
    ("int8_tensorwise", False, 0.02), ("float8_e4m3fn", True, 1e-5), ("float8_e4m3fn", False, 0.05),
    ("nvfp4", True, 1e-5)])
def test_the_hosts_own_integers_and_fp8(pair, kind, exact, tolerance, request):
    if kind == "int8_tensorwise":  # the host's own sums are cut on other processors
        request.getfixturevalue("integer_products")
    changed, twin = hosts_own(pair[1], kind, exact)
    check(pair, changed, twin, tolerance)


class StandInTensor(torch.Tensor):
    """A stand-in for the tensors of ComfyUI-GGUF, which is not installed: bytes in blocks that say
    the shape they stand for."""

    @staticmethod
    def __new__(cls, data, shape=None):
        tensor = data.as_subclass(cls)
        tensor.tensor_shape, tensor.patches = shape, []
        return tensor

    def to(self, *args, **kwargs):
        new = super().to(*args, **kwargs)
        new.tensor_shape, new.patches = self.tensor_shape, list(self.patches)
        return new

    def detach(self):
        return self

    @property
    def shape(self):
        return getattr(self, "tensor_shape", None) or self.size()


BLOCK = 32


def q8_0(weight):
    """Blocks of a float16 scale and 32 int8, as bytes."""
    blocks = weight.float().reshape(-1, BLOCK)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    values = (blocks / scale.float().clamp_min(1e-8)).round().clamp(-127, 127).to(torch.int8)
    data = torch.cat([scale.view(torch.uint8), values.view(torch.uint8)], 1)
    return StandInTensor(data, torch.Size(weight.shape))


def from_q8_0(tensor, dtype):
    """The floats of `q8_0`."""
    data = tensor.as_subclass(torch.Tensor)
    scale = data[:, :2].contiguous().view(torch.float16).float()
    values = data[:, 2:].contiguous().view(torch.int8).float()
    return (scale * values).reshape(tensor.tensor_shape).to(dtype)


def stand_in_layers():
    """Stand-ins for the layers of ComfyUI-GGUF: they dequantize in their forward, bias too."""
    import comfy.lora
    import comfy.ops

    class Layer:
        comfy_cast_weights = True

        def get_weight(self, tensor, dtype):
            if not isinstance(tensor, StandInTensor):
                return tensor.to(dtype)
            weight = from_q8_0(tensor, dtype)
            for patches, key in tensor.patches:
                weight = comfy.lora.calculate_weight(patches, weight, key)
            return weight

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            # What its memory is reckoned by: bytes without their meaning.
            for leaf, value in self._parameters.items():
                if value is not None:
                    destination[prefix + leaf] = torch.empty(value.size(), dtype=value.dtype,
                                                             device="meta")

        def forward_comfy_cast_weights(self, input):
            weight = self.get_weight(self.weight.to(input.device), input.dtype)
            bias = None if self.bias is None else self.get_weight(self.bias, input.dtype)
            return self.product(input, weight, bias)

    class Linear(Layer, comfy.ops.manual_cast.Linear):
        product = staticmethod(nn.functional.linear)

    class Conv2d(Layer, comfy.ops.manual_cast.Conv2d):
        def product(self, input, weight, bias):
            return self._conv_forward(input, weight, bias)

    return Linear, Conv2d


def gguf(floats):
    """``floats`` in stand-in layers, quantized where 32 divides the weights and the biases."""
    linear, conv = stand_in_layers()

    def make(layer):
        made = object.__new__(linear if isinstance(layer, nn.Linear) else conv)
        made.__dict__.update({k: v for k, v in layer.__dict__.items() if k != "_parameters"})
        made.__dict__["_parameters"] = {}
        exact = layer.weight
        for leaf in ("weight", "bias"):
            value = getattr(layer, leaf)
            if value is not None and value.numel() % BLOCK == 0:
                packed = q8_0(value)
                value.copy_(from_q8_0(packed, torch.float32))
                value = nn.Parameter(packed, requires_grad=False)
            made._parameters[leaf] = value
        return made, exact

    changed, twin = replaced(floats, make, (nn.Linear, nn.Conv2d))
    for name, layer in changed.model.diffusion_model.named_modules():
        if isinstance(getattr(layer, "bias", None), StandInTensor):
            twin.model.diffusion_model.get_submodule(name).bias.copy_(
                layer.get_weight(layer.bias, torch.float32))
    return changed, twin


def test_gguf_by_a_stand_in(pair):
    changed, twin = gguf(pair[1])
    assert isinstance(changed.model.diffusion_model.out[2].weight, StandInTensor)
    check(pair, changed, twin)


def test_gguf_by_a_stand_in_with_patches_of_its_own(pair):
    changed, twin = gguf(pair[1])
    layer = changed.model.diffusion_model.time_embed[0]
    diff = torch.randn(layer.bias.shape, generator=torch.Generator().manual_seed(0))
    layer.bias.patches = [([(1.0, ("diff", (diff,)), 1.0, None, None)], "time_embed.0.bias")]
    twin.model.diffusion_model.time_embed[0].bias += diff
    check(pair, changed, twin)


def test_a_lora_fits_gguf_by_what_its_bytes_stand_for(pair):
    from quanttune.host.lora_file import import_lora
    from quanttune.host.lora_fit import fit_lora
    from quanttune.quant import QuantTuneError

    changed, _ = gguf(pair[1])
    lora = lora_file(pair[1])
    layers, same = import_lora(lora, changed), import_lora(lora, pair[1])
    assert {n: v.up.shape for n, v in layers.items()} == {n: v.up.shape for n, v in same.items()}
    assert len(fit_lora(lora, changed).patches) == len(fit_lora(lora, pair[1]).patches)
    name = next(n for n in lora if n.endswith("lora_down.weight"))
    with pytest.raises(QuantTuneError, match="does not fit this model"):
        fit_lora(lora | {name: lora[name][:, 1:]}, changed)


def bnb_layer(kind):
    """Makes a layer of bitsandbytes from a Linear."""
    bnb = pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit

    def make(layer):
        bias = layer.bias is not None
        with torch.inference_mode(False):
            weight = layer.weight.detach().clone()
            if kind == "int8":
                made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias,
                                           has_fp16_weights=False)
                made.weight = bnb.nn.Int8Params(weight, requires_grad=False,
                                                has_fp16_weights=False)
            else:
                made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias,
                                         compute_dtype=torch.float32, quant_type=kind)
                made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind)
            if bias:
                made.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
            made = made.to("cpu")
            if kind == "int8":
                exact = made.weight.data.float() * made.weight.SCB[:, None] / 127
            else:
                exact = dequantize_4bit(made.weight.data, made.weight.quant_state)
        return made, exact.view(weight.shape)

    return make


@pytest.mark.parametrize("kind,tolerance", [("nf4", 1e-5), ("fp4", 1e-5), ("int8", 0.02)])
def test_layers_of_bitsandbytes(pair, kind, tolerance):
    changed, twin = replaced(pair[1], bnb_layer(kind))
    check(pair, changed, twin, tolerance)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_they_are_told_apart_from_floats(pair, kind):
    from quanttune.host.export_unet import export_unet
    from quanttune.quant import QuantTuneError

    changed, _ = replaced(pair[1], bnb_layer(kind))
    with pytest.raises(QuantTuneError, match=r"quantized already, .*'Export Float UNet'"):
        quantize(changed)
    quantize(export_unet(changed, "no file", "float32")[0])


def test_a_lora_on_the_convolutions_beside_them(pair):
    quantized, floats = pair
    changed, twin = gguf(floats)
    scales, lora = models.random_scales(quantized), lora_file(floats)
    arguments = models.inputs(quantized)
    expected = models.forward(with_lora(apply(twin, scales), lora), arguments)
    bypass = with_lora(apply(changed, scales), lora, bypass=True)
    assert models.relative(models.forward(bypass, arguments), expected) < 1e-5
    bypass.detach()


def test_a_bias_that_cannot_be_read(pair):
    from quanttune.quant import QuantTuneError

    quantized, floats = pair
    layer = floats.model.diffusion_model.out[2]
    layer.get_weight = lambda tensor, dtype: tensor[:1]
    with pytest.raises(QuantTuneError, match=r"'out.2' \(Conv2d\) has a bias of shape \[1\]"):
        models.forward(apply(floats, models.random_scales(quantized)), models.inputs(quantized))
