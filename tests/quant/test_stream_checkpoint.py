"""A quantized UNet written layer by layer is the file written at once."""

import pytest
import torch

from quanttune.quant import QuantizedWeight, QuantSpec, QuantTuneError, UNetMetadata
from quanttune.quant.checkpoint import load_quantized_unet, save_quantized_unet
from quanttune.quant.stream_checkpoint import LayerPlan, stream_quantized_unet

SHAPES = {"b.conv": (6, 5, 3, 3), "a.fc": (7, 9), "c.short": (4, 10, 1, 1)}
SPLITS = {"c.short": 4}


def made(bits=4, symmetric=False):
    generator = torch.Generator().manual_seed(bits)
    layers = {name: QuantizedWeight.quantize(torch.randn(shape, generator=generator),
                                             QuantSpec(bits, symmetric), SPLITS.get(name))
              for name, shape in SHAPES.items()}
    floats = {"n.weight": torch.ones(3), "b.conv.bias": torch.zeros(6, dtype=torch.float16),
              "a.half": torch.rand(2, 2).bfloat16(), "e": torch.zeros(0)}
    return layers, floats


def stream(path, layers, floats, **options):
    plans = {n: LayerPlan(w.shape, w.bits, w.symmetric, w.split) for n, w in layers.items()}
    facts = {n: (tuple(v.shape), v.dtype) for n, v in floats.items()}
    metadata = UNetMetadata("SD15", {"x": [1]}, "EPS", provenance={"p": 1})
    return stream_quantized_unet(path, plans, facts, layers.__getitem__, floats.__getitem__,
                                 metadata, **options)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_byte_for_byte(bits, symmetric, tmp_path):
    layers, floats = made(bits, symmetric)
    said = stream(tmp_path / "a.safetensors", layers, floats)
    metadata = UNetMetadata("SD15", {"x": [1]}, "EPS", provenance={"p": 1})
    whole = save_quantized_unet(tmp_path / "b.safetensors", layers, floats, metadata)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert said == whole
    assert load_quantized_unet(tmp_path / "a.safetensors").metadata.fingerprint == said.fingerprint


def test_one_layer_at_a_time_by_name(tmp_path):
    layers, floats = made()
    asked = []
    plans = {n: LayerPlan(w.shape, w.bits, w.symmetric, w.split) for n, w in layers.items()}
    facts = {n: (tuple(v.shape), v.dtype) for n, v in floats.items()}
    stream_quantized_unet(
        tmp_path / "a.safetensors", plans, facts,
        lambda n: asked.append(n) or layers[n], lambda n: asked.append(n) or floats[n],
        UNetMetadata("SD15"))
    assert asked == [*sorted(layers), *sorted(floats)]


def refused(match, path, *args, **options):
    with pytest.raises(QuantTuneError, match=match):
        stream(path, *args, **options)


def test_nothing_is_left_of_what_fails(tmp_path):
    layers, floats = made()

    class Broken(dict):
        def __getitem__(self, name):
            if name == "c.short":
                raise QuantTuneError("The weights hold NaN.")
            return super().__getitem__(name)

    (tmp_path / "a.safetensors").write_bytes(b"old")
    refused("hold NaN", tmp_path / "a.safetensors", Broken(layers), floats)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == b"old"


def test_refusals(tmp_path):
    layers, floats = made()
    path = tmp_path / "a.safetensors"
    refused("no layers to quantize", path, {}, floats)
    refused("both quantized and float", path, layers, {**floats, "a.fc.weight": torch.zeros(1)})
    stream(path, layers, floats)
    refused("exists already", path, layers, floats, overwrite=False)


def test_something_else_than_was_announced(tmp_path):
    layers, floats = made()
    other = made(8)[0]
    plans = {n: LayerPlan(w.shape, w.bits, w.symmetric, w.split) for n, w in layers.items()}
    with pytest.raises(QuantTuneError, match="came out as"):
        stream_quantized_unet(tmp_path / "a.safetensors", plans, {}, other.__getitem__,
                              floats.__getitem__, UNetMetadata("SD15"))
    assert not list(tmp_path.iterdir())
