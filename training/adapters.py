"""peft's LoRA adapters on the layers of a frozen model, for the time of a training."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quant import QuantTuneError
from .lora_config import LoraTraining
from .lora_layer import LoraLayer, largest_rank, peft_magnitude, stock_magnitude
from .sampling import generator_of

NAME = "quanttune"
"""Of the adapter inside peft's layers."""


class _Linear(nn.Linear):
    """A matrix of an adapter: float32, cast to its input's dtype where it is used."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class _Conv2d(nn.Conv2d):
    """A kernel of an adapter; see `_Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype), None)


class Adapters:
    """The adapters on some layers of a module. Made by `adapters`.

    Attributes:
        layers: layer name to peft's layer.
        smaller: names of layers that have fewer channels than the rank, and take that many.
    """

    def __init__(self, layers: Mapping[str, nn.Module], config: LoraTraining,
                 smaller: Sequence[str] = ()):
        self.layers, self.config, self.smaller = dict(layers), config, list(smaller)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that learns, float32: of each layer, down, up and DoRA's magnitude."""
        found = []
        for layer in self.layers.values():
            found += [layer.lora_A[NAME].weight, layer.lora_B[NAME].weight]
            if NAME in layer.lora_magnitude_vector:
                found.append(layer.lora_magnitude_vector[NAME].weight)
        return found

    def train(self, mode: bool) -> None:
        """Switch dropout on or off, and nothing else: NF4 layers repack for good in eval mode."""
        for layer in self.layers.values():
            layer.lora_dropout.train(mode)

    def export(self) -> dict[str, LoraLayer]:
        """The present adapters by layer name, on the CPU."""
        found = {}
        for name, layer in self.layers.items():
            down, up = (m[NAME].weight.detach() for m in (layer.lora_A, layer.lora_B))
            # Files know one kind of scaling: alpha / rank.
            plain = LoraLayer(down, up, layer.scaling[NAME] * len(down))
            if NAME in layer.lora_magnitude_vector:
                delta, magnitude = plain.delta(), layer.lora_magnitude_vector[NAME].weight
                plain = replace(plain, dora_scale=stock_magnitude(
                    magnitude, _base_weight(layer, delta), delta))
            found[name] = replace(plain, down=plain.down.clone(), up=plain.up.clone())
        return found

    def load(self, start: Mapping[str, LoraLayer], name: str = "the LoRA") -> None:
        """Begin from adapters that were trained before; their alpha is brought to the present one.

        Raises QuantTuneError when they are on other layers, or of another rank or kind.
        """
        if odd := sorted(start.keys() ^ self.layers.keys()):
            where = "also" if odd[0] in start else "not"
            raise QuantTuneError(f"'{name}' cannot be trained on: it is {where} on the layer "
                                 f"'{odd[0]}' ({len(odd)} such differences); choose the targets it "
                                 "was trained with.")
        with torch.no_grad():
            for layer_name, given in start.items():
                layer = self.layers[layer_name]
                own = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
                if given.rank != len(own[0]):
                    raise QuantTuneError(f"'{name}' has rank {given.rank}, but {len(own[0])} is "
                                         "set; choose its rank to train on.")
                vector = layer.lora_magnitude_vector
                if (given.dora_scale is not None) != (NAME in vector):
                    has = "has" if given.dora_scale is not None else "lacks"
                    raise QuantTuneError(f"'{name}' {has} DoRA's magnitudes; set dora accordingly.")
                own[0].copy_(given.down)
                own[1].copy_(given.up * (given.alpha / given.rank / layer.scaling[NAME]))
                if given.dora_scale is None:
                    continue
                if given.dora_scale.shape[0] != len(own[1]):
                    raise QuantTuneError(f"'{name}' has DoRA's magnitudes by input, which cannot "
                                         "be trained on; start without it.")
                delta, magnitude = given.delta(), vector[NAME].weight
                magnitude.copy_(peft_magnitude(given.dora_scale, _base_weight(layer, delta),
                                               delta).reshape(magnitude.shape))


def _base_weight(layer: nn.Module, delta: Tensor) -> Tensor:
    """The frozen weight, packed or not, as floats of the shape of ``delta``."""
    from peft.utils.integrations import dequantize_module_weight

    from .dora import added_to

    weight = added_to(dequantize_module_weight(layer.get_base_layer())).detach().cpu()
    return torch.zeros_like(delta) + weight.view(delta.shape)


@contextmanager
def adapters(module: nn.Module, names: Sequence[str], config: LoraTraining,
             device: torch.device, ranks: Mapping[str, int] | None = None
             ) -> Iterator[Adapters]:
    """Put adapters on the layers ``names`` of a frozen ``module``, and take them off in the end.

    Every ``up`` begins at 0, so that the model is what it was; every ``down`` is drawn from the
    seed and the layer's name alone.

    Args:
        module: its Linear and Conv2d layers may be of any subclass, packed ones included.
        names: of layers, as in ``module.named_modules()``.
        config: rank, alpha, dropout and kind.
        device: of the adapters.
        ranks: of layers that take another rank than the configuration's, at the same scaling.

    Raises:
        QuantTuneError: a rank larger than every layer, or a kind that peft lacks for a layer.
    """
    from peft import LoraConfig

    modules = dict(module.named_modules())
    originals = {name: modules[name] for name in names}
    most = {name: largest_rank(_shape(m)) for name, m in originals.items()}
    if max(most.values()) < config.rank:
        raise QuantTuneError(f"The rank {config.rank} is larger than every layer that would be "
                             f"trained (at most {max(most.values())}); choose a smaller rank.")
    wanted = {name: min((ranks or {}).get(name, config.rank), most[name]) for name in names}
    others = {name: r for name, r in wanted.items() if r != config.rank}
    smaller = [name for name, r in others.items() if r == most[name] < config.rank]
    how = LoraConfig(
        r=config.rank, lora_alpha=config.alpha or config.rank, lora_dropout=config.dropout,
        use_rslora=config.rslora, target_modules=_exactly(names),
        rank_pattern={_exactly([n]): r for n, r in others.items()},
        alpha_pattern={_exactly([n]): config.scaling * (r**0.5 if config.rslora else r)
                       for n, r in others.items()})
    try:
        result = Adapters(_injected(module, originals, how, config, device), config, smaller)
        for parameter in result.parameters:
            parameter.requires_grad_(True)
        result.train(True)
        yield result
    finally:
        for name, original in originals.items():
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, original)
        module.__dict__.pop("peft_config", None)


def _injected(module, names, how, config: LoraTraining, device) -> dict[str, nn.Module]:
    """peft's layers in place, by the names of those they are around."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer as PeftLayer

    found = {}
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn in there is drawn again below
            inject_adapter_in_model(how, module, adapter_name=NAME)
        for name, layer in module.named_modules():
            if isinstance(layer, PeftLayer) and name in names:
                _own_matrices(layer, name, config.seed, device)
                if config.dora:
                    _with_magnitude(layer, how, device)
                found[name] = layer
    except (NotImplementedError, TypeError, ValueError) as error:
        raise QuantTuneError(f"peft cannot put {config.mode} on this model "
                             f"({str(error).splitlines()[0]}); choose other targets, or plain "
                             "LoRA.") from error
    return found


def _exactly(names: Sequence[str]) -> str:
    return "|".join(re.escape(name) for name in names)


def _shape(layer: nn.Module) -> tuple[int, ...]:
    """Of a weight; that of NF4 layers is packed."""
    if isinstance(layer, nn.Conv2d):
        return tuple(layer.weight.shape)
    return layer.out_features, layer.in_features


def _own_matrices(layer: nn.Module, name: str, seed: int, device: torch.device) -> None:
    """Put float32 matrices of our own in place of peft's.

    peft makes them in the class and the dtype of the layer, which here may be one that waits for a
    file, or half precision.
    """
    base, rank, generator = layer.get_base_layer(), layer.r[NAME], generator_of(seed, "lora", name)
    if isinstance(base, nn.Conv2d):
        down = _Conv2d(base.in_channels, rank, base.kernel_size, base.stride, base.padding,
                       base.dilation, bias=False)
        up = _Conv2d(rank, base.out_channels, 1, bias=False)
    else:
        down = _Linear(base.in_features, rank, bias=False)
        up = _Linear(rank, base.out_features, bias=False)
    nn.init.kaiming_uniform_(down.weight, a=5**0.5, generator=generator)
    nn.init.zeros_(up.weight)
    layer.lora_A[NAME], layer.lora_B[NAME] = down.to(device), up.to(device)
    layer.cast_input_dtype_enabled = False


def _with_magnitude(layer: nn.Module, how, device: torch.device) -> None:
    """Make a DoRA layer of a LoRA layer whose matrices are its own by now."""
    from .dora import magnitude_of

    variant = layer.resolve_lora_variant(config=replace(how, use_dora=True))
    layer.lora_variant[NAME], layer.use_dora[NAME] = variant, True
    magnitude = magnitude_of(layer.get_base_layer(), layer.lora_A[NAME].weight,
                             layer.lora_B[NAME].weight, layer.scaling[NAME])
    magnitude.weight = nn.Parameter(magnitude.weight.detach().float().to(device))
    layer.lora_magnitude_vector[NAME] = magnitude
