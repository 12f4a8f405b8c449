"""What the notes of templates say of their cost is what was measured."""

import json

from quanttune.tests.workflows.test_layout import FOLDER, PARTS, read

RESULTS = FOLDER.parent / "benchmarks" / "results" / "paper_pipeline.json"


def cost_of(name):
    """What a template's note says of its cost."""
    note = next(n for n in read(FOLDER / f"{name}.json")["nodes"] if n["type"] == "MarkdownNote")
    return note["widgets_values"][0].partition(PARTS[2])[2].strip()


def test_the_pipeline_costs_what_was_measured():
    measured = json.loads(RESULTS.read_text("utf-8"))
    drawn, upscaled = measured["generate"], measured["upscale"]

    def seconds(way):
        return [f"{drawn[way]['seconds'][steps]:.0f}" for steps in ("50", "25", "10")]

    def gib(row):
        return f"{row['peak_mib'] / 1024:.1f} GiB"

    costs = {name: cost_of(name) for name in ("09-upscale-an-image", "10-paper-pipeline")}
    whole, small = upscaled["tiled, 256"], upscaled["tiled, 8-bit UNet, 256"]
    assert costs["09-upscale-an-image"].endswith(
        f"from 256 x 256 one step and decoding took {whole['seconds']:.0f} s on one processor "
        f"core, in {gib(whole)} ({gib(small)} in 8 bits); from 1024 x 1024 it took "
        f"{gib(upscaled['tiled, 1024'])}."
    )
    [a, b, c], [d, e, f] = seconds("fine-tuned INT8"), seconds("float")
    assert costs["10-paper-pipeline"].endswith(
        f"50, 25 and 10 steps: **{a}, {b} and {c} s** and {gib(drawn['fine-tuned INT8'])} in "
        f"INT8, where float takes {d}, {e} and {f} s and {gib(drawn['float'])}."
    )
