"""Measuring pictures: streams, the host's networks, what is refused, interrupt."""

import numpy as np
import pytest
import torch
from PIL import Image

from quanttune.quant import QuantTuneError
from quanttune.tests.host.models import projecting_clip, small_vision

pytestmark = pytest.mark.usefixtures("host_folders")


@pytest.fixture(autouse=True)
def _inference(comfy_inprocess):
    with torch.inference_mode():
        yield


@pytest.fixture
def folder(host_folders):
    """A folder of eleven readable pictures of three sizes, and two that are not."""
    path = host_folders / "input" / "set"
    path.mkdir()
    random = np.random.default_rng(0)
    for index in range(11):
        size = ((128, 128), (40, 60), (61, 40))[index // 4]
        pixels = random.integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{index:02}.png")
    (path / "03b.png").write_text("no picture")
    (path / "11.jpg").write_bytes(b"")
    (path / "words.txt").write_text("not asked")
    return path


@pytest.fixture(scope="module")
def clip(comfy_inprocess):
    with torch.inference_mode():
        return projecting_clip()


def pictures(count=6, size=40, seed=0):
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(seed))


def scenes(count, start=0):
    """Pictures of the starter's world as an IMAGE."""
    from quanttune.starter.generator import render, sample

    return torch.stack([torch.from_numpy(np.array(render(sample(start + i)))) for i in
                        range(count)]).float() / 255


def measured(**inputs):
    from quanttune.host.quality import image_set_quality

    return image_set_quality(**{"images": None, "folder": "", "reference": None,
                                "reference_folder": "", **inputs})


def stream(*arguments):
    from quanttune.host.picture_stream import PictureStream

    return PictureStream("images", *arguments)


def test_a_stream_gives_every_readable_picture_once(folder):
    found = stream(pictures(20, 50), "set")
    batches = list(found)
    assert found.count == 33 and sum(map(len, batches)) == 31
    assert [len(b) for b in batches] == [16, 4, 4, 4, 3]
    assert all(b.dtype == torch.float32 and b.shape[1] == 3 and 0 <= b.min() and b.max() <= 1
               for b in batches)
    assert [w.split(" was left out")[0] for w in found.warnings] == ["03b.png", "11.jpg"]
    assert found.places == [*range(24), *range(25, 32)]
    expected = np.asarray(Image.open(folder / "05.png"))
    assert (batches[3][1].permute(1, 2, 0).numpy() * 255).round().astype(int).tolist() == (
        expected.astype(int).tolist())
    assert sum(map(len, found)) == 31, "a stream can be read again"


def test_large_pictures_come_one_at_a_time(folder, monkeypatch):
    from quanttune.host import picture_stream

    monkeypatch.setattr(picture_stream, "PIXELS", 128 * 128 * 2)
    assert [len(b) for b in stream(pictures(3, 200), "set")] == [1, 1, 1, 2, 2, 4, 3]


def test_grey_and_transparent_batches():
    from quanttune.host.picture_stream import pictures_of

    grey, clear = torch.rand(2, 8, 9, 1), torch.rand(2, 8, 9, 4)
    assert torch.equal(pictures_of(grey, "x"), grey.movedim(-1, 1).expand(2, 3, 8, 9))
    assert torch.equal(pictures_of(clear, "x"), clear[..., :3].movedim(-1, 1))


def test_a_clip_vision_is_transformers_clip(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from quanttune.host.feature_networks import ClipVisionNetwork

    vision = small_vision(tmp_path)
    network = ClipVisionNetwork(vision)
    config = CLIPVisionConfig(**{k: v for k, v in vision.config.items() if k != "model_type"})
    reference = CLIPVisionModelWithProjection(config).eval()
    state = {k: v.float() for k, v in vision.get_sd().items()}
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not unexpected and all("position_ids" in k for k in missing)
    batch = (pictures(3, 28) * 255).round() / 255
    mean, spread = (torch.tensor(v) for v in (vision.image_mean, vision.image_std))
    expected = reference(pixel_values=((batch - mean) / spread).movedim(-1, 1)).image_embeds
    found = network.features(batch.movedim(-1, 1))
    assert found.shape == (3, 128) and found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-3, rtol=1e-3)
    assert (network.name, network.similarity) == ("CLIP vision input (clip)", "CLIP-I")
    assert network.logits(found) is None


@pytest.mark.parametrize("kind,name,width", [("dinov2", "DINO-I", 48),
                                             ("siglip_vision_model", "CLIP-I", 32)])
def test_other_vision_models(kind, name, width, tmp_path):
    from quanttune.host.feature_networks import ClipVisionNetwork

    vision = small_vision(tmp_path, kind, width)
    network = ClipVisionNetwork(vision)
    batch = pictures(3, 60)
    found = network.features(batch.movedim(-1, 1))
    tokens = vision.encode_image(batch)["last_hidden_state"]
    expected = tokens[:, 0] if kind == "dinov2" else tokens.mean(1)
    assert network.similarity == name and found.shape == (3, width)
    if kind == "dinov2":
        assert torch.allclose(found, expected, atol=1e-5)
    quality, report = measured(images=batch, reference=pictures(4, 60, 1), clip_vision=vision,
                               network="CLIP vision input")
    assert f"image similarity ({name})" in report and -1 <= quality.image_similarity <= 1
    assert quality.inception_score is None and "no classes" in report


def test_the_starters_classifier_tells_sets_apart():
    images, same, other = scenes(40), scenes(40, 1000), torch.rand(40, 128, 128, 3)
    near, report = measured(images=images, reference=same)
    far, _ = measured(images=other, reference=same)
    assert near.fid < 0.5 * far.fid and near.kid < 0.5 * far.kid
    assert near.image_similarity > far.image_similarity
    assert near.inception_score > 3 > far.inception_score >= 1
    assert "40 pictures do not fill the 128 dimensions" in report
    assert "starter classifier" in report and "papers" in report
    same, _ = measured(images=images, reference=images)
    assert same.fid == pytest.approx(0, abs=1e-3)


def test_a_folder_is_the_same_as_its_pictures(host_folders):
    folder = host_folders / "input" / "scenes"
    folder.mkdir()
    images = scenes(20)
    for index, picture in enumerate(images):
        pixels = (picture.numpy() * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    reference = scenes(20, 500)
    one, _ = measured(images=images, reference=reference)
    other, _ = measured(folder="scenes", reference=reference)
    halves, _ = measured(images=images[:10], folder="scenes", reference=reference)
    assert halves.pictures == 30
    for name in ("fid", "kid", "inception_score", "image_similarity"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-5), name


def test_files_that_were_left_out_are_counted(folder):
    quality, report = measured(folder="set", reference=pictures())
    assert quality.pictures == 11 and "2 files of 'images' were left out" in report
    assert "03b.png was left out" in report
    (folder / "scan.tif").write_bytes(b"")
    _, report = measured(images=pictures(), reference_folder=str(folder))
    assert "3 files of 'reference' were left out" in report
    assert "scan.tif was left out: convert it" in report


def test_captions_are_used_in_turn_and_stay_with_their_pictures(folder, tmp_path, clip):
    from quanttune.host.feature_networks import ClipVisionNetwork, text_embeddings

    vision = small_vision(tmp_path)
    lines = ["a red star", "a blue circle on grey", "two"]
    quality, report = measured(folder="set", clip_vision=vision, clip=clip,
                               network="CLIP vision input", captions="\n\n".join(lines) + "\n ")
    texts = text_embeddings(clip, lines, 128)
    looked = ClipVisionNetwork(vision)
    cosines = []
    for place, path in enumerate(sorted(folder.glob("*.[pj]*g"))):
        if path.name in ("03b.png", "11.jpg"):
            continue
        picture = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)[None] / 255
        cosines.append(float(torch.nn.functional.cosine_similarity(
            looked.features(picture)[0], texts[place % 3], dim=0)))
    assert quality.text_similarity == pytest.approx(np.mean(cosines), abs=1e-5)
    assert f"text similarity (CLIP-T) {quality.text_similarity:.4f}, CLIPScore" in report
    assert quality.fid is None and "no reference" in report


def test_text_embeddings_are_the_projected_ones(clip):
    from quanttune.host.feature_networks import text_embeddings

    found = text_embeddings(clip, ["a red star", "a blue circle"], 128)
    weight = clip.cond_stage_model.clip_l.transformer.text_projection.weight.float()
    plain = clip.encode_from_tokens(clip.tokenize("a blue circle"), return_pooled="unprojected")[1]
    assert torch.equal(plain, clip.encode_from_tokens(clip.tokenize("a blue circle"),
                                                      return_pooled=True)[1])
    assert found.shape == (2, 128)
    assert torch.allclose(found[1], (plain.float().cpu() @ weight.cpu().T)[0], atol=1e-4)
    with pytest.raises(QuantTuneError, match="128 values a text and the clip_vision 768"):
        text_embeddings(clip, ["x"], 768)


@pytest.mark.parametrize("fill", ["zero", "nan", "identity"])
def test_a_clip_without_projection_is_refused(fill, comfy_inprocess):
    from quanttune.host.feature_networks import text_embeddings
    clip = projecting_clip({"zero": torch.zeros(128, 128), "identity": torch.eye(128),
                            "nan": torch.full((128, 128), torch.nan)}[fill])
    with pytest.raises(QuantTuneError, match="no projection from text"):
        text_embeddings(clip, ["a red star"], 128)


class NoPooled:
    """A text encoder such as T5, which gives tokens only."""

    def __init__(self):
        self.cond_stage_model = self.patcher = self
        self.load_device = torch.device("cpu")
        self.tokenize = self.load_model = self.set_clip_options = lambda given: given

    def reset_clip_options(self):
        pass

    def encode_token_weights(self, tokens):
        return torch.zeros(1, 3, 8), None


NAN = torch.full((3, 32, 32, 3), torch.nan)
VISION = "CLIP vision input"


@pytest.mark.parametrize("inputs,match", [
    ({}, "no images to measure"),
    ({"images": pictures(1)}, "only one picture for 'images'"),
    ({"images": pictures(0)}, "at least one picture"),
    ({"images": pictures(), "reference": pictures(1)}, "only one picture for 'reference'"),
    ({"images": NAN}, "'images' holds NaN"),
    ({"images": pictures(), "reference": NAN}, "'reference' holds NaN"),
    ({"images": torch.rand(2, 8, 8)}, "connect an IMAGE"),
    ({"folder": "nowhere"}, "'nowhere' is not there"),
    ({"images": pictures(), "reference_folder": "nowhere"}, "'nowhere' is not there"),
    ({"images": pictures(), "captions": "a star"}, "no 'clip' to read them"),
    ({"images": pictures(), "clip": NoPooled()}, "a clip and no captions"),
    ({"images": pictures(), "clip": NoPooled(), "captions": " \n "}, "a clip and no captions"),
    ({"images": pictures(), "clip": NoPooled(), "captions": "a"}, "cannot compare pictures with"),
    ({"images": pictures(), "network": VISION}, "'clip_vision' is not connected"),
    ({"images": pictures(), "network": "psychic"}, "no network 'psychic'"),
])
def test_what_is_refused(inputs, match):
    with pytest.raises(QuantTuneError, match=match) as caught:
        measured(**inputs)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_what_is_refused_of_a_vision_model(tmp_path):
    vision = small_vision(tmp_path)
    with pytest.raises(QuantTuneError, match="nothing to compare"):
        measured(images=pictures(), network=VISION, clip_vision=vision)
    with pytest.raises(QuantTuneError, match="no embedding of a whole text"):
        measured(images=pictures(), network=VISION, clip_vision=vision, clip=NoPooled(),
                 captions="a")
    with pytest.raises(QuantTuneError, match=r"\(dinov2\) has no text to compare with"):
        measured(images=pictures(), network=VISION, clip=NoPooled(), captions="a",
                 clip_vision=small_vision(tmp_path, "dinov2"))


def test_folders_without_two_readable_pictures(host_folders):
    folder = host_folders / "input" / "poor"
    folder.mkdir()
    with pytest.raises(QuantTuneError, match="no picture for 'images'"):
        measured(folder="poor")
    for name in ("a", "b"):
        (folder / f"{name}.png").write_text("no")
    Image.new("RGB", (16, 16)).save(folder / "c.png")
    with pytest.raises(QuantTuneError, match=r"only one picture.*\(a.png was left out"):
        measured(folder="poor")


def test_a_connected_vision_model_that_is_not_used_is_told(tmp_path):
    _, report = measured(images=pictures(), clip_vision=small_vision(tmp_path))
    assert "connected but not used" in report


def test_interrupt_stops_between_batches(monkeypatch):
    import comfy.model_management as management

    from quanttune.host import quality

    seen = []

    class Slow(quality.StarterNetwork):
        def features(self, pictures):
            seen.append(len(pictures))
            management.interrupt_current_processing(True)
            return super().features(pictures)

    monkeypatch.setattr(quality, "StarterNetwork", Slow)
    with pytest.raises(management.InterruptProcessingException):
        measured(images=pictures(100))
    assert seen == [16] and not management.processing_interrupted()


def compared(*arguments, **options):
    from quanttune.host.quality import compare_images

    return compare_images(*arguments, **options)


def test_comparing_is_the_mean_of_the_pairs():
    from quanttune.metrics.similarity import psnr, ssim

    first, second = pictures(3), pictures(3, seed=1)
    found = compared(first, second)
    pair = [p.movedim(-1, 1) for p in (first, second)]
    assert found.ssim == pytest.approx(float(ssim(*pair).mean()), abs=1e-6)
    assert found.psnr == pytest.approx(float(psnr(*pair).mean()), abs=1e-4)
    assert found.lpips == -1 and "LPIPS was not measured" in found.report
    assert len(found.report.splitlines()) == 1 + 1 + 3 + 1
    one = compared(first, second[:1])
    again = compared(first, second[:1].expand(3, -1, -1, -1))
    assert (one.ssim, one.psnr) == (again.ssim, again.psnr)


def test_the_difference_is_in_the_picture():
    first = torch.full((1, 200, 200, 3), 0.5)
    second = first.clone()
    second[..., 0] += 0.1
    found = compared(second, first, amplify=5)
    sheet = np.asarray(found.picture)
    right = sheet[120, 2 * 206 + 106]
    assert abs(int(right[0]) - 128) < 3 and right[1] < 3 and right[2] < 3
    assert abs(int(sheet[120, 106][0]) - 128) < 3 and abs(int(sheet[120, 312][0]) - 153) < 3


def test_identical_images_give_finite_numbers():
    found = compared(pictures(2), pictures(2))
    assert found.ssim == pytest.approx(1, abs=1e-6) and found.psnr == 100
    assert "2 of 2 identical" in found.report


@pytest.mark.parametrize("images,reference,match", [
    (pictures(2), pictures(3), "as many of both"),
    (pictures(2), pictures(2, 48), "scale one"),
    (pictures(2, 8), pictures(2, 8), "at least 11 x 11"),
    (NAN, NAN, "'images' holds NaN"),
    (pictures(3, 32), NAN, "'reference' holds NaN"),
    (pictures(0), pictures(1), "at least one picture"),
])
def test_images_that_cannot_be_compared(images, reference, match):
    with pytest.raises(QuantTuneError, match=match):
        compared(images, reference)


def test_interrupt_stops_comparing():
    import comfy.model_management as management

    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        compared(pictures(), pictures())
