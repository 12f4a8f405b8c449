"""Keep `locales/` in step with the nodes: English is written, what other languages miss is told.

    python dev.py python -m quanttune.devtools.locales

ComfyUI sends `locales/<language>/nodeDefs.json` and `main.json` of every pack to its frontend,
which looks texts up by node id, input id and number of the output, and falls back to English.
English here is made from the schemas of the nodes, which stay the only place to write it. A
translation whose English has changed is taken out: it can be missing, but never out of date.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "locales"
SCRIPTS = ROOT / "web" / "js"
LANGUAGES = ("zh", "ja")
"""What the nodes are translated to, as ComfyUI's setting `Comfy.Locale` calls it."""
FILES = ("nodeDefs", "main")

Place = tuple[str, ...]
"""Keys on the way to a text, the file's name first."""


def drawn_words(scripts: Path = SCRIPTS) -> list[str]:
    """What the frontend's scripts of ours draw: the texts in their calls of `word`."""
    call = re.compile(r'\bword\(\s*"((?:[^"\\]|\\.)*)"')
    found = {
        json.loads(f'"{text}"')
        for path in sorted(scripts.glob("*.js"))
        for text in call.findall(path.read_text("utf-8"))
    }
    return sorted(found)


def english(schemas: Iterable[Any], words: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Both files' contents in English, by file name.

    Args:
        schemas: the V3 schemas of all nodes. An output of the name of its type (MODEL) gets no
            name: ComfyUI translates types itself.
        words: further texts of ours; they are looked up by themselves.
    """
    nodes, categories = {}, set()
    for schema in sorted(schemas, key=lambda s: s.node_id):
        inputs, outputs = {}, {}
        for entry in schema.inputs:
            name = getattr(entry, "display_name", None) or entry.id
            inputs[entry.id.replace(".", "_")] = {"name": name, "tooltip": entry.tooltip}
        for place, entry in enumerate(schema.outputs):
            name = entry.display_name or entry.id
            named = {} if name == entry.get_io_type() else {"name": name}
            outputs[str(place)] = {**named, "tooltip": entry.tooltip}
        nodes[schema.node_id.replace(".", "_")] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": inputs,
            "outputs": outputs,
        }
        categories.update(schema.category.split("/"))
    main = {"nodeCategories": {c: c for c in sorted(categories)}}
    return {"nodeDefs": nodes, "main": {**main, "quanttune": {w: w for w in words}}}


def flat(tree: Mapping[str, Any], above: Place = ()) -> dict[Place, Any]:
    """A tree of mappings as one mapping from the path of keys to the leaf, without empty ones."""
    leaves: dict[Place, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves.update(flat(value, (*above, key)))
        elif value is not None:
            leaves[(*above, key)] = value
    return leaves


def deep(leaves: Mapping[Place, Any]) -> dict[str, Any]:
    """The tree of which `flat` makes these leaves."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = value
    return tree


def read(language: str, folder: Path = FOLDER) -> dict[Place, Any]:
    """All texts of a language by path, the file's name first; nothing where there is no file."""
    tree = {}
    for name in FILES:
        path = folder / language / f"{name}.json"
        tree[name] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return flat(tree)


def write(language: str, leaves: Mapping[Place, Any], folder: Path = FOLDER) -> None:
    """Write all texts of a language, in the order in which they are given."""
    for name, tree in {**dict.fromkeys(FILES, {}), **deep(leaves)}.items():
        path = folder / language / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(tree, ensure_ascii=False, indent=2) + "\n"
        if not path.is_file() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8", newline="\n")


def updated(
    new: Mapping[Place, str], old: Mapping[Place, str], translated: Mapping[Place, str]
) -> dict[Place, str]:
    """The translations that still hold when English went from `old` to `new`, in its order.

    A text that is new at its place takes the translation that the same English has for the same
    kind of text (a name, a tooltip) elsewhere, if there is one and only one.
    """
    kept = {p: translated[p] for p, text in new.items() if p in translated and old.get(p) == text}
    known: dict[tuple[str, str], set[str]] = {}
    for path, text in kept.items():
        known.setdefault((path[-1], new[path]), set()).add(text)
    for path, text in new.items():
        same = known.get((path[-1], text), set())
        if path not in kept and len(same) == 1:
            kept[path] = next(iter(same))
    return {path: kept[path] for path in new if path in kept}


def update(schemas: Iterable[Any], folder: Path = FOLDER, words: Iterable[str] = ()) -> list[str]:
    """Bring all files up to date; returns a line for each text that a language lacks now.

    A line names the language and the path, and has the English and the former translation, if any.
    """
    new, old = flat(english(schemas, words)), read("en", folder)
    lines = []
    for language in LANGUAGES:
        before = read(language, folder)
        after = updated(new, old, before)
        for path in (p for p in new if p not in after):
            former = f" (was: {before[path]!r} for {old.get(path)!r})" if path in before else ""
            lines.append(f"{language} lacks {'.'.join(path)}: {new[path]!r}{former}")
        write(language, after, folder)
    write("en", new, folder)
    return lines


def pack_schemas() -> list[Any]:
    """The V3 schema of every node of the pack; imports ComfyUI, on the CPU."""
    from comfy.cli_args import args

    args.cpu = True
    import quanttune

    async def listed() -> list[Any]:
        extension = await quanttune.comfy_entrypoint()
        await extension.on_load()
        return await extension.get_node_list()

    return [node.GET_SCHEMA() for node in asyncio.run(listed())]


def main() -> int:
    """Update the files, say what is missing or wrong, and answer 1 if anything is."""
    from .locale_checks import problems

    schemas = pack_schemas()
    lines = update(schemas, words=drawn_words())
    for language in LANGUAGES:
        lines += problems(language, read("en"), read(language), schemas)
    print("\n".join(lines) or f"locales/ is complete: en, {', '.join(LANGUAGES)}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
