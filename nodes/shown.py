"""What nodes show of a MODEL that they made."""

from comfy_api.latest import ui

from ..host.badge import badge_of
from ..host.compat import kept_output

KEPT = kept_output()
"""Arguments of the schema of a node that is no output node, but shows something."""
BADGE = "quanttune_badge"
"""Key in a node's ui output of the text of its badge."""


def shown_model(model, text: str = "") -> dict:
    """A node's ui output: a badge with the bits and the size of ``model``, and ``text`` if any."""
    return {**(ui.PreviewText(text).as_dict() if text else {}), BADGE: [badge_of(model)]}
