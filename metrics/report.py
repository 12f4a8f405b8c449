"""Reports: text, tables, pictures and files, written as one HTML page or as Markdown."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from ..quant.whole_file import unwritten, written_whole
from .markdown import blocks, escape, one_line, printable, to_markdown
from .report_page import page

HTML, MARKDOWN, BOTH = "HTML", "Markdown", "both"
FORMATS = (HTML, MARKDOWN, BOTH)


@dataclass(frozen=True)
class Picture:
    """A picture of a report.

    Attributes:
        image: the picture; it is written as PNG.
        caption: what it shows; also read out in its place.
    """

    image: Image.Image
    caption: str = ""

    def png(self) -> bytes:
        """The bytes of its file."""
        buffer = BytesIO()
        self.image.convert("RGB").save(buffer, format="png", optimize=True)
        return buffer.getvalue()


@dataclass(frozen=True)
class Attachment:
    """A file that belongs to a report, such as a table for a spreadsheet.

    Attributes:
        name: of the file; made harmless when it is written.
        content: of the file, in UTF-8.
    """

    name: str
    content: str


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        heading: in one line, or "" for none.
        text: Markdown, as our nodes print it (see `markdown.blocks`).
        pictures: below the text.
    """

    heading: str
    text: str = ""
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Report:
    """What to write.

    Attributes:
        title: in one line.
        note: Markdown above everything else.
        facts: a line below the title: when, where and with what it was measured.
        sections: in order.
        attachments: the files that belong to it.
    """

    title: str
    note: str = ""
    facts: str = ""
    sections: Sequence[Section] = field(default_factory=tuple)
    attachments: Sequence[Attachment] = ()

    def text(self) -> str:
        """All of its text, for where there are no pictures."""
        parts = [self.title, self.note]
        for section in self.sections:
            parts += [section.heading and f"## {section.heading}", section.text]
        return "\n\n".join(p for p in (part.strip() for part in parts) if p)

    def html(self) -> str:
        """One page that needs nothing but itself: pictures and files are inside."""
        return page(self, [(name, printable(attachment.content).encode())
                           for name, attachment in zip(self._names(), self.attachments)])

    def markdown(self, folder: str) -> tuple[str, dict[str, bytes]]:
        """The Markdown, and name to content of the files it expects in ``folder`` beside it."""
        files: dict[str, bytes] = {}
        base = quote(folder)
        parts = [f"# {escape(one_line(self.title))}", escape(one_line(self.facts)),
                 to_markdown(blocks(self.note), 1)]
        for section in self.sections:
            if section.heading:
                parts.append(f"## {escape(one_line(section.heading))}")
            parts.append(to_markdown(blocks(section.text)))
            for picture in section.pictures:
                name = f"{len(files) + 1:02}-{_plain(picture.caption or section.heading)}.png"
                files[name] = picture.png()
                parts.append(f"![{escape(one_line(picture.caption))}]({base}/{quote(name)})")
        links = []
        for name, attachment in zip(self._names(), self.attachments):
            files[name] = printable(attachment.content).encode()
            links.append(f"- [{escape(name)}]({base}/{quote(name)})")
        if links:
            parts += ["## Files", "\n".join(links)]
        return "\n\n".join(p for p in parts if p) + "\n", files

    def _names(self) -> list[str]:
        """Of the attachments: harmless in any file system, and no two alike."""
        found: list[str] = []
        for attachment in self.attachments:
            stem, suffix = os.path.splitext(os.path.basename(attachment.name))
            stem, suffix = _plain(stem, "file"), re.sub(r"[^.a-z0-9]", "", suffix.lower())[:8]
            name, number = stem + suffix, 2
            while name in found:
                name, number = f"{stem}-{number}{suffix}", number + 1
            found.append(name)
        return found


def _plain(text: str, otherwise: str = "picture") -> str:
    """A short name of letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or otherwise


def save_report(report: Report, base: str | os.PathLike[str], format: str = BOTH) -> list[Path]:
    """Write a report to ``base`` with .html or .md added; what was there of it is replaced.

    Markdown's pictures and files go to ``<name>_files`` beside it. On an error, an interrupt or a
    full disk nothing half-written is left: each page is the new one or the one before, whole.

    Returns:
        Paths of the pages, the HTML one first.

    Raises:
        QuantTuneError: they cannot be written.
    """
    base = Path(base)
    paths = [base.with_name(f"{base.name}.{suffix}")
             for suffix, formats in (("html", (HTML, BOTH)), ("md", (MARKDOWN, BOTH)))
             if format in formats]
    # A name that ends in "_", as the host's savers make them, gives only one to the folder.
    folder = base.with_name(f"{base.name.rstrip('_')}_files")
    # Not pathlib's, which raises for a name that is too long.
    new = [path for path in paths if not os.path.exists(path)]
    # All of it before any of it is written: only the disk can fail then.
    page_text = report.html().encode() if format in (HTML, BOTH) else b""
    text, files = report.markdown(folder.name) if format in (MARKDOWN, BOTH) else ("", {})
    try:
        for path in paths:
            if path.suffix == ".html":
                with written_whole(path, len(page_text)) as file:
                    file.write(page_text)
            else:
                _write_with_folder(path, text.encode(), folder, files)
    except BaseException:
        for path in new:
            with suppress(OSError):
                path.unlink()
        raise
    return paths


def _write_with_folder(path: Path, text: bytes, folder: Path, files: dict[str, bytes]) -> None:
    """Write a file and the folder that belongs to it, or neither."""
    mark = secrets.token_hex(4)
    fresh, aside = (folder.with_name(f"{folder.name}.{mark}.{kind}") for kind in ("tmp", "old"))
    placed = False
    try:
        for name, content in files.items():
            with written_whole(fresh / name, len(content)) as file:
                file.write(content)
        with written_whole(path, len(text)) as file:
            file.write(text)
            if os.path.exists(folder):
                os.replace(folder, aside)
            if files:
                os.replace(fresh, folder)
                placed = True
    except BaseException as error:
        if placed:
            shutil.rmtree(folder, ignore_errors=True)
        if os.path.exists(aside):
            with suppress(OSError):
                os.replace(aside, folder)
        shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(error, OSError):
            raise unwritten(folder, error) from error
        raise
    if aside.is_file():
        aside.unlink()
    shutil.rmtree(aside, ignore_errors=True)
