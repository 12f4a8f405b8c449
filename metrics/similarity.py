"""How alike two pictures are: SSIM, PSNR and LPIPS, each of every pair on its own.

Pictures are float ``[n, 3, h, w]`` in 0..1 everywhere. torchmetrics computes; it is imported when
it is needed, so that ComfyUI starts without it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..quant import QuantTuneError
from ..quant.limits import is_finite
from ..quant.safe_file import read_with_strings
from ..quant.tensor_file import load_unpickled

WINDOW = 11
"""Side of SSIM's Gaussian window (standard deviation 1.5), and the smallest picture it takes."""
SUFFIXES = (".safetensors", ".pth", ".pt")
"""Files that an LPIPS backbone is read from."""


@dataclass(frozen=True)
class Backbone:
    """One of the networks that LPIPS is defined on.

    Attributes:
        name: torchmetrics' name of it.
        title: what people call it.
        key, shape: a weight of torchvision's state dict that no other backbone has in this shape.
        smallest: least side of a picture, in pixels, that comes through its poolings.
    """

    name: str
    title: str
    key: str
    shape: tuple[int, ...]
    smallest: int


BACKBONES = (
    Backbone("alex", "AlexNet", "features.0.weight", (64, 3, 11, 11), 31),
    Backbone("vgg", "VGG16", "features.28.weight", (512, 512, 3, 3), 16),
    Backbone("squeeze", "SqueezeNet 1.1", "features.12.expand3x3.weight", (256, 64, 3, 3), 17),
)


def check_pair(pictures: Tensor, reference: Tensor, smallest: int, measure: str) -> None:
    """Raise QuantTuneError unless both are ``[n, 3, h, w]`` of one shape, finite and large enough.

    smallest: least side in pixels that ``measure`` needs.
    """
    for name, batch in (("images", pictures), ("reference images", reference)):
        if batch.dim() != 4 or batch.shape[1] != 3:
            raise QuantTuneError(f"The {name} have shape {list(batch.shape)}; {measure} needs RGB "
                                 "pictures.")
        if not is_finite(batch):
            raise QuantTuneError(f"The {name} hold NaN or infinite values; check what makes them.")
    (height, width), other = pictures.shape[-2:], reference.shape[-2:]
    if pictures.shape[-2:] != other:
        raise QuantTuneError(f"The images are {width} x {height} pixels and the reference images "
                             f"{other[1]} x {other[0]}; scale one to the size of the other.")
    if len(pictures) != len(reference):
        raise QuantTuneError(f"There are {len(pictures)} images and {len(reference)} reference "
                             "images; give as many of both.")
    if min(height, width) < smallest:
        raise QuantTuneError(f"The images are {width} x {height} pixels; {measure} needs at least "
                             f"{smallest} x {smallest}.")


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each pair: ``[n]`` float32 on the CPU, 1 when
    identical.

    The paper's Gaussian window of 11 x 11, K = (0.01, 0.03) and data range 1, averaged over the
    channels and over the places where the whole window lies inside the picture. torchmetrics'
    releases differ in whether they count the border, whose windows are half padding; the paper's
    own program and scikit-image do not.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as measure

    check_pair(pictures, reference, WINDOW, "SSIM")
    edge = WINDOW // 2
    values = []
    # A pair at a time: ten maps of a picture's size are in memory at once. In float64, on a device
    # that has it: of a nearly flat picture the variance is a difference of nearly equal numbers.
    for first, second in zip(pictures.cpu(), reference.cpu()):
        _, places = measure(first[None].double(), second[None].double(), data_range=1.0, sigma=1.5,
                            return_full_image=True)
        values.append(places[..., edge:-edge, edge:-edge].mean().float())
    return torch.stack(values)


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair: ``[n]`` float32 in dB for a data range of 1.

    ``-10 log10(mean squared error)``; infinite for identical pictures.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio as measure

    check_pair(pictures, reference, 1, "PSNR")
    return measure(pictures.float(), reference.float(), data_range=1.0, reduction="none",
                   dim=(1, 2, 3))


class PerceptualNetwork:
    """LPIPS (Zhang et al. 2018) on a backbone whose weights are here: smaller is more alike.

    Attributes:
        backbone: which one.
        module: torchmetrics' network, always in evaluation mode.
    """

    def __init__(self, backbone: Backbone, module: nn.Module):
        self.backbone, self.module = backbone, module

    def to(self, device) -> PerceptualNetwork:
        """Move the weights to a device."""
        self.module.to(device)
        return self

    @torch.no_grad()
    def __call__(self, pictures: Tensor, reference: Tensor) -> Tensor:
        """Distance of each pair: ``[n]`` float32. Raises QuantTuneError as `check_pair` does."""
        check_pair(pictures, reference, self.backbone.smallest,
                   f"LPIPS with {self.backbone.title}")
        pairs = zip(pictures.float().clamp(0, 1), reference.float().clamp(0, 1))
        return torch.stack([self.module(a[None], b[None], normalize=True).flatten()[0]
                            for a, b in pairs])


def load_perceptual_network(path: str | Path) -> PerceptualNetwork:
    """LPIPS with torchmetrics' linear heads and a backbone from a file; nothing is downloaded.

    path: torchvision's ImageNet weights of AlexNet, VGG16 or SqueezeNet 1.1 (``.pth`` as published,
    or the same names in ``.safetensors``); which of them it is, the weights tell.

    Raises QuantTuneError for a file that cannot be read or holds another network.
    """
    from torchmetrics.functional.image import lpips

    file = os.path.basename(path)
    state = _read_state(path)
    backbone = next((b for b in BACKBONES if b.key in state
                     and tuple(state[b.key].shape) == b.shape), None)
    if backbone is None:
        raise QuantTuneError(f"The file '{file}' is no backbone of LPIPS; use torchvision's "
                             "weights of AlexNet, VGG16 or SqueezeNet 1.1.")
    # Without storage: torchvision would fill VGG16's unused classifier with 124 M random numbers.
    with torch.device("meta"):
        module = lpips._NoTrainLpips(pretrained=False, net=backbone.name, pnet_rand=True)
    module.scaling_layer = lpips.ScalingLayer()
    heads = Path(lpips.__file__).parent / "lpips_models" / f"{backbone.name}.pth"
    wanted = torch.load(heads, map_location="cpu", weights_only=True)
    for name, blank in module.net.state_dict().items():
        key = "features." + name.split(".", 2 if backbone.name == "squeeze" else 1)[-1]
        weight = state.get(key)
        if weight is None or weight.shape != blank.shape or not is_finite(weight):
            what = ("has no" if weight is None else "has the wrong shape of"
                    if weight.shape != blank.shape else "has NaN or infinite values in")
            raise QuantTuneError(f"The {backbone.title} file '{file}' {what} '{key}'; use "
                                 "torchvision's weights as published.")
        wanted[f"net.{name}"] = weight.float()
    # Not strict: torchmetrics lists every head under a second name as well.
    module.load_state_dict(wanted, strict=False, assign=True)
    return PerceptualNetwork(backbone, module.requires_grad_(False))


def _read_state(path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file."""
    file = os.path.basename(path)
    try:
        if str(path).endswith(".safetensors"):
            state = read_with_strings(path)[1]
        else:
            state = load_unpickled(path)
    except QuantTuneError as error:
        raise QuantTuneError(f"The file '{file}' is missing, damaged or holds more than plain "
                             "tensors; download torchvision's weights again.") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        state = {}
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.is_floating_point()}
