"""Dynamic INT8."""

from comfy_api.latest import io

from ..host.dynamic_int8 import GRANULARITIES, LAYERS, PRECISIONS, RANGES, dynamic_int8
from .shown import KEPT, shown_model
from .types import BIT_PLAN


class DynamicInt8(io.ComfyNode):
    """MODEL to a MODEL that multiplies integers."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneDynamicInt8",
            display_name="Dynamic INT8",
            category="QuantTune/int8",
            description="Makes the Linear layers and convolutions of a model multiply 8-bit "
                        "integers, with activations quantized as they come (W8A8, or W4A8 on a "
                        "4-bit base): faster on processors, at half the memory of fp16. LoRA and "
                        "TuneQDM scales go before or after.",
            search_aliases=["int8", "w8a8", "w4a8", "fast cpu", "quantized inference"],
            **KEPT,
            inputs=[
                io.Model.Input("model", tooltip="A float model, or one from 'Quantize UNet' or "
                                                "'Load Quantized UNet'."),
                io.Combo.Input("layers", options=list(LAYERS), default="all",
                               tooltip="Which layers multiply integers. 'convolutions' leaves "
                                       "attention and feed-forward in float, the choice for a "
                                       "laptop when colours or fine structure suffer."),
                io.Combo.Input("precision", options=list(PRECISIONS), default="auto",
                               tooltip="What everything else computes in. 'auto' is bfloat16 on "
                                       "processors that are fast at it, and as before elsewhere."),
                io.Combo.Input("granularity", options=list(GRANULARITIES), default="auto",
                               advanced=True,
                               tooltip="What shares one activation scale in a Linear: the whole "
                                       "tensor (fastest on processors) or each token (finer). "
                                       "'auto' takes what suits the device."),
                io.Boolean.Input("fast_attention", default=True, advanced=True,
                                 tooltip="On a processor, use PyTorch's own attention, several "
                                         "times faster than what ComfyUI takes there by default."),
                io.Combo.Input("ranges", options=list(RANGES), default=RANGES[0], advanced=True,
                               tooltip="Of a model from 'Calibrate INT8': take its static "
                                       "activation ranges, or find them at run time all the same. "
                                       "Other models have none, and it makes no difference."),
                BIT_PLAN.Input("plan", optional=True,
                               tooltip="From 'Bit Plan' with budget = time: its layers of 8 bits "
                                       "multiply integers, the others stay in float. 'layers' has "
                                       "to be 'all' then."),
            ],
            outputs=[
                io.Model.Output("model_int8", display_name="MODEL",
                                tooltip="The model with integer products; the source is "
                                        "unchanged."),
                io.String.Output("note", display_name="note",
                                 tooltip="What runs on this machine, and what it gains here."),
            ],
        )

    @classmethod
    def execute(cls, model, layers, precision, granularity, fast_attention,
                ranges=RANGES[0], plan=None) -> io.NodeOutput:
        fast, note = dynamic_int8(model, layers, precision, granularity, fast_attention, ranges,
                                  plan=plan)
        return io.NodeOutput(fast, note, ui=shown_model(fast, note))
