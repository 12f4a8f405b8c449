"""Layer Times."""

from comfy_api.latest import io, ui

from ..host.dynamic_int8 import PRECISIONS
from ..host.images import as_image
from ..host.layer_times import layer_times
from ..host.samples import conditioning_of
from .sampler_inputs import prompt_inputs
from .types import LAYER_TIMES


class LayerTimesNode(io.ComfyNode):
    """Float MODEL to what each layer takes in float and in integers."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneLayerTimes",
            display_name="Layer Times",
            category="QuantTune/measure",
            is_output_node=True,
            description="Times each layer of a float model on this machine, in float and as a "
                        "product of 8-bit integers, on what a step of the sampler gives it to "
                        "read. 'Bit Plan' makes of it the least error in a given time.",
            search_aliases=["latency", "latency budget", "profile", "mixed precision"],
            inputs=[
                io.Model.Input("model", tooltip="The float model, LoRAs included."),
                io.Latent.Input("latent", tooltip="Size and batch to time at ('Empty Latent "
                                                  "Image'): those you will use, since other sizes "
                                                  "favour other layers."),
                *prompt_inputs("Any prompt; its length counts, not its content. Of several lines "
                               "the first is taken."),
                io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1,
                               tooltip="As in the KSampler that will use the model. 1 runs the "
                                       "model once a step, anything else for both prompts."),
                io.Int.Input("rounds", default=5, min=1, max=100,
                             tooltip="Measurements of each layer and of the step, in turns; their "
                                     "median counts. A step and twice its layers are run for "
                                     "each."),
                io.Combo.Input("precision", options=list(PRECISIONS), default="auto",
                               tooltip="What float means, as in the 'Dynamic INT8' that will take "
                                       "the plan. 'auto' is bfloat16 on processors that are fast "
                                       "at it, and as before elsewhere."),
            ],
            outputs=[
                LAYER_TIMES.Output("times", display_name="times",
                                   tooltip="For 'Bit Plan' and 'Pareto Front'."),
                io.Image.Output("chart", display_name="chart",
                                tooltip="Time of each kind of layer, in float and in integers."),
                io.String.Output("report", display_name="report",
                                 tooltip="What a step consists of, the least time that a plan can "
                                         "have, and the layers that integers do not make faster."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, latent, prompts, cfg, rounds, precision, clip=None, positive=None,
                negative=None) -> io.NodeOutput:
        positive, negative = conditioning_of(clip, prompts, positive, negative)
        found = layer_times(model, latent, positive, negative, cfg, rounds, precision,
                            cls.hidden.unique_id)
        chart, report = as_image(found.chart()), found.report()
        return io.NodeOutput(found, chart, report,
                             ui={**ui.PreviewImage(chart, cls=cls).as_dict(),
                                 **ui.PreviewText(report).as_dict()})
