"""Loaders whose file's name comes from another node."""

import pytest

from quanttune.tests.harness.inprocess import pack_nodes


@pytest.mark.parametrize("node, known", [
    ("QuantTuneLoadUpscaler", {"precision": "float"}),
    ("QuantTuneLoadDiffusersUNet", {"precision": "float"}),
    ("QuantTuneLoadQuantizedUNet", {"bits": "auto"}),
    ("QuantTuneLoadScales", {}),
])
def test_a_name_that_is_not_known_yet_is_no_reason_to_load_anew(comfy_inprocess, node, known):
    """The host asks what changed before the other node has run, and gives None for the name.

    An error there would be logged as a missing file, and have the model loaded in every run.
    """
    found = pack_nodes()[node]
    name = next(entry.id for entry in found.GET_SCHEMA().inputs if entry.id not in known)
    first, second = (found.fingerprint_inputs(**{name: None}, **known) for _ in range(2))
    assert first == second
