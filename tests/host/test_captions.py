"""Captions from text files and from lists: what is read, and a sentence for everything else."""

import json

import pytest
from PIL import Image

from quanttune.quant import QuantTuneError

pytestmark = pytest.mark.usefixtures("host_folders")


@pytest.fixture
def folder(host_folders):
    path = host_folders / "input" / "faces"
    (path / "sub").mkdir(parents=True)
    for name, colour in (("a.png", "red"), ("b.png", "lime"), ("sub/c.jpg", "blue")):
        Image.new("RGB", (32, 32), colour).save(path / name)
    return path


def lines(folder, *rows, name="metadata.jsonl"):
    texts = [r if isinstance(r, str) else json.dumps(r) for r in rows]
    (folder / name).write_text("\n".join(texts), "utf-8")


def read(captions="metadata.jsonl", **options):
    from quanttune.host.images import read_folder

    return read_folder("faces", captions, **{"resolution": 64, **options})


THREE = [{"file_name": "sub/c.jpg", "text": "the third"}, {"file_name": "a.png", "text": "one"},
         {"file_name": "./b.png", "text": " two \n words"}]


def test_pictures_come_in_the_order_of_the_list(folder):
    lines(folder, *THREE, "")
    found = read()
    assert found.images.captions == ("the third", "one", "two words") and found.warnings == ()
    means = [p.mean((0, 1)).argmax().item() for p in found.images.images]
    assert means == [2, 0, 1]


def test_the_list_may_have_other_columns_and_several_captions(folder):
    lines(folder, {"file_name": "a.png", "en": ["a woman", "a person"], "n": 3},
          {"file_name": "b.png", "en": "a man"}, {"file_name": "sub/c.jpg", "en": []})
    found = read(caption_column=" en ", phrase="a face")
    assert found.images.captions == ("a woman", "a man", "a face")


def test_an_empty_column_takes_the_phrase_for_all_or_no_words(folder):
    lines(folder, *THREE)
    assert read(caption_column="").images.captions == ("",) * 3
    assert read(caption_column="", phrase="a face").images.captions == ("a face",) * 3


def test_a_table_of_a_spreadsheet_and_one_of_parquet(folder):
    import pyarrow
    import pyarrow.parquet

    lines(folder, "file_name,text", 'a.png,"one, two"', "b.png,", "sub/c.jpg,3",
          name="metadata.csv")
    assert read().images.captions == ("one, two", "", "3")
    (folder / "metadata.csv").unlink()
    table = {"file_name": ["b.png", "a.png", "sub/c.jpg"], "text": ["B", "A", "C"], "n": [1, 2, 3]}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "metadata.parquet")
    assert read().images.captions == ("B", "A", "C")
    with pytest.raises(QuantTuneError, match="row 1, has no column 'n', only 'file_name', 'text'"):
        read(caption_column="n")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lists_of_other_editors(encoding, folder):
    text = '{"file_name": "a.png", "text": "Zürich\u2028am See"}\r\n'
    (folder / "metadata.jsonl").write_bytes(text.encode(encoding))
    assert read(phrase="x", limit=1).images.captions == ("Zürich am See",)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_lists_in_another_encoding_are_refused_by_name(name, folder):
    rows = {"metadata.jsonl": '{"file_name": "a.png", "text": "Zürich"}',
            "metadata.csv": "file_name,text\na.png,Zürich"}
    for encoding in ("latin-1", "utf-16-le"):
        (folder / name).write_bytes(rows[name].encode(encoding))
        with pytest.raises(QuantTuneError, match=f"{name} is no text in UTF-8.*save it as"):
            read(phrase="x")


def test_a_limit_leaves_the_rest_unread(folder):
    lines(folder, *THREE[:2], "no JSON at all")
    assert read(limit=2).images.captions == ("the third", "one")
    with pytest.raises(QuantTuneError, match="line 3, is no JSON"):
        read(limit=3)


def test_a_line_without_its_picture_is_left_out_and_named(folder):
    (folder / "d.gif").write_bytes(b"GIF89a")
    lines(folder, {"file_name": "gone.png", "text": "x"}, {"file_name": "d.gif", "text": "x"},
          *THREE, {"file_name": "long" * 99 + ".png", "text": "x"})
    found = read()
    assert len(found.images.images) == 3
    assert "line 6, was left out: there is no picture longlong" in found.warnings[-1]
    assert found.warnings[:-1] == (
        "metadata.jsonl, line 1, was left out: there is no picture gone.png",
        "d.gif was left out: convert it to .png or .jpg")


def test_a_picture_that_no_line_names(folder):
    Image.new("RGB", (32, 32)).save(folder / "sub" / "new.png")
    lines(folder, *THREE)
    with pytest.raises(QuantTuneError, match="sub/new.png has no caption; add a line for it to "
                                             "metadata.jsonl, give a phrase"):
        read()
    assert read(phrase="a face").images.captions[-1] == "a face"
    assert len(read(limit=3).images.images) == 3


@pytest.mark.parametrize("row,match", [
    ('{"file_name": "a.png"', r"metadata\.jsonl, line 2, is no JSON \(.*\); mend or delete"),
    ("[" * 100_000, "line 2, is no JSON"),
    ('["a.png"]', "line 2, is no JSON object"),
    ({"text": "x"}, "line 2, has no column 'file_name', only 'text'; add it"),
    ({"file_name": 3, "text": "x"}, "line 2, has 3 as file_name"),
    ({"file_name": "a.png", "caption": "x"},
     "line 2, has no column 'text', only 'file_name', 'caption'; set caption_column"),
    ({"file_name": "a.png", "text": 5}, r"line 2, has a caption that is no text \(5\)"),
    ({"file_name": "a.png", "text": [["x"]]}, "no text"),
    ({"file_name": "a.png", "text": None}, "a.png has no caption; fill 'text' in metadata.jsonl"),
    *[({"file_name": name, "text": "x"}, "line 2, names the file .* outside of the folder")
      for name in ("../a.png", "sub/../../a.png", "/etc/a.png", "C:\\a.png", "..\\a.png",
                   "\\\\host\\share\\a.png", "", "a\0.png")],
])
def test_what_a_line_may_have_wrong(row, match, folder):
    lines(folder, THREE[0], row)
    with pytest.raises(QuantTuneError, match=match) as error:
        read()
    assert str(error.value).count("\n") == 0 and len(str(error.value)) < 300


@pytest.mark.parametrize("text,match", [
    ("file_name,text\n" + "x" * 200_000, "metadata.csv is no CSV after line 1 "),
    ("file_name,caption\na.png,x", "has no column 'text', only 'file_name', 'caption'"),
])
def test_what_a_table_may_have_wrong(text, match, folder):
    (folder / "metadata.csv").write_text(text)
    with pytest.raises(QuantTuneError, match=match):
        read()


def test_a_folder_without_a_list_and_one_that_has_one(folder):
    with pytest.raises(QuantTuneError, match="The folder faces has no metadata.jsonl; write one"):
        read()
    lines(folder, {"file_name": "sub/c.jpg", "text": "x"})
    for name in ("a.png", "b.png"):
        (folder / name).unlink()
    with pytest.raises(QuantTuneError, match="so set captions to 'metadata.jsonl'"):
        read("one phrase", phrase="x")
    (folder / "sub" / "c.jpg").unlink()
    with pytest.raises(QuantTuneError, match=r"no picture that can be read \(metadata.jsonl, line "
                                             r"1, was left out: there is no picture sub/c.jpg\)"):
        read()


def test_text_files_without_pictures_are_named(folder):
    (folder / "a.txt").write_text("one")
    (folder / "gone.txt").write_text("a picture that was deleted")
    (folder / "d.gif").write_bytes(b"GIF89a")
    (folder / "d.txt").write_text("said once: the picture is of a kind that is not read")
    found = read("text files", phrase="a face")
    assert found.images.captions == ("one", "a face")
    assert found.warnings == ("d.gif was left out: convert it to .png or .jpg",
                              "gone.txt was left out: there is no picture of that name")
    assert read("one phrase", phrase="a face").warnings == found.warnings[:1]
    for name in ("a.png", "b.png", "d.gif"):
        (folder / name).unlink()
    with pytest.raises(QuantTuneError, match=r"a.txt was left out: there is no picture of that"):
        read("text files")


def test_the_state_follows_the_list_and_the_folders_below(folder):
    from quanttune.host.images import folder_state

    lines(folder, *THREE)
    states = [folder_state("faces", "metadata.jsonl")]
    lines(folder, *THREE[:2])
    states.append(folder_state("faces", "metadata.jsonl"))
    Image.new("RGB", (64, 64), "navy").save(folder / "sub" / "c.jpg")
    states.append(folder_state("faces", "metadata.jsonl"))
    assert len(set(states)) == 3
    assert folder_state("faces", "metadata.jsonl") == states[-1]


def test_folders_with_a_list_are_offered(folder):
    from quanttune.host.images import image_folders

    lines(folder, *THREE)
    for name in ("a.png", "b.png"):
        (folder / name).unlink()
    (folder.parent / "papers").mkdir()
    (folder.parent / "papers" / "a.pdf").write_text("no picture")
    assert image_folders()[2:] == ["faces"]


def test_the_command_line_passes_column_and_limit_on(folder, tmp_path):
    from quanttune.host.command import images_of, read_config

    lines(folder, *[{"file_name": r["file_name"], "en": r["text"]} for r in THREE])
    config = tmp_path / "config.toml"
    config.write_text('[base]\n[output]\n[images]\nfolder = "faces"\ncaptions = "metadata.jsonl"\n'
                      'caption_column = "en"\nlimit = 2\nresolution = 64\n')
    assert images_of(read_config(config)).captions == ("the third", "one")
