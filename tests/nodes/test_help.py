"""Every node's help page: whole, true to its schema, with a picture and links that lead on."""

import re
from pathlib import Path

import pytest

from quanttune.tests.harness.inprocess import pack_nodes

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "web" / "docs"
HOME = "https://github.com/quanttune/ComfyUI-QuantTune/blob/main/"
LARGEST = 60_000  # bytes of a picture
RANGE = re.compile(r"(\w+_)(\w) … \1(\w)")


@pytest.fixture(scope="module")
def nodes(comfy_inprocess):
    return pack_nodes()


def section(page, name):
    """The text below the heading `name`, up to the next one; empty without it."""
    found = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def table(text):
    """Rows of the first table as lists of cells, its head first; empty without one."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("| ")), None)
    if start is None:
        return []
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [row for row in rows if set("".join(row)) - set("-: ")]


def named(cell):
    """Inputs that the first cell of a row speaks of: `steps, cfg`, or `model_b … model_d`."""
    names = set(re.findall(r"\w+", cell))
    for stem, first, last in RANGE.findall(cell):
        ends = sorted((ord(first), ord(last)))
        names |= {stem + chr(c) for c in range(ends[0], ends[1] + 1)}
    return names


def problems(page, title, inputs, outputs, folder=DOCS):
    """What a reader would miss, one sentence each; `inputs` and `outputs` are those they see."""
    found = []
    if not page.startswith(f"# {title}\n\n"):
        found.append(f"it does not begin with '# {title}'")
    rows = table(section(page, "Inputs"))
    if inputs and (not rows or rows[0] != ["input", "what it does", "typical"]):
        found.append("no table of inputs with what they do and typical values")
    told = set().union(*(named(row[0]) for row in rows[1:])) if rows else set()
    found += [f"the input {name} is not in the table" for name in inputs if name not in told]
    for row in rows[1:]:
        if len(row) != 3 or not all(row):
            found.append(f"the row of {row[0]} has an empty cell, or not three")
        if not named(row[0]) & set(inputs):
            found.append(f"there is no input {row[0]}")
    rows = table(section(page, "Outputs"))
    if not rows or rows[0][0] != "output":
        found.append("no table of outputs")
    listed = [row[0] for row in rows[1:]]
    found += [f"the output {name} is not in the table" for name in outputs if name not in listed]
    found += [f"there is no output {name}" for name in listed if name not in outputs]
    if not re.search(r"^Source: \S.{15,}", page, re.MULTILINE):
        found.append("no source")
    found += link_problems(page, folder)
    return found


def link_problems(page, folder):
    found = []
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    if not pictures:
        found.append("no picture")
    for name in pictures:
        path = folder / name
        if not path.is_file():
            found.append(f"the picture {name} is not there")
        elif not 500 < path.stat().st_size <= LARGEST:
            found.append(f"the picture {name} has {path.stat().st_size} bytes")
    for link in re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", page):
        # A link within the checkout would lead nowhere in the GUI's help panel.
        if not link.startswith("https://"):
            found.append(f"the link {link} does not work in the help panel")
        elif link.startswith(HOME) and not (ROOT / link[len(HOME) :].split("#")[0]).is_file():
            found.append(f"{link} is not in the repository")
    return found


def seen(entry):
    return entry.display_name or entry.id


def test_every_page_tells_all_of_its_node(nodes):
    found = {}
    for node_id, node in nodes.items():
        schema = node.GET_SCHEMA()
        page = (DOCS / f"{node_id}.md").read_text("utf-8")
        inputs = [entry.id for entry in schema.inputs]
        outputs = [seen(entry) for entry in schema.outputs]
        found[node_id] = problems(page, schema.display_name, inputs, outputs)
    assert {node_id: said for node_id, said in found.items() if said} == {}


def test_no_page_and_no_picture_is_left_over(nodes):
    assert {path.stem for path in DOCS.glob("*.md")} == set(nodes)
    assert {path.stem for path in (DOCS / "images").iterdir()} == set(nodes)


GOOD = """# Node

What it is.

![Node](images/node.webp)

## Inputs

| input | what it does | typical |
|---|---|---|
| model | what to change | MODEL |
| report_a … report_c | texts | not connected |

## Outputs

| output | what it is |
|---|---|
| MODEL | the same, changed |

Source: somebody's paper, section 3.
"""
INPUTS = ["model", "report_a", "report_b", "report_c"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "node.webp").write_bytes(bytes(1000))
    return tmp_path


def test_a_whole_page_has_no_problems(folder):
    assert problems(GOOD, "Node", INPUTS, ["MODEL"], folder) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# Node\n", "# Other\n"),
        ("![Node](images/node.webp)", ""),
        ("images/node.webp", "images/other.webp"),
        ("| model | what to change | MODEL |\n", ""),
        ("| model | what to change | MODEL |", "| model | what to change | |"),
        ("| typical |\n|---|---|---|", "|\n|---|---|"),
        ("report_c", "report_b"),
        ("| MODEL | the same, changed |", "| model | the same, changed |"),
        ("## Outputs", "## Results"),
        ("Source: somebody's paper", "From somebody's paper"),
        ("What it is.", "What [it](../../docs/int8.md) is."),
        ("What it is.", f"What [it]({HOME}docs/nothing.md) is."),
    ],
)
def test_what_is_missing_is_noticed(folder, old, new):
    assert old in GOOD
    assert problems(GOOD.replace(old, new), "Node", INPUTS, ["MODEL"], folder)


def test_a_picture_that_is_too_large_is_noticed(folder):
    (folder / "images" / "node.webp").write_bytes(bytes(LARGEST + 1))
    assert problems(GOOD, "Node", INPUTS, ["MODEL"], folder)
