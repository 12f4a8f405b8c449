"""The readers of `quant/`, `training/` and `metrics/`: weights, scales, states, measurements."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quanttune.quant import (
    QuantizedWeight,
    QuantSpec,
    ScaleSet,
    UNetMetadata,
    load_quantized_unet,
    load_scale_set,
    save_quantized_unet,
    save_scale_set,
    unpack,
)
from quanttune.quant.int8.ranges import ActivationRanges
from quanttune.quant.qdiffusion import load_qdiffusion
from quanttune.quant.safe_file import METADATA_KEY, read_header, read_with_strings
from quanttune.quant.tensor_file import open_tensors
from quanttune.quant.tuneqdm_state import read_state

from .archives import saved
from .decode import Stored, Unreadable, pickled, safetensors
from .run import Files, Reader
from .scratch import written

UNET, SCALES = "model.safetensors", "scales.safetensors"


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet_seeds() -> list[Files]:
    """Quantized UNets of a few layers: every width, a split, ranges, floats of each kind."""
    seeds = []
    for bits, ranges in ((4, False), (3, True), (8, False), (2, True)):
        layers = {
            "a.b": QuantizedWeight.quantize(random(6, 8), QuantSpec(bits)),
            "c": QuantizedWeight.quantize(random(4, 6, 3, 3, seed=1), QuantSpec(bits), 4),
        }
        floats = {
            "a.b.bias": random(6),
            "norm": random(5).half(),
            "wide": random(2, 3).bfloat16(),
            "narrow": random(4).to(torch.float8_e5m2),
        }
        found = ActivationRanges({"a.b": torch.tensor([[[-1.0, 2.0]], [[-0.5, 1.0]]])})
        metadata = UNetMetadata(
            "SD15",
            {"model_channels": 32, "channel_mult": [1, 2]},
            "EPS",
            calibration={"steps": 4} if ranges else {},
        )
        seeds.append(
            {
                UNET: written(
                    UNET,
                    lambda path, args=(layers, floats, metadata, found if ranges else None): (
                        save_quantized_unet(path, *args[:3], ranges=args[3])
                    ),
                )
            }
        )
    return seeds


def differing(tensors: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> str | None:
    """A name under which two readers found something else, or None."""
    if tensors.keys() != stored.keys():
        return f"other tensors: {sorted(tensors.keys() ^ stored.keys())[:3]}"
    return next(
        (f"{n} is not what the file holds" for n, t in tensors.items() if not stored[n].same(t)),
        None,
    )


def told(data: bytes) -> tuple[dict[str, str], dict[str, Stored]] | str:
    """What an independent reader finds, or a sentence that the file breaks the format's rules."""
    try:
        return safetensors(data)
    except Unreadable as error:
        return f"a file that is none was accepted: {error}"


def finite(stored: Mapping[str, Stored]) -> str | None:
    """A float tensor that holds NaN or an infinity, or None."""
    for name, tensor in stored.items():
        if (
            tensor.dtype.startswith(("F", "B"))
            and tensor.dtype != "BOOL"
            and not bool(np.isfinite(tensor.floats()).all())
        ):
            return f"{name} is not finite"
    return None


def check_unet(files: Files, found: Any) -> str | None:
    """Codes, scales and floats are those of the file, and all of them are sound."""
    decoded = told(files[UNET])
    if isinstance(decoded, str):
        return decoded
    strings, stored = decoded
    tensors = dict(found.floats)
    for name, layer in found.layers.items():
        tensors |= {
            f"{name}.weight": layer.packed,
            f"{name}.weight_scale": layer.scale,
            f"{name}.weight_zero_point": layer.zero_point,
        }
        facts = json.loads(strings[METADATA_KEY])["layers"][name]
        if [facts["bits"], facts["shape"]] != [layer.bits, list(layer.shape)]:
            return f"{name} has another shape than its description"
        codes = unpack(layer.packed, layer.bits, layer.shape[0], math.prod(layer.shape[1:]))
        if not (0 <= int(codes.min()) and int(codes.max()) < 2**layer.bits):
            return f"{name} has integers out of range"
        if not bool((layer.scale > 0).all()):
            return f"{name} has a scale that is not above 0"
    if found.ranges is not None:
        tensors |= {f"{n}.input_range": r for n, r in found.ranges.layers.items()}
    json.dumps(found.metadata.unet_config, allow_nan=False)
    return differing(tensors, stored) or finite(stored)


def scale_seeds() -> list[Files]:
    """Scale sets with and without input scales."""
    shapes = {"a.b": (6, 8), "c": (4, 6)}
    seeds = []
    for experts, with_s_in in ((1, True), (3, True), (2, False)):
        found = ScaleSet.identity(shapes, experts, with_s_in=with_s_in)
        seeds.append({SCALES: written(SCALES, lambda path, s=found: save_scale_set(path, s))})
    return seeds


def check_scales(files: Files, found: ScaleSet) -> str | None:
    """Scales are the file's numbers in float32."""
    decoded = told(files[SCALES])
    if isinstance(decoded, str):
        return decoded
    tensors = {
        f"{n}.{k}": t
        for n, s in found.layers.items()
        for k, t in (("r_out", s.r_out), ("s_in", s.s_in))
        if t is not None
    }
    if tensors.keys() != decoded[1].keys():
        return "other tensors than the file's"
    for name, tensor in tensors.items():
        wanted = decoded[1][name].floats().reshape(decoded[1][name].shape)
        if tensor.shape != wanted.shape or not np.array_equal(tensor.numpy(), wanted):
            return f"{name} is not what the file holds"
    said = json.loads(decoded[0][METADATA_KEY])
    if found.num_experts != said["num_experts"] or found.num_timesteps != said["num_timesteps"]:
        return "another number of experts or timesteps"
    return finite(decoded[1])


def plain_seeds() -> list[Files]:
    """Safetensors files of other programs, every type."""
    from safetensors.torch import save

    tensors = {
        str(dtype).removeprefix("torch."): random(3, 4).to(dtype)
        for dtype in (
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
            torch.int64,
            torch.int8,
            torch.uint8,
            torch.bool,
        )
    }
    tensors |= {"empty": torch.zeros(0, 3), "number": torch.tensor(2.5)}
    return [
        {"a.safetensors": save(tensors, {"format": "pt", "note": '{"a": [1, 2]}'})},
        {"a.safetensors": save({"one": random(7)})},
    ]


def read_plain(folder: Path, target: str) -> Any:
    """The same file by both readers, and its header alone."""
    path = folder / target
    try:
        strings, tensors = read_with_strings(path)
    except Exception:
        # Whatever the one refuses the other has to refuse, or to read rightly.
        file = open_tensors(path)
        return {}, None, {n: file.read(n) for n in file.shapes}, {}, {}
    file = open_tensors(path)
    read = {n: file.read(n) for n in file.shapes}
    return strings, tensors, read, {n: file.view(n) for n in file.shapes}, read_header(path)[1]


def check_plain(files: Files, found: Any) -> str | None:
    """Both readers give what the file holds."""
    decoded = told(files["a.safetensors"])
    if isinstance(decoded, str):
        return decoded
    strings, tensors, read, view, shapes = found
    if tensors is None:  # such as for half a character in what no reader looks at
        return differing(read, decoded[1])
    if strings != decoded[0] or shapes != {n: s.shape for n, s in decoded[1].items()}:
        return "other metadata or shapes"
    return next((wrong for t in (tensors, read, view) if (wrong := differing(t, decoded[1]))), None)


def pickled_seeds(name: str) -> list[Files]:
    """Files as torch writes them: of today and before 1.6, plain and nested."""
    state = {
        "a.weight": random(3, 4),
        "a.bias": random(3).half(),
        "n": torch.tensor(4),
        "turned": random(4, 3).t(),
        "part": random(9)[2:5],
        "ids": torch.arange(5),
    }
    return [
        {name: saved(state)},
        {name: saved({"state_dict": state, "epoch": 3})},
        {name: saved(state, legacy=True)},
        {name: saved({"state_dict": state, "epoch": 3}, legacy=True)},
    ]


def read_pickled(folder: Path, target: str) -> dict[str, Tensor]:
    """Every tensor twice: read, and as a view."""
    file = open_tensors(folder / target)
    found = {n: file.read(n) for n in file.shapes}
    for name, value in found.items():
        if not same(value, file.view(name)) or tuple(value.shape) != file.shapes[name]:
            raise AssertionError(f"{name} differs when it is read again")
    return found


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are the same, NaN counted as itself."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if first.is_floating_point() or first.is_complex():
        return torch.equal(
            first.contiguous().view(-1).view(torch.uint8) if first.numel() else first,
            second.contiguous().view(-1).view(torch.uint8) if second.numel() else second,
        )
    return torch.equal(first, second)


def torchs(data: bytes) -> Any:
    """What torch finds in a file, or a sentence that it does not read it."""
    try:
        return pickled(data)
    except Unreadable as error:
        return f"torch does not read it: {error}"


def check_pickled(files: Files, found: dict[str, Tensor]) -> str | None:
    """The tensors that torch reads, too."""
    wanted = torchs(next(iter(files.values())))
    if isinstance(wanted, str):
        return wanted
    if isinstance(wanted.get("state_dict"), dict):
        wanted = wanted["state_dict"]
    wanted = {k: v for k, v in wanted.items() if isinstance(v, Tensor)}
    if wanted.keys() != found.keys():
        return "other tensors"
    return next((f"{n} differs" for n in found if not same(found[n], wanted[n])), None)


def qdiffusion_seeds() -> list[Files]:
    """Checkpoints of Q-Diffusion: with AdaRound's choices, plain, and a split shortcut."""
    seeds = []
    for bits in (8, 4):
        state = {"out.0.bias": random(3)}
        for name, shape, split in (
            ("a", (4, 6), None),
            ("b", (3, 4, 3, 3), None),
            ("skip", (4, 6, 1, 1), 2),
        ):
            weight = random(*shape, seed=len(state))
            state |= {f"{name}.weight": weight, f"{name}.bias": random(shape[0])}
            columns = (
                {"": slice(None)}
                if split is None
                else {"": slice(0, split), "_0": slice(split, None)}
            )
            for suffix, part in columns.items():
                own = weight[:, part]
                low, high = torch.aminmax(own.flatten(1), dim=1)
                ones = (-1, *[1] * (len(shape) - 1))
                key = f"{name}.weight_quantizer{suffix}"
                delta = ((high - low) / (2**bits - 1)).view(ones)
                state[f"{key}.delta"] = delta
                state[f"{key}.zero_point"] = (-low.view(ones) / delta).round()
                if bits == 4 or split is not None:
                    state[f"{key}.alpha"] = random(*own.shape, seed=7)
        seeds.append({"q.pth": saved(state)})
    return [*seeds, {"q.pth": saved({"state_dict": pickled(seeds[0]["q.pth"])})}]


def read_qdiffusion(folder: Path, target: str) -> Any:
    """Every layer's integers and every float."""
    found = load_qdiffusion(folder / target)
    return found, {n: layer.weight() for n, layer in found.layers.items()}


def check_qdiffusion(files: Files, found: Any) -> str | None:
    """The integers follow from the numbers that torch reads, by the authors' formula."""
    state = torchs(files["q.pth"])
    if isinstance(state, str):
        return state
    state = state["state_dict"] if isinstance(state.get("state_dict"), dict) else state
    checkpoint, weights = found
    state = {k: v.float() for k, v in state.items() if isinstance(v, Tensor)}
    for name, weight in weights.items():
        values, parts = state[f"{name}.weight"], []
        first = state.get(f"{name}.weight_quantizer.alpha", values).shape[1]
        for key, own in (
            ("weight_quantizer", values[:, :first]),
            ("weight_quantizer_0", values[:, first:]),
        ):
            if not own.shape[1]:
                continue
            delta, zero, alpha = (
                state.get(f"{name}.{key}.{k}") for k in ("delta", "zero_point", "alpha")
            )
            steps = own / delta
            steps = steps.round() if alpha is None else steps.floor() + (alpha >= 0)
            parts.append((steps + zero).clamp(0, 2**weight.bits - 1))
        wanted = torch.cat(parts, 1).flatten(1)
        codes = unpack(weight.packed, weight.bits, *wanted.shape)
        if not torch.equal(codes.float(), wanted):
            return f"{name} has other integers"
        if not bool((weight.scale > 0).all() & weight.scale.isfinite().all()):
            return f"{name} has a scale that is not above 0"
    for name, value in checkpoint.floats.items():
        if name not in state or not bool(value.isfinite().all()):
            return f"{name} is not finite or not there"
        if not torch.equal(value, state[name]):
            return f"{name} differs"
    return None


def tuneqdm_seeds() -> list[Files]:
    """States as TuneQDM's authors save them: with experts, without, scales alone, older ones."""
    state = {}
    for name, shape in (("a.to_q", (4, 6)), ("conv", (3, 4, 3, 3))):
        ones = [1] * (len(shape) - 2)
        state |= {
            f"{name}.weight_int": torch.randint(-8, 8, shape, dtype=torch.int8),
            f"{name}.zero_point": torch.randint(-8, 8, (shape[0], 1, *ones)).float(),
            f"{name}.delta_out_experts": random(2, shape[0], 1, *ones).abs() + 0.1,
            f"{name}.delta_in_experts": random(2, 1, shape[1], *ones).abs() + 0.1,
            f"{name}.bias": random(shape[0]),
        }
    config = {"n_bits": 4, "symmetric": False, "num_experts": 2, "total_denoising_steps": 1000}
    scales = {k: v for k, v in state.items() if "delta" in k}
    return [
        {"s.pt": saved({"delta_state": state, "config": config})},
        {"s.pt": saved(state)},
        {"s.pt": saved({"delta_state": scales, "config": config})},
        {"s.pt": saved({"delta_state": state, "config": config}, legacy=True)},
    ]


def check_tuneqdm(files: Files, found: Any) -> str | None:
    """Integers and scales are those of the file, finite and in their range."""
    state = torchs(files["s.pt"])
    if isinstance(state, str):
        return state
    state = state.get("delta_state", state)
    state = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    for name, layer in found.layers.items():
        for tensor in (layer.s_out, layer.s_in, layer.zero_point):
            if tensor is not None and not bool(tensor.isfinite().all()):
                return f"{name} is not finite"
        key = next(
            (
                k
                for k in state
                if k.endswith(f"{name}.delta_out_experts") or k.endswith(f"{name}.delta_out")
            ),
            None,
        )
        if key is None or not torch.equal(state[key].float().flatten(), layer.s_out.flatten()):
            return f"{name} has other scales"
        if layer.integers is not None:
            top = 2 ** (layer.bits - 1)
            if int(layer.integers.max()) >= top or int(layer.integers.min()) < -top:
                return f"{name} has integers out of {layer.bits} bits"
            wanted = state[key.rpartition(".")[0] + ".weight_int"]
            if not torch.equal(wanted.to(torch.int8), layer.integers) or not torch.equal(
                wanted.long(), layer.integers.long()
            ):
                return f"{name} has other integers"
    for name, value in found.floats.items():
        if not bool(value.isfinite().all()):
            return f"{name} is not finite"
    return None


def readers() -> list[Reader]:
    """All of this file."""
    return [
        Reader(
            "quantized UNet",
            unet_seeds,
            lambda f, t: load_quantized_unet(f / t),
            check_unet,
            share=22,
        ),
        Reader(
            "scale set", scale_seeds, lambda f, t: load_scale_set(f / t), check_scales, share=24
        ),
        Reader("safetensors", plain_seeds, read_plain, check_plain, share=20),
        Reader("PyTorch .pt", lambda: pickled_seeds("a.pt"), read_pickled, check_pickled, share=3),
        Reader(
            "PyTorch .bin", lambda: pickled_seeds("a.bin"), read_pickled, check_pickled, share=1.5
        ),
        Reader("Q-Diffusion .pth", qdiffusion_seeds, read_qdiffusion, check_qdiffusion, share=1.5),
        Reader(
            "TuneQDM state", tuneqdm_seeds, lambda f, t: read_state(f / t), check_tuneqdm, share=4
        ),
    ]
