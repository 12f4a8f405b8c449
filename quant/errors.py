"""The one exception type that carries a message meant for the person at the screen."""

from __future__ import annotations

import re

LONGEST_WORD, LONGEST = 400, 1500
"""Characters of a word (a path, a name from a file), and of a whole message, that are shown."""
_UNSEEN = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]+")
"""What breaks a line, turns the direction of writing, or is half a character."""
_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")


class QuantTuneError(ValueError):
    """A mistake in an input, told in one sentence: which input or file, what is wrong, the cure.

    Messages quote names from files that anybody may have written, so that whatever could not be
    shown in one line becomes a space, and what has no end is shortened in its middle.
    """

    def __init__(self, message: object = ""):
        super().__init__(in_one_line(message))


def in_one_line(message: object) -> str:
    """A text that quotes names from files, as it can be shown; see `QuantTuneError`."""
    text = _UNSEEN.sub(" ", str(message))
    text = _WORD.sub(lambda word: _shortened(word[0], LONGEST_WORD), text)
    return _shortened(text, LONGEST)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
