"""Turning a workflow as the GUI saves it into a graph, and changing values of it by name."""

import copy

import pytest

from quanttune.devtools.console import Stop
from quanttune.devtools.graph import NeedsFrontend, load_workflow, set_value, to_api

# Stock nodes, described as the server describes them.
INFO = {
    "KSampler": {
        "input": {
            "required": {
                "model": ["MODEL"],
                "seed": ["INT", {"default": 0, "control_after_generate": True}],
                "steps": ["INT", {"default": 20}],
                "sampler_name": [["euler", "ddim"]],
                "latent_image": ["LATENT"],
            }
        }
    },
    "Text": {
        "input": {
            "required": {
                "text": ["STRING", {"multiline": True, "dynamicPrompts": True}],
                "clip": ["CLIP"],
            },
            "optional": {"mode": ["COMBO", {"options": ["a", "b"]}], "late": ["FLOAT", {}]},
        }
    },
    "Loader": {"input": {"required": {}}},
    "Patch": {"input": {"required": {"model": ["MODEL"], "strength": ["FLOAT", {}]}}},
}


def node(id_, kind, inputs=(), values=(), outputs=("MODEL",), **more):
    slots = [{"name": name, "type": type_, "link": link} for name, type_, link in inputs]
    return {
        "id": id_,
        "type": kind,
        "inputs": slots,
        "outputs": [{"name": o, "type": o} for o in outputs],
        "widgets_values": list(values),
        "mode": 0,
        **more,
    }


def flow(*nodes, links=()):
    return {"nodes": list(nodes), "links": [[*link, "*"] for link in links], "version": 0.4}


def sampler(link=None, **more):
    return node(
        9, "KSampler", [("model", "MODEL", link)], [5, "randomize", 30, "ddim"], ["LATENT"], **more
    )


def test_values_are_named_and_the_seeds_control_is_passed_over():
    graph = to_api(flow(node(1, "Loader"), sampler(1), links=[(1, 1, 0, 9, 0)]), INFO)
    assert graph["9"]["inputs"] == {
        "model": ["1", 0],
        "seed": 5,
        "steps": 30,
        "sampler_name": "ddim",
    }
    assert graph["9"]["class_type"] == "KSampler"


def test_missing_values_take_their_defaults():
    graph = to_api(flow(node(1, "Text", values=["hi"])), INFO)
    assert graph["1"]["inputs"] == {"text": "hi", "mode": "a", "late": 0.0}


def test_values_by_name_and_values_that_are_lists():
    graph = to_api(flow(node(1, "Text", values=()) | {"widgets_values": {"text": [1, 2]}}), INFO)
    assert graph["1"]["inputs"]["text"] == {"__value__": [1, 2]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a /* no */cat // end", {"a cat "}), ("{red|blue} cat", {"red cat", "blue cat"}),
     (r"\{x\}", {"{x}"}), ("{a|{b|c}}", {"a", "b", "c"})],
)  # fmt: skip
def test_prompts_are_treated_as_the_frontend_does(text, expected):
    assert to_api(flow(node(1, "Text", values=[text])), INFO)["1"]["inputs"]["text"] in expected


def test_links_go_through_reroutes_and_bypassed_nodes():
    patch = node(2, "Patch", [("model", "MODEL", 1)], [0.5], mode=4)
    reroute = node(3, "Reroute", [("", "*", 2)], outputs=("*",))
    links = [(1, 1, 0, 2, 0), (2, 2, 0, 3, 0), (3, 3, 0, 9, 0)]
    graph = to_api(flow(node(1, "Loader"), patch, reroute, sampler(3), links=links), INFO)
    assert set(graph) == {"1", "9"}
    assert graph["9"]["inputs"]["model"] == ["1", 0]


def test_a_muted_node_takes_its_links_along():
    graph = to_api(flow(node(1, "Loader", mode=2), sampler(1), links=[(1, 1, 0, 9, 0)]), INFO)
    assert "model" not in graph["9"]["inputs"] and "1" not in graph


def test_a_linked_widget_keeps_its_place_and_takes_the_link_or_the_primitives_value():
    linked = node(1, "Text", [("text", "STRING", 1)], ["old", "b", 2.0])
    other = node(2, "Loader", outputs=("STRING",))
    graph = to_api(flow(linked, other, links=[(1, 2, 0, 1, 0)]), INFO)
    assert graph["1"]["inputs"] == {"text": ["2", 0], "mode": "b", "late": 2.0}
    primitive = node(2, "PrimitiveNode", values=["new", "fixed"], outputs=("STRING",))
    graph = to_api(flow(linked, primitive, links=[(1, 2, 0, 1, 0)]), INFO)
    assert graph["1"]["inputs"]["text"] == "new" and set(graph) == {"1"}


def test_notes_are_left_out_and_api_graphs_pass_unchanged():
    graph = to_api(flow(node(1, "Loader"), node(2, "Note"), node(3, "MarkdownNote")), INFO)
    assert set(graph) == {"1"}
    assert to_api(graph, INFO) is graph


def test_what_only_the_frontend_can_do_is_told():
    subgraph = flow(node(1, "some-uuid")) | {"definitions": {"subgraphs": [{"id": "some-uuid"}]}}
    with pytest.raises(NeedsFrontend, match="subgraph"):
        to_api(subgraph, INFO)
    dynamic = {"D": {"name": "D", "input": {"required": {"x": ["COMFY_DYNAMICCOMBO_V3", {}]}}}}
    with pytest.raises(NeedsFrontend, match="dynamic input x"):
        to_api(flow(node(1, "D")), dynamic)


def test_sockets_that_grow_keep_the_names_the_workflow_gives_them():
    grows = {"Many": {"input": {"required": {"x": ["COMFY_AUTOGROW_V3", {}], "n": ["INT", {}]}}}}
    many = node(2, "Many", [("x.x0", "MODEL", 1), ("x.x1", "MODEL", None)], [7])
    graph = to_api(flow(node(1, "Loader"), many, links=[(1, 1, 0, 2, 0)]), INFO | grows)
    assert graph["2"]["inputs"] == {"x.x0": ["1", 0], "n": 7}


def test_unknown_types_are_named_all_at_once():
    with pytest.raises(Stop, match="no node of type Alpha, Beta"):
        to_api(flow(node(1, "Beta"), node(2, "Alpha")), INFO)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"a": 1}', '{"a": {"inputs": {}}}'])
def test_files_that_are_no_workflow(tmp_path, text):
    (tmp_path / "w.json").write_text(text)
    with pytest.raises(Stop, match="w.json is not a workflow"):
        load_workflow(tmp_path / "w.json")
    with pytest.raises(Stop, match="could not be read"):
        load_workflow(tmp_path / "none.json")


class TestSet:
    GRAPH = {
        "1": {"class_type": "Text", "inputs": {"text": "x"}, "_meta": {"title": "Positive v1.5"}},
        "2": {"class_type": "Text", "inputs": {"text": "y"}, "_meta": {"title": "Text"}},
        "3": {"class_type": "KSampler", "inputs": {"seed": 1}},
    }

    @pytest.mark.parametrize(
        ("assignment", "where", "value"),
        [
            ("1.text=a = b", ("1", "text"), "a = b"),
            ("Positive v1.5.text=12", ("1", "text"), "12"),
            ("Text.mode=b", ("2", "mode"), "b"),
            ("KSampler.seed=7", ("3", "seed"), 7),
            ("KSampler.sampler_name=ddim", ("3", "sampler_name"), "ddim"),
            ("Text.late=0.5", ("2", "late"), 0.5),
        ],
    )
    def test_by_id_title_or_type(self, assignment, where, value):
        graph = copy.deepcopy(self.GRAPH)
        set_value(graph, INFO, assignment)
        assert graph[where[0]]["inputs"][where[1]] == value

    @pytest.mark.parametrize(
        ("assignment", "said"),
        [
            ("nonsense", "write it as node.input=value"),
            ("text=1", "write it as node.input=value"),
            ("Nothing.text=1", "fits no node; the nodes are 1"),
            ("3.speed=1", "has no input 'speed' but model, seed"),
        ],
    )
    def test_what_fits_nothing_is_one_sentence(self, assignment, said):
        with pytest.raises(Stop, match=said):
            set_value(copy.deepcopy(self.GRAPH), INFO, assignment)

    def test_a_type_that_is_there_twice(self):
        graph = {i: {"class_type": "Text", "inputs": {}} for i in "12"}
        with pytest.raises(Stop, match="fits the nodes 1, 2"):
            set_value(graph, INFO, "Text.text=1")
