"""SSIM, PSNR and LPIPS against scikit-image, torchmetrics run plainly, and their definitions."""

import pytest
import torch
from safetensors.torch import save_file

from quanttune.metrics.similarity import BACKBONES, load_perceptual_network, psnr, ssim
from quanttune.quant import QuantTuneError


def pair(height=48, width=40, count=2, noise=0.1):
    """Smooth pictures and noisy ones of them, ``[n, 3, h, w]`` in 0..1."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, 6, 5, generator=generator)
    first = torch.nn.functional.interpolate(small, size=(height, width), mode="bilinear")
    second = first + noise * torch.randn(first.shape, generator=generator)
    return first, second.clamp(0, 1)


@pytest.mark.parametrize("size", [(48, 40), (11, 11), (12, 64)])
@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_ssim_is_scikit_images(size, noise):
    from skimage.metrics import structural_similarity

    first, second = pair(*size, noise=noise)
    expected = [structural_similarity(a.double().numpy(), b.double().numpy(), data_range=1.0,
                                      channel_axis=0, gaussian_weights=True, sigma=1.5,
                                      use_sample_covariance=False)
                for a, b in zip(first, second)]
    assert ssim(first, second).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("level", [0.0, 0.5, 0.95, 0.99, 1.0])
def test_ssim_of_nearly_flat_8_bit_pictures_is_scikit_images(level):
    from skimage.metrics import structural_similarity

    generator = torch.Generator().manual_seed(0)
    first, second = ((255 * (level + 0.003 * torch.randn(1, 3, 64, 64, generator=generator)))
                     .clamp(0, 255).round() / 255 for _ in range(2))
    expected = structural_similarity(first[0].double().numpy(), second[0].double().numpy(),
                                     data_range=1.0, channel_axis=0, gaussian_weights=True,
                                     sigma=1.5, use_sample_covariance=False)
    assert float(ssim(first, second)) == pytest.approx(expected, abs=1e-4)


def test_ssim_is_the_inner_part_of_torchmetrics_map():
    from torchmetrics.functional.image import structural_similarity_index_measure

    first, second = pair()
    _, places = structural_similarity_index_measure(first, second, data_range=1.0,
                                                    return_full_image=True)
    inner = places[..., 5:-5, 5:-5].mean((1, 2, 3))
    assert torch.allclose(ssim(first, second), inner, atol=1e-5)


def test_psnr_is_scikit_images_and_torchmetrics():
    from skimage.metrics import peak_signal_noise_ratio
    from torchmetrics.image import PeakSignalNoiseRatio

    first, second = pair()
    values = psnr(first, second)
    expected = [peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1.0)
                for a, b in zip(first, second)]
    assert values.tolist() == pytest.approx(expected, abs=1e-4)
    one = PeakSignalNoiseRatio(data_range=1.0)(second[:1], first[:1])
    assert float(values[0]) == pytest.approx(float(one), abs=1e-4)
    assert float(psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.1))) == pytest.approx(20)


def test_identical_pictures():
    first, _ = pair()
    assert torch.allclose(ssim(first, first), torch.ones(2), atol=1e-6)
    assert bool(psnr(first, first).isinf().all())


@pytest.mark.parametrize("change,match", [
    (lambda a: a[:, :, :40], "scale one"),
    (lambda a: a[:1], "as many of both"),
    (lambda a: a[:, :1], "RGB"),
    (lambda a: a / 0, "NaN"),
])
def test_pictures_that_do_not_go_together(change, match):
    first, second = pair()
    for measure in (ssim, psnr):
        with pytest.raises(QuantTuneError, match=match):
            measure(first, change(second))


def test_pictures_below_the_window():
    first, second = pair(48, 10)
    with pytest.raises(QuantTuneError, match="SSIM needs at least 11 x 11"):
        ssim(first, second)
    assert psnr(first, second).isfinite().all()


TORCHVISION = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


@pytest.fixture(scope="module", params=BACKBONES, ids=lambda b: b.name)
def network(request, tmp_path_factory):
    """A backbone, its random weights as torchvision's own state dict, and the file of them."""
    import torchvision

    backbone = request.param
    torch.manual_seed(0)
    with torch.device("meta"):
        blank = getattr(torchvision.models, TORCHVISION[backbone.name])(weights=None)
    state = {k: torch.randn(v.shape) / max(1, v[0].numel()) ** 0.5
             for k, v in blank.state_dict().items() if k.startswith("features")}
    path = tmp_path_factory.mktemp("net") / f"{backbone.name}.pth"
    torch.save({**state, "classifier.1.weight": torch.zeros(2, 2)}, path)
    return backbone, state, path


def test_lpips_is_torchmetrics_with_the_same_weights(network, tmp_path, monkeypatch):
    import torchvision
    from torchmetrics.functional.image import lpips

    backbone, state, path = network
    loaded = load_perceptual_network(path)
    assert loaded.backbone == backbone
    first, second = pair(64, 50)

    values = loaded(first, second)
    with torch.device("meta"):
        model = getattr(torchvision.models, TORCHVISION[backbone.name])(weights=None)
    model.load_state_dict(state, strict=False, assign=True)
    with monkeypatch.context() as patch:  # what torchvision would give after its download
        patch.setattr(torchvision.models, TORCHVISION[backbone.name], lambda **options: model)
        expected = [float(lpips.learned_perceptual_image_patch_similarity(
            a[None], b[None], net_type=backbone.name, normalize=True))
            for a, b in zip(first, second)]
    assert values.tolist() == pytest.approx(expected, abs=1e-6) and (values > 1e-3).all()
    assert torch.equal(loaded(first, first), torch.zeros(2))

    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "same.safetensors")
    again = load_perceptual_network(tmp_path / "same.safetensors")
    assert torch.equal(again(first, second), values)


def test_the_smallest_picture_of_lpips(network):
    backbone, _, path = network
    loaded = load_perceptual_network(path)
    size = backbone.smallest
    assert loaded(*pair(size, size)).isfinite().all()
    with pytest.raises(QuantTuneError, match=f"{backbone.title} needs at least {size} x {size}"):
        loaded(*pair(size - 1, 64))


def test_backbones_of_other_networks_and_damaged_ones(network, tmp_path):
    backbone, state, _ = network
    last = sorted(k for k in state if k != backbone.key and k.endswith(".bias"))[-1]
    for change, match in (({last: None}, "has no"), ({last: torch.zeros(3)}, "wrong shape"),
                          ({last: state[last] * torch.nan}, "NaN"),
                          ({backbone.key: None}, "no backbone of LPIPS")):
        changed = {k: v for k, v in {**state, **change}.items() if v is not None}
        torch.save(changed, tmp_path / "net.pth")
        with pytest.raises(QuantTuneError, match=match) as caught:
            load_perceptual_network(tmp_path / "net.pth")
        assert "net.pth" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"hello " * 100])
def test_files_that_cannot_be_read(name, content, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(QuantTuneError, match=name):
        load_perceptual_network(path)


def test_a_file_with_code_in_it_is_not_run(tmp_path):
    class Bad:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"features.0.weight": Bad()}, tmp_path / "bad.pth")
    with pytest.raises(QuantTuneError, match=r"bad\.pth"):
        load_perceptual_network(tmp_path / "bad.pth")
    assert not (tmp_path / "written").exists()
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(QuantTuneError, match="no backbone"):
        load_perceptual_network(tmp_path / "list.pth")
