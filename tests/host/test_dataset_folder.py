"""Hugging Face datasets: folders as `save_to_disk` and the Hub write them, and damaged ones."""

import io
import json
import struct
import sys
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from quanttune.quant import QuantTuneError

pytestmark = pytest.mark.usefixtures("host_folders")


def jpeg(shade, size=(32, 32)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def table(count, first=0, **columns):
    """Rows as the feature Image of `datasets` stores them."""
    numbers = range(first, first + count)
    pictures = [{"bytes": jpeg(10 * n), "path": f"{n}.jpg"} for n in numbers]
    return pa.table({"image": pictures, "text": [f"face {n}" for n in numbers], **columns})


def stream(path, rows, batch=1000):
    """An .arrow file as `datasets` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(str(path), rows.schema) as writer:
        writer.write_table(rows, batch)


def saved(folder, *shards):
    """What `Dataset.save_to_disk` leaves."""
    names = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
    for name, rows in zip(names, shards):
        stream(folder / name, rows, 2)
    state = {"_data_files": [{"filename": n} for n in names], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path, row_group_size=2)


@pytest.fixture
def folder(host_folders):
    path = host_folders / "input" / "faces"
    path.mkdir()
    return path


def read(**options):
    from quanttune.host.images import read_folder

    return read_folder("faces", "dataset column", **{"resolution": 64, **options})


def shades(found):
    return [round(float(p.mean()) * 255 / 10) for p in found.images.images]


def test_shards_of_a_saved_dataset_in_their_order(folder):
    saved(folder, table(3), table(2, 3))
    stream(folder / "cache-0123.arrow", table(1, 9))  # left by a map
    found = read()
    assert shades(found) == [0, 1, 2, 3, 4] and found.warnings == ()
    assert found.images.captions == tuple(f"face {n}" for n in range(5))
    assert shades(read(limit=4)) == [0, 1, 2, 3]


def test_a_dictionary_of_splits_is_read_at_its_train(folder):
    (folder / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    saved(folder / "test", table(1, 5))
    saved(folder / "train", table(2))
    assert shades(read()) == [0, 1]
    (folder / "dataset_dict.json").write_text('{"splits": ["test"]}')
    assert shades(read()) == [5]
    (folder / "dataset_dict.json").write_text('{"splits": ["a", "b"]}')
    with pytest.raises(QuantTuneError, match="the splits a, b and none called train"):
        read()


@pytest.mark.parametrize("place", ["", "data", "train"])
def test_parquet_as_on_the_hub(place, folder):
    parquet(folder / place / "train-00000-of-00002.parquet", table(3))
    parquet(folder / place / "train-00001-of-00002.parquet", table(1, 3))
    parquet(folder / place / "test-00000-of-00001.parquet", table(1, 9))
    assert shades(read()) == [0, 1, 2, 3]


def test_other_forms_of_arrow(folder):
    """A cache of `load_dataset`, the file format, plain bytes, lists of captions, names."""
    stream(folder / "imagefolder-train.arrow", table(1))
    stream(folder / "imagefolder-test.arrow", table(1, 7))
    assert shades(read()) == [0]
    for path in folder.iterdir():
        path.unlink()
    rows = pa.table({"jpg": [jpeg(30)], "en": [["first", "second"]]})
    with pa.ipc.new_file(str(folder / "rows.arrow"), rows.schema) as writer:
        writer.write_table(rows)
    found = read(caption_column="en")
    assert shades(found) == [3] and found.images.captions == ("first",)
    words = pa.array(["a face"]).dictionary_encode()
    stream(folder / "rows.arrow", pa.table({"jpg": [jpeg(30)], "en": words}))
    assert read(caption_column="en").images.captions == ("a face",)


def test_the_column_called_image_comes_first(folder):
    stream(folder / "a.arrow", table(1).add_column(0, "mask", pa.array([jpeg(200)])))
    assert shades(read()) == [0]


def test_pictures_beside_the_dataset(folder):
    Image.new("RGB", (32, 32), (40, 40, 40)).save(folder / "a.png")
    cells = pa.array([{"bytes": None, "path": "a.png"}, {"bytes": None, "path": "gone.png"}],
                     pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    stream(folder / "a.arrow", pa.table({"image": cells, "text": ["x", "y"]}))
    found = read()
    assert shades(found) == [4]
    assert found.warnings == ("Row 2 of the dataset faces was left out: No such file or directory",)


def claiming(width, height):
    """A PNG of a few bytes whose header claims a size."""
    buffer = io.BytesIO()
    Image.new("1", (16, 16)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_rows_that_cannot_be_used_are_left_out_and_named(folder):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, "PNG")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    cells = [{"bytes": jpeg(0)}, None, {"bytes": b""}, {"bytes": b"no picture"},
             {"bytes": whole.getvalue()[:2000]}, {"bytes": claiming(20_000, 20_000)},
             {"bytes": claiming(10_001, 10_000)}, {"bytes": postscript}, {"bytes": jpeg(0, (4, 4))}]
    stream(folder / "a.arrow", pa.table({"image": cells, "text": ["a face"] * len(cells)}))
    found = read()
    assert shades(found) == [0] and len(found.warnings) == 8
    reasons = ("holds no picture", "holds no picture", "it is no picture", "truncated", "pixels",
               "too many pixels", "it is no picture", "only 4 x 4 pixels")
    for number, (warning, reason) in enumerate(zip(found.warnings, reasons), 2):
        assert warning.startswith(f"Row {number} of the dataset faces was left out: ")
        assert reason in warning


def test_captions_that_are_missing(folder):
    rows = table(2).set_column(1, "text", pa.array(["a face", None]))
    saved(folder, rows)
    with pytest.raises(QuantTuneError, match="Row 2 of the dataset faces has no caption; fill its "
                                             "'text', give a phrase, or leave caption_column"):
        read()
    assert read(phrase="someone").images.captions == ("a face", "someone")
    assert read(caption_column="").images.captions == ("", "")


@pytest.mark.parametrize("column,match", [
    ("label", r"The column 'label' of data-\S+ holds int64 and no text; .*there: 'text', 'many'"),
    ("image", "holds pictures and no text"),
    ("prompt", "has no column 'prompt', only 'image', 'text', 'label', 'many'; set caption_column"),
])
def test_columns_that_are_no_captions(column, match, folder):
    saved(folder, table(2, label=[0, 1], many=[["a"], ["b"]]))
    with pytest.raises(QuantTuneError, match=match):
        read(caption_column=column)


@pytest.mark.parametrize("spoil,match", [
    (lambda f: (f / "state.json").write_text("{"), "state.json cannot be read"),
    (lambda f: (f / "state.json").write_text("[]"), "state.json cannot be read"),
    (lambda f: (f / "state.json").write_text("{}"), "it lists no files"),
    (lambda f: (f / "state.json").write_text('{"_data_files": []}'), "is no dataset"),
    (lambda f: (f / "state.json").write_text('{"_data_files": [{"filename": "../a.arrow"}]}'),
     "outside of the folder"),
    (lambda f: (f / "state.json").write_text('{"_data_files": [{"filename": "b.arrow"}]}'),
     "lacks its file b.arrow"),
    (lambda f: (f / "state.json").write_text(
        '{"_data_files": [{"filename": "%s"}]}' % ("x" * 300)), "lacks its file xxx"),
    (lambda f: (f / "dataset_dict.json").write_text('{"splits": ["%s"]}' % ("y" * 300)),
     "lacks the folder of its split yyy"),
    (lambda f: (f / "state.json").write_text('{"_indices_data_files": [1]}'), "old version"),
    (lambda f: (f / "dataset_dict.json").write_text('{"splits": ["../.."]}'), "outside"),
    (lambda f: (f / "dataset_dict.json").write_text('{"splits": []}'), "it lists no splits"),
    (lambda f: next(f.glob("*.arrow")).write_bytes(b""), r"data-\S+ cannot be read"),
    (lambda f: next(f.glob("*.arrow")).write_bytes(b"x" * 500), "cannot be read"),
    (lambda f: next(f.glob("*.arrow")).write_bytes(next(f.glob("*.arrow")).read_bytes()[:-500]),
     "cannot be read"),
    (lambda f: saved(f, table(2).slice(0, 0)), "no picture that can be read; choose another"),
    (lambda f: saved(f, pa.table({"text": ["a"]})), "no column of pictures, only 'text'"),
])
def test_what_a_dataset_may_have_wrong(spoil, match, folder):
    saved(folder, table(2))
    spoil(folder)
    with pytest.raises(QuantTuneError, match=match) as error:
        read()
    assert "\n" not in str(error.value)


def test_a_pointer_of_git_instead_of_the_file(folder):
    (folder / "a.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    with pytest.raises(QuantTuneError, match="a.parquet cannot be read .*; copy or download it"):
        read()


def test_a_cell_that_names_a_file_elsewhere(folder):
    cells = pa.array([{"bytes": None, "path": "/etc/passwd"}],
                     pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    parquet(folder / "a.parquet", pa.table({"image": cells, "text": ["x"]}))
    with pytest.raises(QuantTuneError, match="Row 1 of the dataset faces names the file "
                                             "'/etc/passwd', which may lie outside"):
        read()


def test_damaged_offsets_do_not_reach_memory(folder):
    """A bit of an .arrow file at a time: read, or one sentence, and never a crash."""
    stream(folder / "a.arrow", table(2))
    whole = (folder / "a.arrow").read_bytes()
    places = np.random.default_rng(0).integers(0, len(whole), 60)
    failed = 0
    for place in [*range(0, 600, 12), *places]:
        changed = bytearray(whole)
        changed[place] ^= 0x81
        (folder / "a.arrow").write_bytes(changed)
        try:
            read(phrase="x")
        except QuantTuneError:
            failed += 1
    assert failed > 5


def test_only_what_the_limit_asks_for_is_read(folder):
    parquet(folder / "data" / "train-00000-of-00002.parquet", table(2))
    (folder / "data" / "train-00001-of-00002.parquet").write_bytes(b"not even a file of rows")
    assert shades(read(limit=2)) == [0, 1]
    with pytest.raises(QuantTuneError, match="train-00001"):
        read()


def test_without_pyarrow_it_says_what_to_install(folder, monkeypatch):
    saved(folder, table(1))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(QuantTuneError, match="python -m pip install pyarrow"):
        read()


def test_another_kind_of_captions_is_recommended(folder):
    from quanttune.host.images import image_folders, read_folder

    with pytest.raises(QuantTuneError, match="is no dataset: .*choose another kind of captions"):
        read()
    parquet(folder / "data" / "train-0.parquet", table(1))
    with pytest.raises(QuantTuneError, match="so set captions to 'dataset column'"):
        read_folder("faces", "none", resolution=64)
    assert image_folders()[2:] == ["faces"]


@pytest.mark.parametrize("form", ["saved", "hub"])
def test_the_state_follows_the_shards(form, folder):
    from quanttune.host.images import folder_state

    def write(count):
        if form == "saved":
            saved(folder, table(count))
        else:
            parquet(folder / "data" / "train-0.parquet", table(count))
        return folder_state("faces", "dataset column")

    first = write(1)
    assert folder_state("faces", "dataset column") == first
    (folder / "README.md").write_text("no rows")
    assert folder_state("faces", "dataset column") == first
    assert write(2) != first
