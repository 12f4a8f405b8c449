"""Where the frontend draws a workflow's wires, and whose titles they run over.

A wire is drawn above the areas and below the nodes: it hides the title of an area, not of a node.
"""

import math

LETTER, TITLE_HEIGHT = 10.5, 34  # of an area's title, in pixels of the canvas at font size 24
SLOT_HEIGHT, SLOT_MIDDLE = 20, 0.7


def _end(node, kind, index):
    """Place (x, y) of a node's slot; inputs that belong to a widget take no row of their own."""
    rows = [i for i, slot in enumerate(node[kind]) if kind == "outputs" or not slot.get("widget")]
    (x, y), width = node["pos"], node["size"][0]
    row = rows.index(index) + SLOT_MIDDLE
    return (x if kind == "inputs" else x + width), y + row * SLOT_HEIGHT


def _spline(start, end, points=60):
    """The frontend's curve: it leaves to the right and arrives from the left."""
    reach = math.dist(start, end) / 4
    corners = (start, (start[0] + reach, start[1]), (end[0] - reach, end[1]), end)
    for step in range(points + 1):
        t, u = step / points, 1 - step / points
        shares = (u**3, 3 * u * u * t, 3 * u * t * t, t**3)
        yield tuple(sum(s * c[axis] for s, c in zip(shares, corners)) for axis in (0, 1))


def over_titles(workflow):
    """(title of an area, name of the node that the wire over it ends at), for each such wire."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    found = []
    for _, source, output, target, entry, *_ in workflow["links"]:
        start = _end(nodes[source], "outputs", output)
        curve = list(_spline(start, _end(nodes[target], "inputs", entry)))
        for group in workflow["groups"]:
            left, top, *_ = group["bounding"]
            right = left + LETTER * (len(group["title"]) + 1)
            if any(left < x < right and top < y < top + TITLE_HEIGHT for x, y in curve):
                found.append((group["title"], nodes[target].get("title") or nodes[target]["type"]))
    return found
