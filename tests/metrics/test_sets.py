"""FID, KID, IS and cosines against plain numpy and scipy, and torchmetrics run plainly."""

import numpy as np
import pytest
import scipy.linalg
import torch

from quanttune.metrics.features import collect_features, fitted_square
from quanttune.metrics.sets import (
    clip_score,
    frechet_distance,
    inception_score,
    kernel_distance,
    measure_set,
    set_similarity,
    text_similarity,
)
from quanttune.quant import QuantTuneError


class Toy:
    """A network of one random layer."""

    name, similarity = "toy", "CLIP-I"

    def __init__(self, size=8, classes=0):
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.randn(3 * 16, size, generator=generator)
        self.head = torch.randn(size, classes, generator=generator) if classes else None

    def features(self, pictures):
        return torch.relu(fitted_square(pictures, 4).flatten(1) @ self.weight)

    def logits(self, features):
        return None if self.head is None else features @ self.head


def sets(count=60, other=50, size=8, shift=0.3):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(size, size, generator=generator) / size ** 0.5
    return (torch.randn(count, size, generator=generator) @ mix + shift,
            torch.randn(other, size, generator=generator))


def fid_by_scipy(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    first, second = (np.atleast_2d(np.cov(v, rowvar=False)) for v in (a, b))
    root = scipy.linalg.sqrtm(first @ second).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)


def fid_of_few(a, b):
    """The same for any rank: the trace of the root is the nuclear norm of the product."""
    a, b = a.double().numpy(), b.double().numpy()
    x, y = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (a, b))
    nuclear = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + (x ** 2).sum() + (y ** 2).sum() - 2 * nuclear


def kid_by_numpy(a, b):
    a, b = a.double().numpy(), b.double().numpy()

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    n = len(a)
    same = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (kernel(a, a), kernel(b, b)))
    return same - 2 * kernel(a, b).mean()


@pytest.mark.parametrize("size", [1, 8, 128])
def test_fid_is_the_formula(size):
    a, b = sets(300, 250, size)
    assert frechet_distance(a, b) == pytest.approx(fid_by_scipy(a, b), rel=1e-4, abs=1e-4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("size", [128, 768])
def test_fid_of_fewer_pictures_than_features(size):
    a, b = sets(20, 30, size)
    assert frechet_distance(a, b) == pytest.approx(fid_of_few(a, b), rel=1e-4)


@pytest.mark.filterwarnings("ignore:Metric:UserWarning")
def test_fid_and_kid_are_torchmetrics_run_plainly():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Network(torch.nn.Module):
        num_features = 8

        def forward(self, pictures):
            return Toy().features(pictures).double()

    generator = torch.Generator().manual_seed(1)
    pictures, reference = torch.rand(2, 40, 3, 9, 9, generator=generator)
    fid = FrechetInceptionDistance(feature=Network())
    kid = KernelInceptionDistance(feature=Network(), subsets=1, subset_size=40)
    for metric in (fid, kid):
        metric.update(pictures, real=False)
        metric.update(reference, real=True)
    quality = measure_set(Toy(), Toy().features(pictures), Toy().features(reference))
    assert quality.fid == pytest.approx(float(fid.compute()), abs=1e-6)
    assert quality.kid == pytest.approx(float(kid.compute()[0]), abs=1e-6)


def test_kid_of_equally_many_is_the_formula():
    a, b = sets(70, 70)
    value, deviation = kernel_distance(a, b)
    assert value == pytest.approx(kid_by_numpy(a, b), abs=1e-4) and deviation == 0


def test_kid_of_subsets_is_near_the_whole_and_repeats_itself():
    a, b = sets(1500, 1500)
    state = torch.random.get_rng_state()
    value, deviation = kernel_distance(a, b)
    assert 0 < deviation and value == pytest.approx(kid_by_numpy(a, b), abs=deviation)
    assert kernel_distance(a, b) == (value, deviation) != kernel_distance(a, b, seed=1)
    few, _ = kernel_distance(a[:40], b[:90])
    assert few == pytest.approx(value, abs=0.5)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_inception_score_by_hand():
    logits = torch.randn(90, 5, generator=torch.Generator().manual_seed(0)) * 3
    p = logits.double().softmax(1)
    expected = (p * (p / p.mean(0)).log()).sum(1).mean().exp()
    value, deviation = inception_score(logits)
    assert value == pytest.approx(float(expected), abs=1e-6) and deviation == 0
    sure = torch.eye(4).repeat(25, 1) * 200  # probabilities that are zero in float32
    assert inception_score(sure)[0] == pytest.approx(4)
    assert inception_score(torch.zeros(10, 4))[0] == pytest.approx(1)
    many = torch.randn(1000, 5) * 3
    assert inception_score(many)[1] > 0 and inception_score(many) == inception_score(many)


def test_cosines_by_plain_loops():
    a, b = sets(7, 5)
    cosine = torch.nn.functional.cosine_similarity
    pairs = [float(cosine(x, y, dim=0)) for x in a for y in b]
    assert set_similarity(a, b) == pytest.approx(np.mean(pairs), abs=1e-6)
    texts = b[:3]
    turns = [float(cosine(x, texts[i % 3], dim=0)) for i, x in enumerate(a)]
    assert text_similarity(a, texts) == pytest.approx(np.mean(turns), abs=1e-6)
    assert clip_score(0.25) == 25 and clip_score(-0.1) == 0
    assert set_similarity(torch.zeros(2, 8), b) == 0


def test_embeddings_of_different_models():
    with pytest.raises(QuantTuneError, match="768 values and the picture embeddings 512"):
        text_similarity(torch.ones(2, 512), torch.ones(2, 768))


@pytest.mark.parametrize("batch", [1, 7, 40])
@pytest.mark.parametrize("inference", [False, True])
def test_the_size_of_batches_changes_nothing(batch, inference):
    network = Toy(classes=4)
    generator = torch.Generator().manual_seed(1)
    pictures, reference = torch.rand(2, 40, 3, 9, 9, generator=generator)
    done = []
    with torch.inference_mode(inference):
        found = [collect_features(network, p.split(batch), done.append)
                 for p in (pictures, reference)]
        quality = measure_set(network, *found, texts=torch.ones(1, 8))
        whole = measure_set(network, network.features(pictures), network.features(reference),
                            torch.ones(1, 8))
    assert done[-1] == 40 and len(done) == 2 * -(-40 // batch)
    for name in ("fid", "kid", "inception_score", "image_similarity", "text_similarity"):
        assert getattr(quality, name) == pytest.approx(getattr(whole, name), abs=1e-5), name


def test_too_few_pictures_are_told():
    a, b = sets(8, 30)
    assert "8 pictures do not fill the 8 dimensions" in measure_set(Toy(), a, b).notes[0]
    a, b = sets(9, 30)
    assert measure_set(Toy(), a, b).notes == ()


def test_what_is_not_given_is_not_measured():
    a, _ = sets()
    quality = measure_set(Toy(), a)
    assert (quality.fid, quality.kid, quality.inception_score, quality.image_similarity,
            quality.text_similarity) == (None,) * 5
    assert measure_set(Toy(classes=4), a).inception_score > 1


@pytest.mark.parametrize("count,match", [(0, "no"), (1, "only one")])
def test_sets_of_less_than_two(count, match):
    a, b = sets()
    with pytest.raises(QuantTuneError, match=f"{match} reference image"):
        measure_set(Toy(), a, b[:count])
    with pytest.raises(QuantTuneError, match=f"{match} image"):
        measure_set(Toy(), a[:count])


def test_values_that_are_not_finite():
    pictures = torch.rand(2, 3, 8, 8)
    broken = Toy()
    broken.weight[0, 0] = torch.nan
    with pytest.raises(QuantTuneError, match="weights are damaged"):
        collect_features(broken, [pictures])
    pictures[0, 0, 0, 0] = torch.nan
    with pytest.raises(QuantTuneError, match="images hold NaN"):
        collect_features(Toy(), [pictures])


@pytest.mark.parametrize("shape", [(30, 50), (128, 128), (300, 128), (7, 5), (1, 900)])
def test_pictures_are_scaled_and_cut_to_a_square(shape):
    ramp = torch.linspace(0, 1, shape[1]).expand(1, 3, *shape)
    square = fitted_square(ramp, 128)
    assert square.shape == (1, 3, 128, 128) and 0 <= square.min() and square.max() <= 1
    assert abs(float(square.mean()) - 0.5) < 0.02
