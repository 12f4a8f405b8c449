"""How every template looks when it is opened: areas, colours, room, a note that tells the whole.

Only the files are read; `test_workflows.py` opens and runs them in the real frontend.
"""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest

from quanttune.tests.harness import docs_images
from quanttune.tests.workflows.wires import over_titles

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
FILES = sorted(FOLDER.glob("*.json"))
each_workflow = pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])

# One colour, one meaning, in all templates; the nodes of an area have its colour, too.
AREAS = {
    "#4f9bd1": "#335",  # blue: what goes in: models, words, sizes, pictures to learn from
    "#55b27a": "#353",  # green: what this pack does with it
    "#b07cc6": "#535",  # purple: pictures and how they are drawn
    "#4fb3b3": "#355",  # cyan: what was measured
}
# What an area is called after has one colour, too.
SUBJECTS = {
    r"keep|use|train|quantize|calibrate|scales|loras?|integers": "#55b27a",
    r"measure|lost|costs?|error|learnt|loses|report": "#4fb3b3",
    r"prompts?|models?": "#4f9bd1",
    r"same": "#b07cc6",
}
NOTE_COLOUR = "#653"
TITLE = 30  # height of the bar above a node's box
AREA_TITLE = 34  # of the bar within an area
NARROWEST = 225  # of a node in the frontend's "Nodes 2.0", which draws narrower ones as wide
# What nodes grow by when they have run: in "Nodes 2.0" a line with bits and size beside the pack's
# name, and while it draws a live preview, which the frontend leaves room for from then on.
GROWTH = {
    "QuantTuneLoadQuantizedUNet": 52,
    "QuantTuneLoadUpscaler": 52,
    "QuantTuneUpscale4x": 256,
}
PARTS = ("**What it does:**", "**What to change for your own:**", "**What it costs:**")
DURATION = r"\d+ (seconds|minutes)|[Ss]ome seconds|[Aa]bout a minute"
# A letter of a node's title, and what else its bar holds, in pixels.
TITLE_LETTER, TITLE_ROOM = 7.6, 42
# A line of the note's text is 68 letters in its 380 pixels, and 13 pixels high.
LINE_LETTERS, LINE_HEIGHT = 68, 13


def read(path):
    return json.loads(path.read_text("utf-8"))


def box(node):
    """[left, top, right, bottom] of a node, with its title, and as large as it becomes."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height + GROWTH.get(node["type"], 0)


def area_box(group, inside=False):
    x, y, width, height = group["bounding"]
    return x, y + (AREA_TITLE if inside else 0), x + width, y + height


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def within(a, b):
    return a[0] >= b[0] and a[1] >= b[1] and a[2] <= b[2] and a[3] <= b[3]


def problems(workflow):
    """What an artist would stumble over, one sentence each; empty for a good template."""
    found = []
    notes = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    nodes = [node for node in workflow["nodes"] if node["type"] != "MarkdownNote"]
    groups = workflow["groups"]
    if len(notes) != 1:
        return [f"{len(notes)} notes in place of one"]
    found += note_problems(notes[0])
    if any(slot["name"] == "run_name" for node in nodes for slot in node["inputs"]):
        own = notes[0]["widgets_values"][0].partition(PARTS[1])[2].partition(PARTS[2])[0]
        if "**run_name** of your own" not in own:  # one's own pictures would not go with the run
            found.append("the note does not say that a run of one's own wants a name of its own")
    if len(groups) < 3:
        found.append(f"only {len(groups)} areas")
    for number, group in enumerate(groups, start=1):
        if not re.match(rf"{number}\. \w", group.get("title") or ""):
            found.append(f"area {group.get('title')!r} is not numbered {number}")
        if group.get("color") not in AREAS:
            found.append(f"area {group.get('title')!r} has the colour {group.get('color')}")
    for node in nodes:
        name = f"{node.get('title') or node['type']} ({node['id']})"
        if node["size"][0] < NARROWEST:
            found.append(f"{name} is narrower than {NARROWEST} pixels")
        at = [group for group in groups if overlap(box(node), area_box(group))]
        if len(at) != 1:
            found.append(f"{name} touches {len(at)} areas")
        elif not within(box(node), area_box(at[0], inside=True)):
            found.append(f"{name} sticks out of {at[0]['title']!r}")
        elif node.get("bgcolor") != AREAS.get(at[0].get("color")):
            found.append(f"{name} has not the colour of {at[0]['title']!r}")
        if TITLE_ROOM + TITLE_LETTER * len(node.get("title") or "") > node["size"][0]:
            found.append(f"the title of {name} is too long for its width")
    for title, end in over_titles(workflow):
        found.append(f"a wire to {end} runs over the title of {title!r}")
    for one, other in combinations([*nodes, *notes], 2):
        if overlap(box(one), box(other)):
            found.append(f"nodes {one['id']} and {other['id']} overlap")
    for one, other in combinations(groups, 2):
        if overlap(area_box(one), area_box(other)):
            found.append(f"areas {one['title']!r} and {other['title']!r} overlap")
    for group in groups:
        if overlap(box(notes[0]), area_box(group)):
            found.append(f"the note lies in {group['title']!r}")
        if not any(overlap(box(node), area_box(group)) for node in nodes):
            found.append(f"area {group['title']!r} is empty")
    return found


def note_problems(note):
    text = note["widgets_values"][0]
    found = []
    if not re.match(r"# \S[^\n]{4,50}\n\n\*\S[^\n*]{15,80}\.\*\n\n", text):
        found.append("the note does not begin with a title and one line in italics")
    elif "-" in text.split("\n\n")[1]:
        found.append("the line has a hyphen, which the template browser writes as a blank")
    places = [text.find(part) for part in PARTS]
    if -1 in places or places != sorted(places):
        found.append(f"the note lacks one of {', '.join(PARTS)}, or their order")
    else:
        for part, start, end in zip(PARTS, places, [*places[1:], len(text)]):
            if len(text[start:end]) - len(part) < 60:
                found.append(f"the note says next to nothing after {part}")
        if not re.search(DURATION, text[places[2] :]):
            found.append("the note does not say how long it takes")
    if "`" in text:  # "Nodes 2.0" writes code in blue on the note's brown in the dark theme
        found.append("the note has words set as code, which are hard to read in Nodes 2.0")
    if note.get("bgcolor") != NOTE_COLOUR:
        found.append(f"the note has the colour {note.get('bgcolor')}")
    lines = sum(-(-len(line) // LINE_LETTERS) for line in text.splitlines() if line)
    if lines * LINE_HEIGHT > note["size"][1]:
        found.append(f"the note's {lines} lines do not fit into {note['size'][1]} pixels")
    return found


@each_workflow
def test_an_artist_finds_their_way(path):
    assert problems(read(path)) == []


def test_titles_and_lines_are_all_different():
    notes = [
        next(node for node in read(path)["nodes"] if node["type"] == "MarkdownNote")
        for path in FILES
    ]
    heads = [note["widgets_values"][0].split("\n\n")[:2] for note in notes]
    assert len({title for title, _ in heads}) == len({line for _, line in heads}) == len(FILES)


def test_a_kind_of_node_has_one_colour_in_all_templates():
    colours = {}
    for path in FILES:
        for node in read(path)["nodes"]:
            if node["type"].startswith("QuantTune"):
                colours.setdefault(node["type"], {}).setdefault(node["bgcolor"], path.stem)
    assert colours
    assert {kind: at for kind, at in colours.items() if len(at) > 1} == {}


@pytest.mark.parametrize("words", SUBJECTS)
def test_a_subject_has_one_colour_in_all_templates(words):
    areas = [
        (path.stem, group["title"], group["color"])
        for path in FILES
        for group in read(path)["groups"]
        if re.search(rf"^\d\. (\w+ ){{0,2}}({words})\b", group["title"], re.IGNORECASE)
    ]
    assert len(areas) > 3
    assert [area for area in areas if area[2] != SUBJECTS[words]] == []


@each_workflow
def test_names_tell_the_order_and_the_subject(path):
    assert re.fullmatch(r"\d\d(-[a-z0-9]+){1,5}", path.stem)
    assert int(path.stem[:2]) == FILES.index(path) + 1


def moved(workflow):
    workflow["nodes"][2]["pos"] = list(workflow["nodes"][3]["pos"])


def outside(workflow):
    workflow["nodes"][-1]["pos"][0] += 5000


def over_the_edge(workflow):
    workflow["nodes"][-1]["pos"][0] += 60


def grey(workflow):
    workflow["groups"][0]["color"] = "#88a"


def unpainted(workflow):
    del workflow["nodes"][-1]["bgcolor"]


def unnumbered(workflow):
    workflow["groups"][1]["title"] = "Quantize"


def no_areas(workflow):
    workflow["groups"] = []


def wide_area(workflow):
    workflow["groups"][0]["bounding"][2] += 400


def no_note(workflow):
    workflow["nodes"] = workflow["nodes"][1:]


def note_without_costs(workflow):
    note = workflow["nodes"][0]["widgets_values"]
    note[0] = note[0].split(PARTS[2])[0]


def note_without_time(workflow):
    note = workflow["nodes"][0]["widgets_values"]
    note[0] = note[0].split(PARTS[2])[0] + PARTS[2] + " quite a lot of everything" * 4


def narrow(workflow):
    workflow["nodes"][1]["size"][0] = 160


def small_note(workflow):
    workflow["nodes"][0]["size"][1] = 100


def wired_over(workflow):
    workflow["groups"][1]["bounding"][1] += 406


def long_title(workflow):
    workflow["nodes"][-1]["title"] = "A title that goes on for longer than its node is wide"


def hyphen(workflow):
    note = workflow["nodes"][0]["widgets_values"]
    note[0] = note[0].replace("4 bits side", "4-bit side", 1)


def code(workflow):
    note = workflow["nodes"][0]["widgets_values"]
    note[0] = note[0].replace("*bits*", "`bits`", 1)


def nameless_run(workflow):
    workflow["nodes"][-1]["inputs"].append({"name": "run_name", "widget": {"name": "run_name"}})


@pytest.mark.parametrize(
    "spoil",
    [
        moved,
        outside,
        over_the_edge,
        grey,
        unpainted,
        unnumbered,
        no_areas,
        wide_area,
        no_note,
        note_without_costs,
        note_without_time,
        narrow,
        small_note,
        wired_over,
        long_title,
        hyphen,
        code,
        nameless_run,
    ],
)
def test_a_spoilt_template_is_noticed(spoil):
    workflow = read(FILES[0])
    spoil(workflow)
    assert problems(workflow)


def test_the_template_browser_has_the_titles_and_lines_of_the_notes():
    script = (FOLDER.parent / "web" / "js" / "template_titles.js").read_text("utf-8")
    entries = re.findall(r'\[\s+"([^"]+)",\s+"([^"]+)",\s+"([^"]+)",\s+\]', script)
    notes = {
        path.stem: next(n for n in read(path)["nodes"] if n["type"] == "MarkdownNote")
        for path in FILES
    }
    told = [note["widgets_values"][0].split("\n\n") for note in notes.values()]
    expected = [(name, t[0][2:], t[1].strip("*")) for name, t in zip(notes, told)]
    assert entries == expected


PAGE = FOLDER.parent / "docs" / "workflows.md"
HEAD = """# The workflows

Each of them is a template in ComfyUI's browser (*Templates*, then the pack's name) and runs as it
is, on the small model that ships with the pack. [The first run](first-run.md) shows how to open
one.

Colours mean the same in all of them: **blue** is what goes in (models, words, sizes, pictures to
learn from), **green** what the pack does with it and keeps, **purple** the pictures, **cyan** what
was measured. What stands below is the note in each workflow; the pictures are taken by the tests,
in the real frontend.
"""


def page():
    """`docs/workflows.md`, put together from the notes of the templates."""
    parts = [HEAD]
    for path in FILES:
        note = next(node for node in read(path)["nodes"] if node["type"] == "MarkdownNote")
        title, rest = note["widgets_values"][0].split("\n\n", 1)
        line, text = rest.split("\n\n", 1)
        picture = f"![{title[2:]}](images/workflows/{path.stem}.webp)"
        parts.append(f"## {path.stem[:2]} {title[2:]}\n\n{line}\n\n{picture}\n\n{text}\n")
    return "\n".join(parts)


def test_the_page_of_workflows_says_what_their_notes_say():
    if docs_images.WANTED:
        PAGE.write_text(page(), "utf-8")
    assert PAGE.read_text("utf-8") == page(), "QUANTTUNE_DOCS_IMAGES=1 writes it anew"


@each_workflow
def test_a_picture_shows_the_workflow_after_a_run(path):
    picture = PAGE.parent / "images" / "workflows" / f"{path.stem}.webp"
    assert picture.is_file(), "QUANTTUNE_DOCS_IMAGES=1 with test_workflows.py makes it"
    assert 20_000 < picture.stat().st_size <= 150_000
