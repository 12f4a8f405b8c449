"""The pipeline's benchmark: its ratios, and that the committed figures are complete."""

import json
from pathlib import Path

from quanttune.benchmarks import paper_pipeline

RESULTS = Path(paper_pipeline.__file__).resolve().parent / "results" / "paper_pipeline.json"


def test_the_ratios_are_those_of_the_rows():
    seconds = dict.fromkeys(("50", "25", "10"), 4.0)
    found = {
        "generate": {paper_pipeline.TUNED: {"seconds": seconds, "peak_mib": 8.0},
                     paper_pipeline.INT8: {"seconds": dict.fromkeys(seconds, 1.0),
                                           "peak_mib": 2.0}},
        "upscale": {"tiled, 256": {"seconds": 3.0, "built_mib": 10.0, "peak_mib": 20.0},
                    "whole picture at once, 256": {"seconds": 2.0, "peak_mib": 40.0},
                    "tiled, 8-bit UNet, 256": {"built_mib": 3.0, "peak_mib": 9.0},
                    "tiled, 1024": {"seconds": 9.0, "peak_mib": 22.0}}}
    ratios = paper_pipeline.ratios(found)
    assert ratios["mem_ratio_int8"] == 0.25
    assert ratios["time_ratio_int8"] == {"50": 0.25, "25": 0.25, "10": 0.25}
    assert ratios["upscale_mem_ratio_1024_vs_256"] == 1.1
    assert ratios["upscale_time_ratio_tiled"] == 1.5
    assert ratios["upscale_mem_ratio_tiled"] == 0.5
    assert ratios["upscale_resident_ratio_8bit"] == 0.3


def test_the_first_tiles_are_compared_with_the_first_tiles():
    ways = {"tiled, 256": {"peak_mib": 50.0}, "tiled, 256, first 2 tiles": {"peak_mib": 10.0},
            "tiled, 256, first 3 tiles": {"peak_mib": 20.0},
            "tiled, 1024, first 3 tiles": {"peak_mib": 21.0}}
    name = "upscale_mem_ratio_1024_vs_256"
    assert paper_pipeline.ratios({"upscale": ways})[name] == 1.05
    ways["tiled, 1024"] = {"peak_mib": 60.0}
    assert paper_pipeline.ratios({"upscale": ways})[name] == 1.2
    assert name not in paper_pipeline.ratios({"upscale": {"tiled, 256": {"peak_mib": 5.0}}})


def test_only_the_first_tiles(comfy_inprocess, monkeypatch):
    from quanttune.host import tiled_decode, tiles

    for place, name in ((tiles.Tiling, "__iter__"), (tiled_decode, "_batches")):
        monkeypatch.setattr(place, name, getattr(place, name))
    plan = tiles.tiling(100, 100, 30, 5)
    assert len(list(plan)) == 16
    paper_pipeline._only_first(3)
    assert len(list(plan)) == 3 and len(plan) == 16


def test_the_committed_figures_are_complete():
    found = json.loads(RESULTS.read_text("utf-8"))
    assert paper_pipeline.ratios(found).items() <= found.items()
    assert set(found["time_ratio_int8"]) == {"50", "25", "10"}
    assert {"mem_ratio_int8", "upscale_mem_ratio_1024_vs_256"} <= found.keys()
