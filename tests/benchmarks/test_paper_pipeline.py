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


def test_the_committed_figures_are_complete():
    found = json.loads(RESULTS.read_text("utf-8"))
    assert paper_pipeline.ratios(found).items() <= found.items()
    assert set(found["time_ratio_int8"]) == {"50", "25", "10"}
    assert {"mem_ratio_int8", "upscale_mem_ratio_1024_vs_256"} <= found.keys()
