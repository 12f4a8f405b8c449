"""Reports as files: well-formed pages, links that lead somewhere, nothing half-written."""

import base64
import errno
import os
import re
from html.parser import HTMLParser
from io import BytesIO
from urllib.parse import unquote

import pytest
from PIL import Image

from quanttune.metrics.report import Attachment, Picture, Report, Section, save_report
from quanttune.quant import QuantTuneError

VOID = {"meta", "br", "img"}
HOSTILE = '</title></style><script>alert("1")</script><img src=x onerror=alert(1)> & \' "'
TABLE = "| model | MiB |\n|---|---|\n| float | 12.5 |\n| <b>4 | bits | 3.1 |\n| a\\|b | 1 |"


class Page(HTMLParser):
    """Reads a page; fails on tags that are not closed, in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.rows = [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if set(self.open) & {"td", "th"}:
            self.rows[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def picture(colour, size=(40, 30)):
    return Image.new("RGB", size, colour)


def report(**changes):
    return Report(**{
        "title": "Precisions", "note": "Why: to see.", "facts": "today · here",
        "sections": [Section("Cost", "In turns.\n\n" + TABLE, [Picture(picture("red"), "Time")]),
                     Section("", "Plain.", [Picture(picture("blue", (900, 20)), "Heat map"),
                                            Picture(picture("green"))])],
        "attachments": [Attachment("bench mark.csv", "a,b\n1,2\n"),
                        Attachment("../../x.csv", "x"), Attachment("X.csv", "y")], **changes})


def test_the_page_is_whole(tmp_path):
    path, = save_report(report(), tmp_path / "r", "HTML")
    text = path.read_text("utf-8")
    page = Page(text)
    assert path.name == "r.html" and os.listdir(tmp_path) == ["r.html"]
    assert page.rows == [["model", "MiB"], ["float", "12.5"], ["<b>4", "bits"], ["a|b", "1"]]
    sizes = []
    for image in page.all("img"):
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        opened = Image.open(BytesIO(base64.b64decode(data, validate=True)))
        opened.load()
        sizes.append(opened.size)
        assert (int(image["width"]), int(image["height"])) == opened.size
    assert sizes == [(40, 30), (900, 20), (40, 30)]
    assert [i["alt"] for i in page.all("img")] == ["Time", "Heat map", ""]
    assert len(page.all("figcaption")) == 2
    told = report(sections=[Section("Cost", "", [Picture(picture("red"), "Cost")])]).html()
    assert not Page(told).all("figcaption"), "the heading has said it"
    files = {a["download"]: base64.b64decode(a["href"].split(",")[1]) for a in page.all("a")
             if "download" in a}
    assert files == {"bench-mark.csv": b"a,b\n1,2\n", "x.csv": b"x", "x-2.csv": b"y"}


def test_the_page_needs_nothing_but_itself():
    text = report(title=HOSTILE, note=HOSTILE).html()
    page = Page(text)
    assert not re.search(r"https?:|@import|url\(", text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "prefers-color-scheme: dark" in text
    assert any(m.get("name") == "viewport" for m in page.all("meta"))


def test_hostile_texts_are_shown_and_do_nothing():
    cell = "| " + HOSTILE.replace("|", "") + " |\n|---|\n| " + HOSTILE + " |"
    page = Page(report(
        title=HOSTILE, facts=HOSTILE, note=HOSTILE,
        sections=[Section(HOSTILE, f"{HOSTILE}\n\n{cell}",
                          [Picture(picture("red"), HOSTILE + "!")])],
        attachments=[Attachment(HOSTILE, HOSTILE)]).html())
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    # Title, heading, facts, note, section's heading, its text, two cells, caption.
    assert page.text.count(HOSTILE) == 9
    assert [i["alt"] for i in page.all("img")] == [HOSTILE + "!"]


def test_odd_characters_do_not_stop_it(tmp_path):
    odd = "\ud800\x00 \u202e中文 ✓"
    for path in save_report(report(title=odd, attachments=[Attachment(odd, odd)]), tmp_path / "r"):
        assert "中文 ✓" in path.read_text("utf-8")


def test_markdown_leads_to_its_files(tmp_path):
    base = tmp_path / "my (réport)_00001_"
    path, = save_report(report(title="A *bold* <title>"), base, "Markdown")
    text = path.read_text("utf-8")
    assert text.startswith("# A \\*bold\\* &lt;title&gt;\n")
    links = [unquote(link) for link in re.findall(r"\]\(([^)]*)\)", text)]
    assert len(links) == len(set(links)) == 6
    for link in links:
        assert (tmp_path / link).is_file()
    folder = tmp_path / "my (réport)_00001_files"
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, folder.name])
    assert len(os.listdir(folder)) == 6
    assert Image.open(folder / "02-heat-map.png").size == (900, 20)
    assert (folder / "bench-mark.csv").read_text() == "a,b\n1,2\n"


def test_again_replaces_all_of_it(tmp_path):
    save_report(report(), tmp_path / "r")
    both = save_report(report(sections=[Section("Other", "", [Picture(picture("red"), "New")])],
                              attachments=[]), tmp_path / "r")
    assert [p.name for p in both] == ["r.html", "r.md"]
    assert sorted(os.listdir(tmp_path)) == ["r.html", "r.md", "r_files"]
    assert os.listdir(tmp_path / "r_files") == ["01-new.png"]
    save_report(Report("No pictures"), tmp_path / "r")
    assert sorted(os.listdir(tmp_path)) == ["r.html", "r.md"]


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("before", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("format", ["HTML", "Markdown", "both"])
@pytest.mark.parametrize("call,number", [("fsync", 1), ("fsync", 5), ("fsync", -1), ("replace", 1),
                                         ("replace", -1), ("replace", -2)])
@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()],
                         ids=["full", "interrupt"])
def test_a_fault_leaves_nothing_half_written(tmp_path, monkeypatch, before, format, call, number,
                                             fault):
    """At the given call of the system, counted from the first or from the last."""
    new = report(title="New")
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        if before:
            save_report(report(), folder / "r", format)
    kept, real, calls = content(tmp_path / "a"), getattr(os, call), []

    def counting(*args):
        calls.append(args)
        if len(calls) == fails:
            raise fault
        return real(*args)

    monkeypatch.setattr(os, call, counting)
    fails = None
    save_report(new, tmp_path / "b" / "r", format)
    fails = min(number, len(calls)) if number > 0 else max(1, len(calls) + 1 + number)
    calls.clear()
    with pytest.raises(QuantTuneError if isinstance(fault, OSError) else KeyboardInterrupt):
        save_report(new, tmp_path / "a" / "r", format)
    monkeypatch.undo()
    left = content(tmp_path / "a")
    assert not [name for name in left if ".tmp" in name or ".old" in name]
    # Of both, each page is whole: the new one or the one before.
    done = content(tmp_path / "b")
    for pages in (["r.html"], ["r.md", *(n for n in {*kept, *done} if n.startswith("r_files"))]):
        own = {n: left[n] for n in pages if n in left}
        assert own in ({n: kept[n] for n in pages if n in kept},
                       {n: done[n] for n in pages if n in done})
    if not before:
        assert left == {}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("format", ["HTML", "Markdown"])
def test_a_full_disk(tmp_path, monkeypatch, format):
    real_open = open
    monkeypatch.setattr(
        "builtins.open", lambda name, mode="r": real_open("/dev/full", mode.replace("x", "w")))
    with pytest.raises(QuantTuneError, match="disk is full") as caught:
        save_report(report(), tmp_path / "new" / "r", format)
    monkeypatch.undo()
    assert "r" in str(caught.value) and "\n" not in str(caught.value)
    assert content(tmp_path) == {}


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(QuantTuneError, match="could not be written"):
        save_report(report(), tmp_path / "file" / "r")
    assert os.listdir(tmp_path) == ["file"]


def test_its_text():
    text = report().text()
    assert text.startswith("Precisions\n\nWhy: to see.\n\n## Cost\n\nIn turns.")
    assert text.endswith("Plain.")
