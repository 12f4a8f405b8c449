"""A template's file says from where it is looked at: where its note can be read."""

import pytest

from quanttune.tests.workflows.test_layout import FILES, box, each_workflow, read

READABLE = 0.6  # the scale below which the frontend's canvas draws no texts, and somewhat more
BARS, SCREEN = (64, 92), (1366, 700)  # where the frontend's bars end, and a small screen does


def problems(workflow):
    """What is wrong with where the file is looked at from when it is opened."""
    view = workflow["extra"]["ds"]
    note = next(node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    if view["scale"] < READABLE:
        return [f"at a scale of {view['scale']} the frontend draws no texts"]
    left, top, right, bottom = (
        (edge + view["offset"][axis % 2]) * view["scale"] for axis, edge in enumerate(box(note))
    )
    if left < BARS[0] or top < BARS[1] or right > SCREEN[0] or bottom > SCREEN[1]:
        return ["the note is not in sight where the file is opened"]
    return []


@each_workflow
def test_the_note_is_read_before_anything_is_moved(path):
    assert problems(read(path)) == []


@pytest.mark.parametrize("view", [{"scale": 0.5}, {"offset": [0, 0]}, {"offset": [540, 900]}])
def test_a_view_of_something_else_is_noticed(view):
    workflow = read(FILES[0])
    workflow["extra"]["ds"].update(view)
    assert problems(workflow)
