"""Messages that quote what anybody may have written stay one readable line."""

import pytest

from quanttune.quant import QuantTuneError
from quanttune.quant.errors import LONGEST, in_one_line


@pytest.mark.parametrize(
    "odd", ["\n", "\r\n", "\0", "\x1b[31m", "\u202e", "\u2028", "\ud800", "\x85"]
)
def test_what_cannot_be_shown_is_a_space(odd):
    text = str(QuantTuneError(f"The layer 'a{odd}b' is damaged; save it again."))
    assert odd not in text and "\n" not in text and text.startswith("The layer 'a ")
    text.encode()


def test_long_names_are_shortened_in_their_middle():
    name = "x" * 5000 + ".end"
    text = str(QuantTuneError(f"The layer {name} is damaged; save it again."))
    assert len(text) < 500 and ".end is damaged; save it again." in text and "…" in text
    assert len(in_one_line("word " * 9999)) < LONGEST + 10


def test_ordinary_messages_stay_as_they_are():
    text = "The file C:\\Modèles\\日本 語.safetensors is cut short; download it again."
    assert str(QuantTuneError(text)) == text
