"""A model's description in a file: numbers of no model are refused in a sentence."""

import pytest
import torch

from quanttune.tests.host.unets import told


@pytest.mark.parametrize("where", ["unet_config", "sampling_settings"])
@pytest.mark.parametrize("number", [10**400, -(10**400), 1e30, float("nan"), float("-inf"), 2**25])
def test_numbers_of_no_model(where, number, comfy_inprocess):
    from quanttune.host.describe import model_config
    from quanttune.quant import QuantizedCheckpoint, UNetMetadata

    metadata = UNetMetadata("SD15", model_type="EPS", **{where: {"image_size": [32, number]}})
    checkpoint = QuantizedCheckpoint(metadata, {}, {"a": torch.zeros(1)})
    assert f"{where}.image_size = " in told("which no model has", model_config, checkpoint, "x")
