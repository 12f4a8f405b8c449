"""The ablation runs from nothing to its tables, and goes on from what is in its file."""

import json

import pytest
import torch

from quanttune.benchmarks import ablation
from quanttune.benchmarks._ddpm_unet import DDPMUNet
from quanttune.benchmarks._digits import SMALL, DigitsDenoiser, blended_experts
from quanttune.quant import LayerScales, ScaleSet

ARGUMENTS = ["--seeds", "1", "--steps", "8", "--batch", "4", "--bits", "3", "--unet-steps", "3",
             "--samples", "80"]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "RATES", (1e-3, 1e-2))
        ablation.main([*ARGUMENTS, "--json", str(folder / "out.json"), "--work", str(folder)])
    return folder


def test_every_method_and_variant_has_a_row(first_run, capsys):
    found = json.loads((first_run / "out.json").read_text())["runs"].values()
    judged = {r["method"] for r in found if r["seed"] == 0}
    assert judged == {"float", "untuned", *ablation.SCALES, *ablation.OTHERS, *ablation.VARIANTS}
    assert all(r["fid"] > 0 and 1 <= r["is"] <= 10 for r in found)
    counts = {r["method"]: r["parameters"] for r in found}
    assert counts["TuneQDM, N = 4"] == 4 * counts["TuneQDM, N = 1"] > 4 * counts["PEQA"]


def test_what_is_in_the_file_is_not_repeated(first_run, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(ablation.Ablation, "_tuned", None)
    ablation.main([*ARGUMENTS, "--json", str(first_run / "out.json"), "--work", str(first_run)])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert all("(" in row for row in rows[2:] if "settings, 3" not in row and "---" not in row)


def test_float_and_quantized_unets_agree_at_8_bits():
    torch.manual_seed(0)
    unet, same = DDPMUNet(**SMALL), DDPMUNet(**SMALL)
    same.load_state_dict(unet.state_dict())
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 20.0])
    plain, packed = (DigitsDenoiser(u, b).denoise(x, sigma, {}, {})
                     for u, b in ((unet, None), (same, 8)))
    assert torch.allclose(plain, packed, rtol=0.05, atol=0.05 * float(plain.abs().max()))
    assert not torch.equal(plain, packed)


def test_blended_experts_are_each_ones_own_at_the_middle_of_its_interval():
    rows = torch.tensor([[1.0], [3.0], [5.0], [7.0]])
    scale_set = ScaleSet({"a": LayerScales(rows, None)}, 4, 1000)
    found = [float(blended_experts(scale_set, t)["a"].r_out)
             for t in (0, 125, 250, 375, 500, 875, 999)]
    assert found == pytest.approx([1, 1, 2, 3, 4, 7, 7])
