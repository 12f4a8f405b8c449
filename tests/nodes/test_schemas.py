"""The nodes' public face: ids, inputs and outputs never change once shared workflows use them."""

import inspect
import json
from pathlib import Path

import pytest

from quanttune.tests.harness.inprocess import pack_nodes

SNAPSHOT = Path(__file__).with_name("schemas.json")
ROOT = Path(__file__).resolve().parents[2]
LISTS = ("unet_name", "scale_name", "folder", "lpips_network", "lora_name", "upscaler")
"""Inputs whose options are files and folders that are there."""


def of_the_host(options) -> bool:
    """Whether a list of choices is the host's own, which grows with its versions."""
    from comfy.samplers import KSampler

    return list(options) in (list(KSampler.SAMPLERS), list(KSampler.SCHEDULERS))


@pytest.fixture(scope="module")
def nodes(comfy_inprocess):
    return pack_nodes()


def described(node) -> dict:
    """What a saved workflow depends on: order and type of inputs and outputs, and choices."""
    schema = node.GET_SCHEMA()
    inputs = []
    for entry in schema.inputs:
        facts = {"id": entry.id, "type": entry.get_io_type(), "optional": bool(entry.optional)}
        if getattr(entry, "default", None) is not None:
            facts["default"] = entry.default
        options = getattr(entry, "options", None)
        if options and entry.id not in LISTS and not of_the_host(options):
            facts["options"] = entry.options
        inputs.append(facts)
    return {"display_name": schema.display_name, "category": schema.category, "inputs": inputs,
            "outputs": [{"id": o.id, "type": o.get_io_type()} for o in schema.outputs]}


def test_the_schemas_are_those_of_the_snapshot(nodes):
    current = {node_id: described(node) for node_id, node in sorted(nodes.items())}
    if not SNAPSHOT.exists():
        SNAPSHOT.write_text(json.dumps(current, indent=1) + "\n")
        pytest.fail("the snapshot was missing and has been written; read it and commit it")
    assert current == json.loads(SNAPSHOT.read_text())


def test_every_node_input_and_output_explains_itself(nodes):
    for node_id, node in nodes.items():
        schema = node.GET_SCHEMA()
        assert node_id.startswith("QuantTune")
        assert schema.category.startswith("QuantTune/") and schema.description
        for entry in [*schema.inputs, *schema.outputs]:
            assert entry.tooltip, f"{node_id}.{entry.id} has no tooltip"
        page = ROOT / "web" / "docs" / f"{node_id}.md"
        assert page.is_file(), f"{page.name} is missing"
        assert page.read_text().startswith(f"# {schema.display_name}\n")


def test_no_help_page_without_a_node(nodes):
    assert {p.stem for p in (ROOT / "web" / "docs").glob("*.md")} == set(nodes)


SILENT = {"QuantTuneAugmentImages", "QuantTuneLoadScales", "QuantTuneLoadStarterModel",
          "QuantTuneUpscale4x"}
"""Nodes that say and show nothing of their own."""


def test_what_a_node_shows_is_sent_again_where_its_result_is_cached(nodes):
    from comfy_api.latest import io

    if "has_intermediate_output" not in inspect.signature(io.Schema).parameters:
        pytest.skip("this host sends again what output nodes show, and nothing else")
    schemas = {node_id: node.GET_SCHEMA() for node_id, node in nodes.items()}
    told = {i for i, s in schemas.items() if s.is_output_node or s.has_intermediate_output}
    assert schemas.keys() - told == SILENT
