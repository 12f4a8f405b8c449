"""The smoke part: the tests that show that the pack works on a host at all.

`dev.py matrix` runs them on every ComfyUI, Python and torch that is supported; `-m smoke` selects
them anywhere. An entry is a file of `tests/`, or a class or test in it, with or without parameters;
tests/test_matrix.py knows when one is there no more.
"""

from __future__ import annotations

import pytest

SMOKE = (
    # The pack is imported and its nodes have their schemas; the archive installs and serves.
    "nodes/test_schemas.py",
    "test_packaging.py::test_the_pack_offers_an_entry_point_and_nothing_that_switches_it_off",
    "test_packaging.py::TestInstalledArchive",
    # Quantize, save, load, scales, stock LoRAs however the host loads the model, integer products.
    "host/test_quantize.py::test_forward_equals_the_dequantized_float_model[4-SD15]",
    "host/test_quantize.py::test_forward_equals_the_dequantized_float_model[8-SDXL]",
    "host/test_quantize.py::test_resident_size_as_the_host_accounts_it",
    "host/test_quantize.py::test_the_source_keeps_working_and_its_patches_carry_over",
    "host/test_save_load.py::test_round_trip_is_exact[4-SD15]",
    "host/test_save_load.py::test_round_trip_is_exact[3-SD20]",
    "host/test_save_load.py::test_the_non_dynamic_delegate_of_the_host_can_be_made",
    "host/test_routing.py::test_one_expert_equals_eq_5_written_out[250.0-1-SD15]",
    "host/test_routing.py::test_mixed_timesteps_in_a_batch_equal_single_runs",
    "host/test_routing.py::test_composes_with_another_wrapper_and_the_function_wrapper",
    "host/test_lora.py::test_equal_to_the_lora_on_the_dequantized_float_model[None-4]",
    "host/test_lora.py::test_equal_to_the_lora_on_the_dequantized_float_model[100000-4]",
    "host/test_lora.py::test_a_lora_acts_once_however_the_host_moves_layers",
    "host/test_lora.py::test_together_with_scales",
    "host/test_lora.py::test_bypass_loader",
    "host/test_dynamic_int8.py::test_a_float_model_becomes_one_of_integers[SD15]",
    # Files: what is refused by name, and the lists of the nodes.
    "nodes/test_nodes.py::test_save_then_load_through_the_lists",
    "nodes/test_nodes.py::test_scales_from_a_file_and_from_a_socket_are_the_same",
    "nodes/test_nodes.py::test_bad_unet_files_name_themselves_in_one_sentence[truncated]",
    "nodes/test_lora_nodes.py::test_on_integers_with_a_text_encoder_and_in_a_chain",
    # The starter, the upscaler, and a few steps of each training.
    "starter/test_model.py::test_the_model_is_an_ordinary_one",
    "starter/test_model.py::test_a_few_steps_give_pictures",
    "nodes/test_upscale.py::test_words_or_conditioning_or_both",
    "nodes/test_train_scales.py::test_scales_pictures_losses_and_a_report_come_out",
    "nodes/test_lora_train.py::test_a_lora_file_is_trained_on_in_a_graph",
    "nodes/test_nodes.py::test_calibrate_then_train_from_prompts",
    # On the host's own server, and from its frontend.
    "host/test_server.py::test_quantize_save_load_and_sample",
    "workflows/test_workflows.py::test_runs_from_the_frontend_to_its_pictures"
    "[02-timestep-routed-scales]",
)


def names(nodeid: str) -> list[str]:
    """Under which entries a test may stand: its file, its class, itself, and its parameters."""
    name, bracket, parameters = nodeid.removeprefix("tests/").partition("[")
    parts = name.split("::")
    found = ["::".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return [*found, f"{name}{bracket}{parameters}"]


def mark(items: list[pytest.Item]) -> None:
    """Give the smoke tests among the collected ones their mark."""
    for item in items:
        if any(name in SMOKE for name in names(item.nodeid)):
            item.add_marker(pytest.mark.smoke)


def files() -> frozenset[str]:
    """The files that hold smoke tests, relative to `tests/`."""
    return frozenset(entry.partition("::")[0] for entry in SMOKE)
