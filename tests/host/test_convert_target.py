"""Names of the files that `convert` writes."""

import pytest

from quanttune.quant import QuantTuneError


@pytest.mark.parametrize("name", ["a.safetensors", "A.SAFETENSORS", "b/a.sft", "a.SFT"])
def test_endings_that_the_loading_nodes_list(name, comfy_inprocess):
    from quanttune.host.convert_target import STATE, check_target

    check_target(name)
    with pytest.raises(QuantTuneError, match="does not end in .pt"):
        check_target(name, STATE)


@pytest.mark.parametrize("name", ["a", "a.pt", "a.bin", "a.safetensors.part", "safetensors"])
def test_others_are_refused_in_one_sentence(name, comfy_inprocess):
    from quanttune.host.convert_target import check_target

    with pytest.raises(QuantTuneError) as told:
        check_target(name, what="target of the scales")
    assert str(told.value) == (f"The target of the scales '{name}' does not end in .safetensors, "
                               "as it has to; give it such a name.")


def test_a_name_that_no_file_has(comfy_inprocess):
    from quanttune.host.convert_target import check_target

    with pytest.raises(QuantTuneError, match="has a NUL in its name"):
        check_target("a\0.safetensors")


@pytest.mark.parametrize("name", ["a.pt", "a.PT"])
def test_states(name, comfy_inprocess):
    from quanttune.host.convert_target import STATE, check_target

    check_target(name, STATE)
