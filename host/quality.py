"""What 'Compare Images' and 'Image Set Quality' do."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..metrics.charts import picture_grid
from ..metrics.features import FeatureNetwork, collect_features
from ..metrics.sets import SetQuality, clip_score, measure_set
from ..metrics.similarity import (
    WINDOW,
    PerceptualNetwork,
    check_pair,
    load_perceptual_network,
    psnr,
    ssim,
)
from ..quant import QuantTuneError
from .feature_networks import ClipVisionNetwork, StarterNetwork, text_embeddings
from .folders import metric_path
from .picture_stream import PictureStream, pictures_of

NONE = "none"
STARTER, CLIP_VISION = NETWORKS = ("starter classifier", "CLIP vision input")
NOT_MEASURED = -1.0
"""What an output carries when its measure was not taken; the report says so."""
IDENTICAL = 100.0
"""PSNR in dB that counts as no difference: that of identical pictures would be infinite."""
UNRELATED = 0.05
"""Cosine of picture and text below which no trained pair of towers stays, whatever they are of."""
ROWS = 16
"""Pictures that are shown."""


@dataclass(frozen=True)
class Comparison:
    """How alike pictures and references are.

    Attributes:
        picture: rows of reference, image and amplified difference.
        ssim, psnr, lpips: means over the pairs; lpips is `NOT_MEASURED` without a network.
        report: a table with a line for each pair.
    """

    picture: Image.Image
    ssim: float
    psnr: float
    lpips: float
    report: str


def compare_images(images: Tensor, reference: Tensor, lpips_network: str = NONE,
                   amplify: float = 4.0) -> Comparison:
    """Compare IMAGE batches pair by pair, or every image with one reference.

    Args:
        images, reference: the host's IMAGE ``[n, h, w, 3]`` and ``[n or 1, h, w, 3]``.
        lpips_network: listed name of a backbone's weights, or `NONE`.
        amplify: what differences are multiplied by in the picture.

    Raises:
        QuantTuneError: batches that do not go together, or no such network. The host's interrupt
            comes through as its own exception.
    """
    images, reference = pictures_of(images, "images"), pictures_of(reference, "reference")
    if len(reference) == 1:
        reference = reference.expand(len(images), -1, -1, -1)
    check_pair(images, reference, WINDOW, "SSIM")
    network, device = None, comfy.model_management.get_torch_device()
    if lpips_network != NONE:
        network = load_perceptual_network(metric_path(lpips_network)).to(device)
        check_pair(images, reference, network.backbone.smallest,
                   f"LPIPS with {network.backbone.title}")
    bar, values = comfy.utils.ProgressBar(len(images)), []
    for index in range(len(images)):
        comfy.model_management.throw_exception_if_processing_interrupted()
        pair = [p[index:index + 1].float().clamp(0, 1) for p in (images, reference)]
        values.append((float(ssim(*pair)), min(IDENTICAL, float(psnr(*pair))),
                       float(network(*(p.to(device) for p in pair))) if network
                       else NOT_MEASURED))
        bar.update_absolute(index + 1)
    means = [float(np.mean(column)) for column in zip(*values)]
    return Comparison(_difference_sheet(images, reference, values, amplify), *means,
                      _comparison_report(values, means, network))


def _line(label: str, values, measured: bool) -> str:
    lpips = f"{values[2]:9.4f}" if measured else "        -"
    return f"{label:<8}{values[0]:8.4f}{values[1]:11.2f}{lpips}"


def _comparison_report(values, means, network: PerceptualNetwork | None) -> str:
    lines = ["image       SSIM   PSNR, dB    LPIPS", _line("mean", means, network is not None)]
    if len(values) > 1:
        lines += [_line(str(i), row, network is not None) for i, row in enumerate(values, 1)]
    lines.append(f"LPIPS: {network.backbone.title}." if network else
                 "LPIPS was not measured (its output is -1): put AlexNet, VGG16 or SqueezeNet "
                 "weights into models/quanttune_metrics and choose them as lpips_network.")
    same = sum(row[1] >= IDENTICAL for row in values)
    if same:
        lines.append(f"{same} of {len(values)} identical; their PSNR counts as {IDENTICAL:g} dB.")
    return "\n".join(lines)


def _difference_sheet(images: Tensor, reference: Tensor, values, amplify: float) -> Image.Image:
    rows, labels = [], []
    for index, row in enumerate(values[:ROWS]):
        first, second = (p[index].float().clamp(0, 1) for p in (reference, images))
        rows.append([_bytes(p) for p in (first, second, (second - first).abs() * amplify)])
        lpips = f", LPIPS {row[2]:.4f}" if row[2] != NOT_MEASURED else ""
        labels.append(f"{index + 1}: SSIM {row[0]:.4f}, PSNR {row[1]:.2f} dB{lpips}")
    return picture_grid(rows, labels, ("reference", "image", f"difference x {amplify:g}"))


def _bytes(picture: Tensor) -> np.ndarray:
    return (picture.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy()


def image_set_quality(images: Tensor | None, folder: str, reference: Tensor | None,
                      reference_folder: str, network: str = STARTER, clip_vision=None, clip=None,
                      captions: str = "") -> tuple[SetQuality, str]:
    """What can be measured of a set of pictures with what is given, and the report of it.

    Args:
        images, folder: the set, an IMAGE, a folder, or both; at least two pictures.
        reference, reference_folder: the set to compare with, or None and "".
        network: of `NETWORKS`.
        clip_vision: the host's CLIP_VISION for `CLIP_VISION`.
        clip, captions: the host's CLIP and texts, one a line, used in turn, for text similarity.

    Raises:
        QuantTuneError: too few pictures, or inputs that do not go together. The host's interrupt
            comes through as its own exception.
    """
    if images is None and not folder.strip():
        raise QuantTuneError("There are no images to measure; connect 'images' or name a "
                             "'folder'.")
    lines = [line.strip() for line in captions.splitlines() if line.strip()]
    _check_inputs(network, clip_vision, clip, lines)
    sets = [PictureStream("images", images, folder)]
    if reference is not None or reference_folder.strip():
        sets.append(PictureStream("reference", reference, reference_folder))
    elif network == CLIP_VISION and not lines:
        raise QuantTuneError("There is nothing to compare the images with; connect 'reference', "
                             "name a 'reference_folder', or give clip and captions.")
    looking = StarterNetwork() if network == STARTER else ClipVisionNetwork(clip_vision)
    texts = None
    if lines:  # before the pictures, which may take long
        if not looking.matches_text:
            raise QuantTuneError(f"The {looking.name} has no text to compare with; connect a CLIP "
                                 "as 'clip_vision', or empty the captions.")
        width = looking.features(torch.zeros(1, 3, 64, 64)).shape[1]
        texts = text_embeddings(clip, lines, width)
    features, *others = _collected(looking, sets)
    if texts is not None:
        texts = texts[[place % len(lines) for place in sets[0].places]]
    quality = measure_set(looking, features, others[0] if others else None, texts)
    unused = network == STARTER and clip_vision is not None
    return quality, _set_report(quality, looking, features.shape[1], sets, unused)


def _check_inputs(network: str, clip_vision, clip, lines: list[str]) -> None:
    if network not in NETWORKS:
        raise QuantTuneError(f"There is no network '{network}'; choose one of "
                             f"{', '.join(NETWORKS)}.")
    if network == CLIP_VISION and clip_vision is None:
        raise QuantTuneError(f"The network is '{CLIP_VISION}' and 'clip_vision' is not connected; "
                             f"connect 'Load CLIP Vision' or choose '{STARTER}'.")
    if lines and clip is None:
        raise QuantTuneError("There are captions and no 'clip' to read them; connect a CLIP text "
                             "encoder or empty the captions.")
    if clip is not None and not lines:
        raise QuantTuneError("There is a clip and no captions; write what the images should show, "
                             "one text a line, or disconnect 'clip'.")
    if lines and network == STARTER:
        raise QuantTuneError(f"The '{STARTER}' cannot compare pictures with captions; choose "
                             f"'{CLIP_VISION}' with the vision half of the connected clip.")


def _collected(network: FeatureNetwork, sets: list[PictureStream]) -> list[Tensor]:
    """Features of each set, with progress and the host's interrupt."""
    bar = comfy.utils.ProgressBar(sum(s.count for s in sets))
    features, before = [], 0
    for pictures in sets:
        def each(done, before=before):
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(before + done)

        comfy.model_management.throw_exception_if_processing_interrupted()
        found = collect_features(network, pictures, each)
        pictures.require(len(found))
        features.append(found)
        before += pictures.count
    return features


def _set_report(quality: SetQuality, network: FeatureNetwork, width: int,
                sets: list[PictureStream], unused: bool) -> str:
    against = f", {quality.references} reference images" if quality.references else ""
    lines = [f"{quality.pictures} images{against}", f"network: {network.name}, {width} features"]
    if quality.fid is not None:
        lines += [f"FID {quality.fid:.4f}",
                  f"KID {quality.kid:.6g} ± {quality.kid_deviation:.3g}"]
    if quality.inception_score is not None:
        lines.append(f"IS {quality.inception_score:.4f} ± {quality.inception_deviation:.4f}")
    if quality.image_similarity is not None:
        lines.append(f"image similarity ({network.similarity}) {quality.image_similarity:.4f}")
    if quality.text_similarity is not None:
        lines.append(f"text similarity (CLIP-T) {quality.text_similarity:.4f}, CLIPScore "
                     f"{clip_score(quality.text_similarity):.2f}")
        if abs(quality.text_similarity) < UNRELATED:
            lines.append("A text similarity about 0 means that clip and clip_vision are not of one "
                         "model, or that the clip was saved without its text projection.")
    missing = [name for name, value in (
        ("FID, KID, image similarity (no reference)", quality.fid),
        ("IS (the network has no classes)", quality.inception_score),
        ("text similarity (no captions)", quality.text_similarity)) if value is None]
    if missing:
        lines.append(f"not measured, -1: {'; '.join(missing)}")
    lines += quality.notes
    if quality.fid is not None or quality.inception_score is not None:
        lines.append("These are not the numbers of papers, which use an Inception network; compare "
                     "them with others of this network only.")
    if unused:
        lines.append(f"'clip_vision' is connected but not used, since network is '{STARTER}'.")
    for pictures in sets:
        if pictures.warnings:
            lines.append(f"{len(pictures.warnings)} files of '{pictures.name}' were left out:")
            lines += pictures.warnings[:10]
    return "\n".join(lines)
