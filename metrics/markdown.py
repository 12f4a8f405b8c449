"""The little Markdown that our reports are made of: tables, lists, headings, code, paragraphs.

What nodes print is read into blocks, which are written as HTML or as Markdown in which nothing of
the text can become markup by accident.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_CELL = re.compile(r"(?<!\\)\|")
_RULE = re.compile(r"\|?[ ]*:?-+:?[ ]*(\|[ ]*:?-+:?[ ]*)*\|?")
_HEADING = re.compile(r"(#{1,6})[ ]+(.*)")
_ITEM = re.compile(r"[-*][ ]+(.*)")
_NUMBERED = re.compile(r"\d{1,9}[.)][ ]+(.*)")
_NUMBER = re.compile(
    r"[-+−]?(\d[\d,]*(\.\d+)?|\.\d+)(e[-+]?\d+)?([ ]?(%|x|×|MiB|GiB|s|ms))?|nan|inf|[-–]|", re.I)
_FENCE = re.compile(r"`{3,}[^`]*")
_INLINE = re.compile(r"`([^`\n]+)`|\*\*([^*\n]+)\*\*")
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Block:
    """A piece of a text.

    Attributes:
        kind: "heading", "paragraph", "list", "numbered", "code" or "table".
        lines: of the text; a heading has one, a list one an item, a table none.
        rows: cells of a table, its header first, all of one length; else empty.
        level: of a heading, from 1.
    """

    kind: str
    lines: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    level: int = 0


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; bars and line ends in cells are taken care of."""
    lines = ["| " + " | ".join(map(_cell, columns)) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def printable(text: str) -> str:
    """Without characters that neither HTML nor a UTF-8 file can hold."""
    return _UNSEEN.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def one_line(text: str) -> str:
    """Printable text with every run of blanks and line ends as one blank."""
    return " ".join(printable(text).split())


def blocks(text: str) -> list[Block]:
    """Read a text. Lines stay lines, since that is how nodes print; columns that are aligned by
    blanks become a table, or code where their number changes."""
    found: list[Block] = []
    lines = printable(text).expandtabs(4).split("\n")
    at = 0
    while at < len(lines):
        line = lines[at].strip()
        if not line:
            at += 1
        elif _FENCE.fullmatch(line):
            end = next((i for i in range(at + 1, len(lines)) if lines[i].strip() == "```"),
                       len(lines))
            found.append(Block("code", tuple(lines[at + 1:end])))
            at = end + 1
        elif _starts_table(lines, at):
            end = _while(lines, at + 2, lambda t: t.startswith("|"))
            found.append(_table([lines[at], *lines[at + 2:end]]))
            at = end
        elif heading := _HEADING.fullmatch(line):
            found.append(Block("heading", (heading[2],), level=len(heading[1])))
            at += 1
        elif pattern := next((p for p in (_ITEM, _NUMBERED) if p.fullmatch(line)), None):
            end = _while(lines, at, pattern.fullmatch)
            items = tuple(pattern.fullmatch(t.strip())[1] for t in lines[at:end])
            found.append(Block("list" if pattern is _ITEM else "numbered", items))
            at = end
        else:
            end = at + 1
            while end < len(lines) and not _starts_another(lines, end):
                end += 1
            found += _plain([t.rstrip() for t in lines[at:end]])
            at = end
    return found


def _plain(lines: list[str]) -> list[Block]:
    """A paragraph, or what is aligned by blanks."""
    rows = [tuple(re.split(r" {2,}", line.strip())) for line in lines]
    if sum(len(row) > 1 for row in rows) < 2:
        return [Block("paragraph", tuple(line.strip() for line in lines))]
    alike = next((i for i, row in enumerate(rows) if len(row) != len(rows[0])), len(rows))
    if alike < 2 or any(len(row) > 1 for row in rows[alike:]):
        return [Block("code", tuple(lines))]
    rest = tuple(line.strip() for line in lines[alike:])
    return [Block("table", rows=tuple(rows[:alike])), *([Block("paragraph", rest)] if rest else [])]


def _while(lines: Sequence[str], at: int, good) -> int:
    while at < len(lines) and good(lines[at].strip()):
        at += 1
    return at


def _starts_table(lines: Sequence[str], at: int) -> bool:
    return (lines[at].strip().startswith("|") and at + 1 < len(lines)
            and _RULE.fullmatch(lines[at + 1].strip()) is not None)


def _starts_another(lines: Sequence[str], at: int) -> bool:
    line = lines[at].strip()
    return (not line or _FENCE.fullmatch(line) is not None or _starts_table(lines, at)
            or any(p.fullmatch(line) for p in (_HEADING, _ITEM, _NUMBERED)))


def _table(lines: Sequence[str]) -> Block:
    rows = []
    for line in lines:
        line = line.strip().removeprefix("|")
        cells = [c.strip().replace("\\|", "|") for c in _CELL.split(line)]
        rows.append(cells[:-1] if line.endswith("|") and not cells[-1] else cells)
    width = len(rows[0])
    return Block("table", rows=tuple(tuple((row + [""] * width)[:width]) for row in rows))


def numeric(rows: Sequence[Sequence[str]], column: int) -> bool:
    """Whether a table's column, its header aside, holds numbers and at least one of them."""
    cells = [row[column] for row in rows[1:]]
    return any(cells) and all(_NUMBER.fullmatch(cell) for cell in cells)


def to_html(found: Iterable[Block], above: int = 2) -> str:
    """Blocks as HTML, all of their text escaped; ``above`` is the level of the heading that they
    stand under."""
    return "\n".join(_html(block, above) for block in found)


def _html(block: Block, above: int) -> str:
    if block.kind == "table":
        right = [' class="n"' if numeric(block.rows, i) else "" for i in range(len(block.rows[0]))]
        head = "".join(f'<th scope="col"{r}>{inline_html(c)}</th>'
                       for c, r in zip(block.rows[0], right))
        body = "\n".join("<tr>" + "".join(f"<td{r}>{inline_html(c)}</td>"
                                          for c, r in zip(row, right)) + "</tr>"
                         for row in block.rows[1:])
        return (f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n'
                f"<tbody>\n{body}\n</tbody>\n</table></div>")
    if block.kind == "code":
        return f"<pre>{html.escape(chr(10).join(block.lines))}</pre>"
    if block.kind == "heading":
        level = min(above + block.level, 6)
        return f"<h{level}>{inline_html(block.lines[0])}</h{level}>"
    if block.kind in ("list", "numbered"):
        tag = "ul" if block.kind == "list" else "ol"
        return f"<{tag}>" + "".join(f"<li>{inline_html(t)}</li>" for t in block.lines) + f"</{tag}>"
    return "<p>" + "<br>\n".join(map(inline_html, block.lines)) + "</p>"


def inline_html(text: str) -> str:
    """A line of text, escaped, with its `code` and **bold**."""
    parts, at = [], 0
    for mark in _INLINE.finditer(text):
        parts.append(html.escape(text[at:mark.start()]))
        tag, inside = ("code", mark[1]) if mark[1] is not None else ("strong", mark[2])
        parts.append(f"<{tag}>{html.escape(inside)}</{tag}>")
        at = mark.end()
    return "".join([*parts, html.escape(text[at:])])


def to_markdown(found: Iterable[Block], above: int = 2) -> str:
    """Blocks as Markdown that shows the same anywhere."""
    return "\n\n".join(_markdown(block, above) for block in found)


def _markdown(block: Block, above: int) -> str:
    if block.kind == "table":
        head, *body = ([inline_markdown(c).replace("|", "\\|") for c in row] for row in block.rows)
        rules = ["--:" if numeric(block.rows, i) else "---" for i in range(len(head))]
        return "\n".join("| " + " | ".join(row) + " |" for row in (head, rules, *body))
    if block.kind == "code":
        # A fence longer than any in the text.
        longest = max((len(run) for t in block.lines for run in re.findall("`+", t)), default=0)
        fence = "`" * max(3, longest + 1)
        return "\n".join((fence, *block.lines, fence))
    if block.kind == "heading":
        return "#" * min(above + block.level, 6) + " " + inline_markdown(block.lines[0])
    if block.kind == "list":
        return "\n".join(f"- {_line(t)}" for t in block.lines)
    if block.kind == "numbered":
        return "\n".join(f"{i}. {_line(t)}" for i, t in enumerate(block.lines, 1))
    # Two blanks keep a line's end.
    return "  \n".join(map(_line, block.lines))


def inline_markdown(text: str) -> str:
    """A line of text in which only `code` and **bold** are markup."""
    parts, at = [], 0
    for mark in _INLINE.finditer(text):
        parts += [escape(text[at:mark.start()]),
                  mark[0] if mark[1] is not None else f"**{escape(mark[2])}**"]
        at = mark.end()
    return "".join([*parts, escape(text[at:])])


def _line(text: str) -> str:
    """A line that begins no heading, list or table, whatever its first characters."""
    line = re.sub(r"^([-+#=|])", r"\\\1", inline_markdown(text))
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)


def escape(text: str) -> str:
    """A text for Markdown, in which none of it is markup."""
    # Underscores between letters are none, and layers' names are full of them.
    text = re.sub(r"([\\`*~$\[\]])|(?<!\w)_|_(?!\w)", lambda m: "\\" + m[0], text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
