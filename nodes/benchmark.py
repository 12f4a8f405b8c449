"""Benchmark Model."""

from comfy_api.latest import io, ui

from ..host.benchmark import benchmark
from ..host.images import as_image
from ..quant import QuantTuneError

OTHERS = ("model_b", "model_c", "model_d")


class BenchmarkModel(io.ComfyNode):
    """MODELs to what each costs."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneBenchmarkModel",
            display_name="Benchmark Model",
            category="QuantTune/measure",
            is_output_node=True,
            description="Times one denoising step of up to four models on this machine, in turns "
                        "so that nothing else on it favours one, with memory and pictures an "
                        "hour. Differences are ratios to the first model.",
            search_aliases=["latency", "speed", "memory", "throughput", "profile"],
            inputs=[
                io.Model.Input("model", tooltip="What the others are compared with, usually the "
                                                "float model."),
                *[io.Model.Input(name, optional=True, tooltip="Another one of the same family.")
                  for name in OTHERS],
                io.Latent.Input("latent", tooltip="Size and batch to run at ('Empty Latent "
                                                  "Image')."),
                io.Conditioning.Input("positive", tooltip="Any prompt; its content does not "
                                                          "matter."),
                io.Conditioning.Input("negative", tooltip="Any prompt."),
                io.String.Input("names", multiline=True, default="float\n8 bits\n4 bits\nother",
                                tooltip="What to call the models, a line each in their order."),
                io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1,
                               tooltip="Guidance. 1 runs the model once a step, anything else for "
                                       "both prompts."),
                io.Int.Input("runs", default=10, min=1, max=1000,
                             tooltip="Timed steps of each model; 10 or more for a spread that "
                                     "means something."),
                io.Int.Input("warm_up", default=2, min=1, max=100,
                             tooltip="Steps of each before that, which compile, lay out weights "
                                     "and fill caches."),
                io.Int.Input("steps", default=20, min=1, max=10000,
                             tooltip="Steps that a picture takes, for 'images an hour'."),
            ],
            outputs=[
                io.String.Output("report", display_name="report",
                                 tooltip="The table, as Markdown."),
                io.Image.Output("chart", display_name="chart", tooltip="Time and memory."),
                io.String.Output("csv", display_name="csv", tooltip="The table for a "
                                                                    "spreadsheet."),
                io.Float.Output("seconds", display_name="seconds a step",
                                tooltip="Of the first model."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs):
        return float("nan")  # measured anew each time it is queued

    @classmethod
    def execute(cls, model, latent, positive, negative, names, cfg, runs, warm_up, steps,
                model_b=None, model_c=None, model_d=None) -> io.NodeOutput:
        given = [m for m in (model, model_b, model_c, model_d) if m is not None]
        lines = [line.strip() for line in names.splitlines() if line.strip()]
        if len(lines) < len(given):
            raise QuantTuneError(f"There are {len(given)} models and {len(lines)} names; write a "
                                 "line for each.")
        found = benchmark(list(zip(lines, given)), latent, positive, negative, cfg, runs, warm_up,
                          steps, cls.hidden.unique_id)
        chart, report = as_image(found.chart()), found.markdown()
        return io.NodeOutput(report, chart, found.csv(), found.costs[0].median,
                             ui={**ui.PreviewImage(chart, cls=cls).as_dict(),
                                 **ui.PreviewText(report).as_dict()})
