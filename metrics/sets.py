"""Distances and scores of sets of pictures: FID, KID, IS, CLIP-T, CLIP-I and DINO-I.

Everything here takes features ``[n, d]`` (`features.collect_features`), so that a network looks at
each picture once for all of them. torchmetrics computes FID, KID and IS in float64 with a module in
place of its Inception network that passes our features on; it is imported when it is needed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..quant import QuantTuneError
from .features import FeatureNetwork

BLOCK = 4096
"""Rows turned into float64 at a time."""
SUBSETS, SUBSET_SIZE = 100, 1000
"""How KID is estimated: subsets of as many pictures."""
SPLITS, SPLIT_SIZE = 10, 100
"""IS is the mean of ten parts of the pictures when each has at least as many, else of fewer."""


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance of two sets of features (FID, Heusel et al. 2017, eq. 6).

    ``|m - m_r|^2 + Tr(C + C_r - 2 (C C_r)^(1/2))`` with means ``m`` and covariances ``C``, in
    float64. Raises QuantTuneError for fewer than two vectors in a set.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    _check(features, reference)
    metric = _made(FrechetInceptionDistance, features.shape[1])
    for vectors, real in ((features, False), (reference, True)):
        for block in vectors.split(BLOCK):
            metric.update(block.double(), real=real)
    # Rounding takes the distance of equal sets a little below zero.
    return max(0.0, float(metric.compute()))


def kernel_distance(features: Tensor, reference: Tensor, seed: int = 0) -> tuple[float, float]:
    """Squared maximum mean discrepancy (KID, Bińkowski et al. 2018, sec. 4) and its deviation.

    Kernel ``(x . y / d + 1)^3``, unbiased estimate, so it may be below zero for equal sets. Mean
    and standard deviation over 100 subsets of 1000 vectors; of smaller sets the subsets have the
    size of the smaller one, and two equally large ones are compared whole, once.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    _check(features, reference)
    size = min(SUBSET_SIZE, len(features), len(reference))
    subsets = 1 if len(features) == len(reference) == size else SUBSETS
    metric = _made(KernelInceptionDistance, features.shape[1], subsets=subsets, subset_size=size)
    metric.update(features.double(), real=False)
    metric.update(reference.double(), real=True)
    return _seeded(metric, seed)


def inception_score(logits: Tensor, seed: int = 0) -> tuple[float, float]:
    """``exp(E KL(p(y|x) || p(y)))`` (IS, Salimans et al. 2016) and its deviation over the parts.

    logits: ``[n, classes]`` of any classifier. The mean over ten random parts, of fewer when these
    would have under 100 pictures each. From 1 (nothing told apart, or all alike) to the number of
    classes.
    """
    from torchmetrics.image.inception import InceptionScore

    splits = max(1, min(SPLITS, len(logits) // SPLIT_SIZE))
    metric = _made(InceptionScore, logits.shape[1], splits=splits)
    # float64, since a probability that rounds to zero would make NaN of 0 * log 0.
    metric.update(logits.double())
    mean, deviation = _seeded(metric, seed)
    return mean, deviation if splits > 1 else 0.0


def set_similarity(features: Tensor, reference: Tensor) -> float:
    """Mean cosine over all pairs of the two sets: CLIP-I or DINO-I, as DreamBooth defines them.

    Ruiz et al. 2023, sec. 4.2: "the average pairwise cosine similarity between the embeddings of
    generated and real images".
    """
    # The mean over all pairs of products is the product of the means.
    return float(_unit(features).mean(0) @ _unit(reference).mean(0))


def text_similarity(features: Tensor, texts: Tensor) -> float:
    """Mean cosine of pictures ``[n, d]`` and their texts: CLIP-T; text ``i % len(texts)`` is used.

    Multiplied by 100, and zero when negative, it is torchmetrics' CLIPScore (`clip_score`).

    Raises QuantTuneError when the embeddings differ in length.
    """
    if features.shape[1] != texts.shape[1]:
        raise QuantTuneError(
            f"The text embeddings have {texts.shape[1]} values and the picture embeddings "
            f"{features.shape[1]}; connect a clip and a clip_vision of one model.")
    index = torch.arange(len(features)) % len(texts)
    return float((_unit(features) * _unit(texts)[index]).sum(1).mean())


def clip_score(similarity: float) -> float:
    """CLIP-T in the other usual unit: ``100 max(0, cosine)`` (Hessel et al. 2021 have 2.5 max)."""
    return 100 * max(0.0, similarity)


@dataclass(frozen=True)
class SetQuality:
    """What was measured of a set of pictures; None for what was not.

    Attributes:
        pictures, references: how many.
        fid: Fréchet distance to the reference set, 0 when alike.
        kid, kid_deviation: squared kernel distance, about 0 when alike.
        inception_score, inception_deviation: 1 to the number of classes, more is better.
        image_similarity: mean pairwise cosine with the reference set, up to 1.
        text_similarity: mean cosine with the texts, up to 1.
        notes: sentences on what the numbers are worth.
    """

    pictures: int
    references: int = 0
    fid: float | None = None
    kid: float | None = None
    kid_deviation: float | None = None
    inception_score: float | None = None
    inception_deviation: float | None = None
    image_similarity: float | None = None
    text_similarity: float | None = None
    notes: tuple[str, ...] = ()


def measure_set(network: FeatureNetwork, features: Tensor, reference: Tensor | None = None,
                texts: Tensor | None = None, seed: int = 0) -> SetQuality:
    """All that can be measured of a set with what is given.

    Args:
        network: that made the features.
        features: ``[n, d]`` of the pictures.
        reference: ``[m, d]`` of the reference pictures, for FID, KID and image similarity.
        texts: ``[k, d]`` embeddings, used in turn, for text similarity.
        seed: of the random subsets of KID and parts of IS.

    Raises:
        QuantTuneError: fewer than two pictures, or lengths that differ.
    """
    _check(features, features if reference is None else reference)
    found, notes = {}, []
    if reference is not None:
        fewest, dimensions = min(len(features), len(reference)), features.shape[1]
        found["references"] = len(reference)
        found["fid"] = frechet_distance(features, reference)
        found["kid"], found["kid_deviation"] = kernel_distance(features, reference, seed)
        found["image_similarity"] = set_similarity(features, reference)
        if fewest <= dimensions:
            notes.append(
                f"{fewest} pictures do not fill the {dimensions} dimensions of the features: FID "
                "is too large then and only comparable at equal numbers; KID is unbiased.")
    logits = network.logits(features)
    if logits is not None:
        found["inception_score"], found["inception_deviation"] = inception_score(logits, seed)
    if texts is not None:
        found["text_similarity"] = text_similarity(features, texts)
    return SetQuality(len(features), **found, notes=tuple(notes))


def _check(features: Tensor, reference: Tensor) -> None:
    for name, vectors in (("image", features), ("reference image", reference)):
        if len(vectors) < 2:
            count = "is only one" if len(vectors) else "is no"
            raise QuantTuneError(f"There {count} {name} to measure; a set needs at least two.")
    if features.shape[1] != reference.shape[1]:
        raise QuantTuneError(f"The features have {features.shape[1]} and "
                             f"{reference.shape[1]} values; use one network for both sets.")


def _made(metric: type, width: int, **options):
    """A torchmetrics metric that is given features instead of pictures."""
    passed_on = nn.Identity()
    passed_on.num_features = width
    with warnings.catch_warnings():
        # Of a large memory footprint, meant for maps; ours are vectors.
        warnings.simplefilter("ignore", UserWarning)
        # Never gathers over processes, should a trainer have started some.
        return metric(feature=passed_on, sync_on_compute=False, **options)


def _seeded(metric, seed: int) -> tuple[float, float]:
    """Mean and deviation of a metric that draws random numbers; the caller's state is kept."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a deviation of one part
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def _unit(vectors: Tensor) -> Tensor:
    return nn.functional.normalize(vectors.double(), dim=1)
