"""Turn a workflow as the GUI saves it into the graph that the server runs, without a browser.

It does what the frontend's `graphToPrompt` does, with the node descriptions of the server's
`/object_info`: widget values by name, links through reroutes and bypassed nodes, primitive nodes,
muted nodes, notes. A test compares the two on every shipped workflow.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from .client import Graph
from .console import Stop

MUTED, BYPASSED = 2, 4
NOTES = {"Note", "MarkdownNote"}
# Input types that the frontend shows as a widget with a value of its own.
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "IMAGEUPLOAD"}


class NeedsFrontend(Stop):
    """The workflow uses something that only the real frontend can turn into a graph."""


def load_workflow(path: Path) -> dict[str, Any]:
    """Read a workflow file of either format; raises `Stop` when it is not one."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise Stop(f"{path} could not be read: {error.strerror}.") from error
    except ValueError as error:
        raise Stop(f"{path} is not a workflow: it is not valid JSON ({error}).") from error
    if not (is_ui_format(value) or is_api_format(value)):
        raise Stop(
            f"{path} is not a workflow: it has neither `nodes` nor nodes with a `class_type`."
        )
    return value


def is_ui_format(value: Any) -> bool:
    """Whether this is a workflow as the GUI saves it."""
    return isinstance(value, dict) and isinstance(value.get("nodes"), list)


def is_api_format(value: Any) -> bool:
    """Whether this is a graph as the server takes it."""
    nodes = list(value.values()) if isinstance(value, dict) else []
    return bool(nodes) and all(isinstance(n, dict) and "class_type" in n for n in nodes)


def _specs(info: dict[str, Any]) -> dict[str, list]:
    groups = info.get("input", {})
    return {**groups.get("required", {}), **groups.get("optional", {})}


def _options(spec: list) -> dict[str, Any]:
    return spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}


def _widget_names(info: dict[str, Any]) -> list[tuple[str, list | None]]:
    """Names of a node's widgets in the order of `widgets_values`; spec None is not an input."""
    names: list[tuple[str, list | None]] = []
    for name, spec in _specs(info).items():
        kind, options = spec[0], _options(spec)
        if isinstance(kind, str) and kind.startswith("COMFY_AUTOGROW"):
            continue  # sockets alone, which the workflow names itself
        if isinstance(kind, str) and kind.startswith("COMFY_"):
            raise NeedsFrontend(f"Node type {info.get('name')} has the dynamic input {name}.")
        combo = isinstance(kind, list) or kind == "COMBO"
        if options.get("forceInput") or not (combo or kind in WIDGET_TYPES):
            continue
        names.append((name, spec))
        seed = kind == "INT" and name in ("seed", "noise_seed")
        if options.get("control_after_generate", seed):
            names.append(("control_after_generate", None))
            if combo:
                names.append(("control_filter_list", None))
    return names


def _default(spec: list) -> Any:
    kind, options = spec[0], _options(spec)
    if "default" in options:
        return options["default"]
    choices = kind if isinstance(kind, list) else options.get("options") or []
    fallback = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}
    return (
        fallback.get(kind, choices[0] if choices else None) if isinstance(kind, str) else choices[0]
    )


def _prompt_text(text: str) -> str:
    """What the frontend does to a prompt: drop comments, choose one of `{a|b}`."""
    text = re.sub(r"/\*[\s\S]*?\*/|//.*", "", text)
    while found := re.search(r"(?<!\\)\{([^{}]*)(?<!\\)\}", text):
        text = text[: found.start()] + random.choice(found[1].split("|")) + text[found.end() :]
    return text.replace("\\{", "{").replace("\\}", "}")


def _serialized(value: Any, spec: list) -> Any:
    """A widget's value as a graph carries it: a bare list would be taken for a link."""
    if isinstance(value, str) and _options(spec).get("dynamicPrompts"):
        value = _prompt_text(value)
    return {"__value__": value} if isinstance(value, list) else value


def _widget_values(node: dict, info: dict[str, Any]) -> dict[str, Any]:
    stored = node.get("widgets_values") or []
    result = {}
    for index, (name, spec) in enumerate(_widget_names(info)):
        if spec is None:
            continue
        if isinstance(stored, dict):
            value = stored.get(name, _default(spec))
        else:
            value = stored[index] if index < len(stored) else _default(spec)
        result[name] = _serialized(value, spec)
    return result


class _Links:
    """Follows links backwards over nodes that do not run."""

    def __init__(self, workflow: dict[str, Any]):
        self.nodes = {node["id"]: node for node in workflow["nodes"]}
        self.links: dict[Any, tuple[Any, int]] = {}
        for link in workflow.get("links") or ():
            if isinstance(link, dict):
                self.links[link["id"]] = (link["origin_id"], link["origin_slot"])
            else:
                self.links[link[0]] = (link[1], link[2])

    def resolve(self, slot: dict) -> tuple[str, Any]:
        """The far end of an input: ("node", [id, slot]), ("value", v), or ("", None)."""
        while slot.get("link") is not None and slot["link"] in self.links:
            origin_id, origin_slot = self.links[slot["link"]]
            origin = self.nodes.get(origin_id)
            if origin is None or origin.get("mode") == MUTED:
                break
            inputs = origin.get("inputs") or []
            if origin["type"] == "PrimitiveNode":
                return "value", (origin.get("widgets_values") or [None])[0]
            if origin["type"] == "Reroute":
                slot = inputs[0] if inputs else {}
            elif origin.get("mode") == BYPASSED:
                slot = self._same_type(inputs, origin, origin_slot)
            else:
                return "node", [str(origin_id), origin_slot]
        return "", None

    @staticmethod
    def _same_type(inputs: list, origin: dict, slot: int) -> dict:
        kind = origin["outputs"][slot].get("type")
        candidates = [*inputs[slot : slot + 1], *inputs]
        return next((entry for entry in candidates if entry.get("type") == kind), {})


def to_api(workflow: dict[str, Any], object_info: dict[str, Any]) -> Graph:
    """Convert a workflow as the GUI saves it to the graph that `/prompt` takes.

    Args:
        workflow: UI format (a graph in API format is returned as it is).
        object_info: the server's node descriptions.

    Raises `NeedsFrontend` for subgraphs and dynamic inputs, `Stop` for unknown node types.
    """
    if not is_ui_format(workflow):
        return workflow
    subgraphs = {s.get("id") for s in (workflow.get("definitions") or {}).get("subgraphs") or ()}
    links = _Links(workflow)
    graph: Graph = {}
    unknown = []
    for node in workflow["nodes"]:
        kind = node["type"]
        if kind in NOTES or kind in ("Reroute", "PrimitiveNode"):
            continue
        if node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        if kind in subgraphs:
            raise NeedsFrontend("The workflow has a subgraph.")
        if kind not in object_info:
            unknown.append(kind)
            continue
        info = object_info[kind]
        specs = _specs(info)
        inputs = _widget_values(node, info)
        for slot in node.get("inputs") or ():
            what, value = links.resolve(slot)
            if what:
                spec = specs.get(slot["name"])
                by_value = what == "value" and spec is not None
                inputs[slot["name"]] = _serialized(value, spec) if by_value else value
        title = node.get("title") or info.get("display_name") or kind
        graph[str(node["id"])] = {"inputs": inputs, "class_type": kind, "_meta": {"title": title}}
    if unknown:
        raise Stop(f"The ComfyUI has no node of type {', '.join(sorted(set(unknown)))}.")
    return graph


def set_value(graph: Graph, object_info: dict[str, Any], assignment: str) -> None:
    """Apply one `node.input=value` to a graph in API format, in place.

    The node is named by its id, its title or its type; the value is read as JSON where the input
    is not a text. Raises `Stop` when the name fits no node or more than one, or has no such input.
    """
    place, equals, text = assignment.partition("=")
    name, dot, key = place.rpartition(".")
    if not (equals and dot and name and key):
        raise Stop(f"--set {assignment}: write it as node.input=value.")
    found = [id_ for id_ in graph if id_ == name]
    found = found or [i for i, n in graph.items() if n.get("_meta", {}).get("title") == name]
    found = found or [i for i, n in graph.items() if n["class_type"] == name]
    if len(found) != 1:
        known = ", ".join(
            f"{i} ({n.get('_meta', {}).get('title', n['class_type'])})" for i, n in graph.items()
        )
        many = f"fits the nodes {', '.join(found)}" if found else "fits no node"
        raise Stop(f"--set {assignment}: {name!r} {many}; the nodes are {known}.")
    node = graph[found[0]]
    specs = _specs(object_info.get(node["class_type"], {}))
    if key not in specs and key not in node["inputs"]:
        raise Stop(f"--set {assignment}: node {name} has no input {key!r} but {', '.join(specs)}.")
    kind = specs[key][0] if key in specs else None
    value: Any = text
    if kind not in ("STRING", "COMBO") and not isinstance(kind, list):
        try:
            value = json.loads(text)
        except ValueError:
            pass
    node["inputs"][key] = value
