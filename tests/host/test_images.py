"""Reading pictures: what is taken, how it is fitted, and a sentence for everything else."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.usefixtures("host_folders")


@pytest.fixture
def folder(host_folders):
    path = host_folders / "input" / "dog"
    path.mkdir()
    return path


def picture(path, size=(40, 30), colour=(200, 30, 30), **options):
    Image.new("RGB", size, colour).save(path, **options)


def read(*arguments, **options):
    from quanttune.host.images import read_folder

    return read_folder(*arguments, **{"resolution": 64, "phrase": "a sks dog", **options})


def test_pictures_come_in_order_with_their_captions(folder):
    for name, colour in (("b.png", (0, 0, 255)), ("a.jpg", (255, 0, 0)), ("c.webp", (0, 255, 0))):
        picture(folder / name, colour=colour)
    (folder / "b.txt").write_text("a sks dog\n  asleep ")
    (folder / "notes.md").write_text("not a picture")
    found = read("dog")
    assert found.warnings == () and len(found.images.images) == 3
    assert found.images.captions == ("a sks dog", "a sks dog asleep", "a sks dog")
    assert found.images.subject == "a sks dog"
    means = [p.mean((0, 1)).argmax().item() for p in found.images.images]
    assert means == [0, 2, 1]
    assert all(p.shape == (64, 64, 3) and 0 <= p.min() and p.max() <= 1
               for p in found.images.images)


def test_the_starters_subjects_are_offered_first():
    from quanttune.host.images import image_folders

    assert image_folders()[:2] == ["starter: crest", "starter: pip"]
    found = read("starter: pip", phrase="", resolution=128)
    assert len(found.images.images) == 6 and found.images.subject.startswith("a sks character")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
def test_a_pipe_is_left_out_and_not_waited_for(folder):
    picture(folder / "a.png")
    os.mkfifo(folder / "b.png")
    found = read("dog")
    assert len(found.images.images) == 1
    assert "b.png was left out" in found.warnings[0] and "pipe" in found.warnings[0]


def test_transparency_is_white_and_rotation_is_undone(folder):
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(folder / "clear.png")
    turned = Image.new("RGB", (40, 20), "black")
    turned.paste("white", (0, 0, 20, 20))  # the left half; upright it is the upper one
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif, quality=95)
    clear, upright = read("dog").images.images
    assert clear.min() > 0.99
    assert upright[:20].mean() > 0.9 and upright[-20:].mean() < 0.1


def test_grey_pictures_of_16_bits_keep_their_shades(folder):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(folder / "a.png")
    (found,) = read("dog").images.images
    expected = torch.linspace(0, 1, 64).expand(64, 64)
    assert float((found[..., 0] - expected).abs().max()) < 0.01


@pytest.mark.parametrize("text", ["a sks dog\n".encode("utf-8-sig"), "a sks dog".encode("utf-16")])
def test_captions_of_other_editors(text, folder):
    picture(folder / "a.png")
    (folder / "a.txt").write_bytes(text)
    assert read("dog", phrase="").images.captions == ("a sks dog",)


@pytest.mark.parametrize("text", ["Ein Mädchen".encode("latin-1"), "一个女孩".encode("gbk"),
                                  "a girl".encode("utf-16-le"), b"\xff\xfea"])
def test_a_caption_in_another_encoding_is_refused_by_name(text, folder):
    from quanttune.quant import QuantTuneError

    picture(folder / "a.png")
    (folder / "a.txt").write_bytes(text)
    with pytest.raises(QuantTuneError, match=r"a\.txt is no text in UTF-8.*save it as UTF-8\.$"):
        read("dog")


def test_a_caption_whose_suffix_is_in_capitals_counts(folder):
    picture(folder / "a.png")
    (folder / "a.TXT").write_text("upper")
    assert read("dog").images.captions == ("upper",)
    (folder / "lonely.TXT").write_text("no picture")
    assert "lonely.TXT was left out" in read("dog").warnings[0]
    (folder / "a.txt").write_text("lower")
    assert read("dog").images.captions == ("lower",)


@pytest.mark.parametrize("text", ["", " \r\n"])
def test_an_empty_text_file_takes_the_phrase(text, folder):
    picture(folder / "a.png")
    (folder / "a.txt").write_text(text)
    assert read("dog").images.captions == ("a sks dog",)
    assert read("dog", phrase="").images.captions == ("",)


def test_a_folder_named_like_a_caption_is_none(folder):
    picture(folder / "a.png")
    (folder / "a.txt").mkdir()
    assert read("dog").images.captions == ("a sks dog",)


def test_pictures_of_other_kinds_are_named(folder):
    picture(folder / "a.png")
    (folder / "b.gif").write_bytes(b"GIF89a")
    assert "b.gif was left out" in read("dog").warnings[0]


@pytest.mark.parametrize("options,match", [
    ({"fit": "stretch"}, "fit is 'stretch'"), ({"captions": "foo"}, "captions is 'foo'"),
    ({"resolution": 0}, "resolution is 0"), ({"resolution": 7}, "resolution is 7"),
    ({"resolution": 10**9}, "resolution is 1000000000"), ({"limit": -1}, "limit is -1"),
])
def test_settings_of_a_configuration_file(options, match, folder):
    from quanttune.quant import QuantTuneError

    picture(folder / "a.png")
    with pytest.raises(QuantTuneError, match=match):
        read("dog", **options)


def test_keep_shape_is_the_nearest_bucket_with_the_middle_kept(folder):
    picture(folder / "c.png", (120, 90))
    strip = Image.new("RGB", (400, 100), "black")
    strip.paste("white", (150, 0, 250, 100))
    strip.save(folder / "a.png")
    picture(folder / "b.png", (90, 120))
    picture(folder / "d.png", (9, 9000))
    found = read("dog", fit="keep shape", resolution=128).images.images
    assert [tuple(p.shape[1::-1]) for p in found] == [(200, 80), (112, 144), (144, 112), (80, 200)]
    assert found[0][:, 80:120].min() > 0.9 and found[0][:, :30].max() < 0.1


def test_the_report_counts_buckets_and_what_was_left_out(folder):
    from quanttune.host.images import report

    for i in range(3):
        picture(folder / f"a{i}.png", (40, 40))
    picture(folder / "b.png", (40, 80))
    assert report(read("dog").images) == "4 images"
    lines = report(read("dog", fit="keep shape", resolution=512).images, ["x was left out"] * 23)
    lines = lines.splitlines()
    assert lines[:2] == ["4 images", "buckets: 512x512: 3, 320x768: 1"]
    assert "they repeat in it" in lines[2]
    assert lines[3:] == ["x was left out"] * 20 + ["and 3 more were left out"]


def test_the_contact_sheet_shows_whole_pictures(folder):
    from quanttune.host.images import contact_sheet

    picture(folder / "a.png", (200, 80), (255, 0, 0))
    picture(folder / "b.png", (80, 200), (0, 0, 255))
    found = read("dog", fit="keep shape", resolution=128).images
    sheet = np.asarray(contact_sheet(found), int)
    red = (sheet[..., 0] > 200) & (sheet[..., 1] < 60)
    blue = (sheet[..., 2] > 200) & (sheet[..., 1] < 60)
    for mask, wide in ((red, True), (blue, False)):
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        ratio = np.ptp(columns) / np.ptp(rows)
        assert (ratio if wide else 1 / ratio) > 2
    assert "a sks dog" in found.captions


def test_unreadable_ones_among_good_are_left_out_and_named(folder):
    picture(folder / "good.png")
    whole = folder / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    (folder / "half.png").write_bytes(whole.read_bytes()[:2000])
    whole.unlink()
    (folder / "text.jpg").write_text("hello")
    (folder / "empty.png").write_bytes(b"")
    picture(folder / "dot.png", (1, 1))
    found = read("dog")
    assert len(found.images.images) == 1 and len(found.warnings) == 4
    for name, warning in zip(("dot.png", "empty.png", "half.png", "text.jpg"), found.warnings):
        assert warning.startswith(f"{name} was left out: "), warning


@pytest.mark.parametrize("prepare,match", [
    (lambda f: None, "no picture"),
    (lambda f: (f / "a.png").write_text("no"), "no picture.*a.png"),
])
def test_nothing_readable(prepare, match, folder):
    from quanttune.quant import QuantTuneError

    prepare(folder)
    with pytest.raises(QuantTuneError, match=match):
        read("dog")


@pytest.mark.parametrize("name", ["", "字" * 100, "x" * 5000, "nowhere", "starter: nobody", "a\0b"])
def test_a_folder_that_is_not_there(name):
    from quanttune.quant import QuantTuneError

    with pytest.raises(QuantTuneError, match="not there"):
        read(name)


def test_a_missing_caption_says_three_ways_out(folder):
    from quanttune.quant import QuantTuneError

    picture(folder / "rex.png")
    with pytest.raises(QuantTuneError, match=r"rex\.png has no caption; write rex\.txt"):
        read("dog", phrase=" ")
    assert read("dog", phrase="", captions="none").images.captions == ("",)


def test_batches_from_the_graph():
    from quanttune.host.images import from_batch
    from quanttune.quant import QuantTuneError

    batch = torch.rand(2, 50, 70, 3)
    assert from_batch(batch, "a sks dog", 64, "centre crop").captions == ("a sks dog",) * 2
    assert from_batch(batch, "one\ntwo", 64, "centre crop").captions == ("one", "two")
    with pytest.raises(QuantTuneError, match="2 images and 3 lines"):
        from_batch(batch, "1\n2\n3", 64, "centre crop")
    batch[0, 0, 0, 0] = float("nan")
    with pytest.raises(QuantTuneError, match="NaN"):
        from_batch(batch, "x", 64, "centre crop")


def test_a_limit_takes_the_first_that_can_be_read(folder):
    (folder / "a.png").write_text("no picture")
    for name, colour in (("b.png", "red"), ("c.png", "lime"), ("d.png", "blue")):
        picture(folder / name, colour=colour)
    found = read("dog", limit=2)
    assert [p.mean((0, 1)).argmax().item() for p in found.images.images] == [0, 1]
    assert len(found.warnings) == 1 and len(read("dog", limit=9).images.images) == 3


def test_more_pictures_than_memory_holds(folder, monkeypatch):
    from quanttune.host import images
    from quanttune.quant import QuantTuneError

    for i in range(5):
        picture(folder / f"{i}.png")
    monkeypatch.setattr(images, "free_memory", lambda: 3 * 64 * 64 * 3 * 4 / images.ROOM)
    assert len(read("dog", limit=3).images.images) == 3
    with pytest.raises(QuantTuneError, match="'dog' do not fit into memory: the first 4 take .* "
                                             "GiB; set a limit"):
        read("dog")


def test_reading_can_be_interrupted(folder):
    from comfy.model_management import (
        InterruptProcessingException,
        interrupt_current_processing,
    )

    picture(folder / "a.png")
    interrupt_current_processing()
    with pytest.raises(InterruptProcessingException):
        read("dog")


def test_the_state_of_a_folder_follows_its_files(folder):
    from quanttune.host.images import folder_state

    picture(folder / "a.png")
    before = folder_state("dog")
    assert folder_state("dog") == before
    (folder / "a.txt").write_text("now with words")
    assert folder_state("dog") != before


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from quanttune.host.picture_file import write_png

    image, path = Image.new("RGB", (8, 8)), tmp_path / "below" / "a.png"
    write_png(image, path)
    assert Image.open(path).size == (8, 8) and [p.name for p in path.parent.iterdir()] == ["a.png"]

    def full(self, target, **_):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        write_png(image, path.with_name("b.png"))
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    with pytest.raises(OSError):
        write_png(image, path / "c.png")
