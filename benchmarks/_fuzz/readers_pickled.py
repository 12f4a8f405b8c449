"""The readers of PyTorch files: of any tensors, of Q-Diffusion and of TuneQDM's authors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quanttune.quant import unpack
from quanttune.quant.qdiffusion import load_qdiffusion
from quanttune.quant.tensor_file import open_tensors
from quanttune.quant.tuneqdm_state import read_state

from .archives import saved
from .decode import Unreadable, pickled
from .readers_quant import random
from .run import Files, Reader


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
        Reader("PyTorch .pt", lambda: pickled_seeds("a.pt"), read_pickled, check_pickled, share=3),
        Reader(
            "PyTorch .bin", lambda: pickled_seeds("a.bin"), read_pickled, check_pickled, share=1.5
        ),
        Reader("Q-Diffusion .pth", qdiffusion_seeds, read_qdiffusion, check_qdiffusion, share=1.5),
        Reader(
            "TuneQDM state", tuneqdm_seeds, lambda f, t: read_state(f / t), check_tuneqdm, share=4
        ),
    ]
