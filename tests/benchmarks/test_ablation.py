"""The parts of the ablation: its UNet, quantized or not, and the blending of experts."""

import pytest
import torch

from quanttune.benchmarks._ddpm_unet import DDPMUNet
from quanttune.benchmarks._digits import SMALL, DigitsDenoiser, blended_experts
from quanttune.quant import LayerScales, ScaleSet


def test_float_and_quantized_unets_agree_at_8_bits():
    torch.manual_seed(0)
    unet, same = DDPMUNet(**SMALL), DDPMUNet(**SMALL)
    same.load_state_dict(unet.state_dict())
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 20.0])
    plain, packed = (DigitsDenoiser(u, b).denoise(x, sigma, {}, {})
                     for u, b in ((unet, None), (same, 8)))
    assert torch.allclose(plain, packed, rtol=0.05, atol=0.05 * float(plain.detach().abs().max()))
    assert not torch.equal(plain, packed)


def test_blended_experts_are_each_ones_own_at_the_middle_of_its_interval():
    rows = torch.tensor([[1.0], [3.0], [5.0], [7.0]])
    scale_set = ScaleSet({"a": LayerScales(rows, None)}, 4, 1000)
    found = [float(blended_experts(scale_set, t)["a"].r_out)
             for t in (0, 125, 250, 375, 500, 875, 999)]
    assert found == pytest.approx([1, 1, 2, 3, 4, 7, 7])
