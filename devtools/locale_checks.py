"""What can be wrong with a translation that a program can see, text by text.

Numbers, names of files, programs and choices have to be in it unchanged; names of nodes and inputs
as the same language shows them; words of the glossary as `docs/translating.md` spells them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .locales import Place

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "translating.md"
SAME = frozenset({"alpha", "cfg", "FID", "IS", "KID", "LPIPS", "PSNR", "SSIM", "QuantTune"})
"""Names that are the same in every language."""

# What is in quotation marks, but not what is between the apostrophes of two possessives.
_QUOTED = re.compile(r"(?<!\w)'([^']+)'(?!\w)")
_SETTING = re.compile(r"\b(\w+) = '?([^,;:]*)")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
# What else than its figures may be a figure in a translation of a text.
_IN_WORDS = {
    "1": "an? one once single first each every times",
    "2": "two both second half twice",
    "3": "three third",
    "4": "four quarter",
    "5": "five",
    "8": "eight eighth",
    "10": "ten",
}
_WORD = re.compile(r"\.?[A-Za-z0-9][\w./\-]*", re.ASCII)
_CODE = re.compile(r"[_/\d]|\w\.\w|^\.\w|[A-Za-z0-9-][A-Z]", re.ASCII)
_PLAIN = re.compile(r"\d+-bit|[\d.\-]+", re.ASCII)
_MARKED = re.compile(r"[“「]([^”」]*)[”」]")
_KANA = re.compile(r"[぀-ヿ]")
_HAN = re.compile(r"[一-鿿]")
# The frontend reads names and descriptions as messages of vue-i18n, in which these have a meaning.
_MESSAGE_SYNTAX = re.compile(r"[{}@|]")
# What our own scripts draw is no such message, and has places that they fill.
_FILLED = re.compile(r"\{[^}]*\}?")


def tables(page: str) -> dict[str, list[dict[str, str]]]:
    """The tables of a Markdown page by the heading above each; a row is a dict by column name."""
    found: dict[str, list[dict[str, str]]] = {}
    heading, columns = "", None
    for line in page.splitlines():
        if line.startswith("#"):
            heading, columns = line.lstrip("# "), None
        elif not line.startswith("|"):
            columns = None
        else:
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if columns is None:
                columns = cells
            elif set(line) - set("|-: "):
                found.setdefault(heading, []).append(dict(zip(columns, cells)))
    return found


def guide(path: Path = GUIDE) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The two tables of the translators' guide: the glossary, and nodes of ComfyUI's own."""
    found = tables(path.read_text("utf-8"))
    return found["Glossary"], found["Nodes of ComfyUI"]


def code_words(text: str) -> Counter:
    """Words of an English text that no language changes: files, folders, formats, programs."""
    words = (
        word.rstrip("./-") if "/" not in word else word.rstrip(".-") for word in _WORD.findall(text)
    )
    words = (re.sub(r"(?<=[A-Z])s$", "", word) for word in words)
    return Counter(w for w in words if _CODE.search(w) and not _PLAIN.fullmatch(w))


class _Names:
    """How a language calls nodes, inputs and outputs, and which choices the inputs have."""

    def __init__(
        self,
        language: str,
        english: Mapping[Place, str],
        translated: Mapping[Place, str],
        schemas: Iterable[Any],
        host: Iterable[Mapping[str, str]],
    ):
        self.nodes = {row["English"]: row[language] for row in host}
        self.labels: dict[str, set[str]] = {}
        self.own: dict[tuple[str, str], str] = {}
        for path, text in english.items():
            label = translated.get(path)
            if label and path[-1] == "display_name":
                self.nodes[text] = label
            elif label and path[-1] == "name":
                self.labels.setdefault(text, set()).add(label)
                self.own[path[1], text] = label
        self.choices = {
            (s.node_id, e.id): [str(c) for c in getattr(e, "options", None) or ()]
            for s in schemas
            for e in s.inputs
        }

    def label(self, node: str, name: str) -> set[str]:
        """What an input or output of that English name may be called in a text of `node`."""
        own = self.own.get((node, name))
        return {own} if own else self.labels.get(name, set())

    def expected(self, path: Place, text: str) -> Iterator[set[str]]:
        """For each name or choice in an English text: the translations of which one has to be."""
        node, choices = path[1], self.choices.get((path[1], path[3] if path[3:] else ""), ())
        for name, value in _SETTING.findall(text):
            if labels := self.label(node, name):
                yield labels
                fitting = [c for c in self.choices.get((node, name), ()) if value.startswith(c)]
                if fitting:
                    yield {max(fitting, key=len)}
        for quoted in _QUOTED.findall(text):
            if quoted in choices:
                yield {quoted}
            elif quoted in self.nodes:
                yield {self.nodes[quoted]}
            else:
                yield self.label(node, quoted) or {quoted}
        rest = _QUOTED.sub(" ", text)
        for name in _WORD.findall(rest):
            if "_" in name and (labels := self.label(node, name)):
                yield labels
        for name, label in self.nodes.items():
            if re.search(rf"\b{re.escape(name)}(?!\w)", rest):
                yield {label}

    def known(self, text: str) -> set[str]:
        """What the translation of an English text may have in quotation marks."""
        labels = set().union(*self.labels.values()) if self.labels else set()
        return {*self.nodes.values(), *labels, *_QUOTED.findall(text)}

    def unchanged(self, node: str, text: str) -> Counter:
        """Words of an English text that have to be in its translation as they are."""
        rest = _QUOTED.sub(" ", text)
        for name in self.nodes:
            rest = rest.replace(name, " ")
        words = code_words(rest)
        return Counter({w: n for w, n in words.items() if not self.label(node, w)})


def _in_words(number: str, text: str) -> bool:
    """Whether an English text has a number in letters."""
    words = _IN_WORDS.get(number, "").replace(" ", "|")
    return bool(words and re.search(rf"\b(?:{words})\b", text, re.IGNORECASE))


def _of_text(
    language: str,
    path: Place,
    text: str,
    other: str,
    names: _Names,
    glossary: Iterable[Mapping[str, str]],
) -> Iterator[str]:
    sentence = path[-1] in ("tooltip", "description")
    if not other or other != other.strip():
        yield "is empty, or begins or ends with a space"
        return
    if path[1] == "quanttune":
        if Counter(_FILLED.findall(text)) != Counter(_FILLED.findall(other)):
            yield f"has other places to fill than {_FILLED.findall(text)}"
    elif _MESSAGE_SYNTAX.search(other):
        yield "has one of { } @ |, which the frontend would read as an instruction"
    if other == text and text not in SAME:
        yield f"is still English: {text!r}"
        return
    if sentence and not (_HAN if language == "zh" else _KANA).search(other):
        yield "is not in its language"
    if language == "zh" and _KANA.search(other):
        yield "has Japanese letters"
    if not sentence:
        return
    if text.endswith(".") != other.endswith("。"):
        yield "does not end as the English does"
    if "'" in other or '"' in other:
        yield "has English quotation marks"
    for mark in "*`<>#…":
        if text.count(mark) != other.count(mark):
            yield f"has not as many {mark} as the English"
    numbers, others = Counter(_NUMBER.findall(text)), Counter(_NUMBER.findall(other))
    if numbers - others or not all(_in_words(n, text) for n in others - numbers):
        yield f"has other numbers than {_NUMBER.findall(text)}"
    for quoted in _MARKED.findall(other):
        if quoted not in names.known(text):
            yield f"quotes {quoted}, which is neither in the English nor a name"
    for labels in names.expected(path, text):
        if not any(label in other for label in labels):
            yield f"does not say {' or '.join(sorted(labels))}"
    for word in names.unchanged(path[1], text):
        if word not in other:
            yield f"does not have {word} as it is"
    for row in glossary:
        term = rf"(?<![\w/-])(?:{row['English'].replace(' / ', '|')})"
        if re.search(term, _QUOTED.sub(" ", text), re.IGNORECASE):
            if not any(word in other for word in row[language].split(" / ")):
                yield f"does not call {row['English']} {row[language]}"
        for wrong in filter(None, row[f"not in {language}"].split(" / ")):
            if wrong in other:
                yield f"says {wrong} for {row[language]}"


def problems(
    language: str,
    english: Mapping[Place, str],
    translated: Mapping[Place, str],
    schemas: Iterable[Any],
    guide_file: Path = GUIDE,
) -> list[str]:
    """A line for everything wrong with the texts that are there (and for those that no node has).

    Args:
        language: a column of the guide's tables.
        english: the English texts by path, as `locales.read` gives them.
        translated: the texts of the language in the same way; those that lack are not told.
        schemas: V3 schemas of the nodes, for the choices of their inputs.
        guide_file: the translators' guide.
    """
    glossary, host = guide(guide_file)
    names = _Names(language, english, translated, schemas, host)
    lines = [
        f"{language} has {'.'.join(p)}, which nothing reads" for p in translated if p not in english
    ]
    for path, text in english.items():
        if path in translated:
            for what in _of_text(language, path, text, translated[path], names, glossary):
                lines.append(f"{language} {'.'.join(path)} {what}")
    return lines
