"""Quantize UNet."""

from comfy_api.latest import io

from ..host.quantize import quantize_model
from ..quant import QUANTIZE_PRESETS, QuantSpec, QuantTuneError
from .shown import KEPT, shown_model
from .types import BIT_PLAN

PATTERN = "pattern"


class QuantizeUNet(io.ComfyNode):
    """MODEL to quantized MODEL."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneQuantizeUNet",
            display_name="Quantize UNet",
            category="QuantTune/quantize",
            description="Turns the Linear and convolution weights of a model into integers of 2, "
                        "3, 4 or 8 bits, once (TuneQDM, eq. 1-2). Everything downstream works as "
                        "before: samplers, LoRA, ControlNet.",
            search_aliases=["int8", "int4", "4-bit", "8-bit", "compress"],
            **KEPT,
            inputs=[
                io.Model.Input("model", tooltip="A float model: SD1.x, SD2.x, SDXL or another "
                                                "diffusion model."),
                io.Combo.Input("bits", options=["8", "4", "3", "2"], default="4",
                               tooltip="Bits per weight. 8 is hardly visible; 4 is eight times "
                                       "smaller than fp32; 3 and 2 need fine-tuned scales."),
                io.Combo.Input("range", options=["minmax", "mse"], default="mse",
                               tooltip="How each output channel's range is chosen: 'mse' clips "
                                       "outliers where that lowers the squared error (slower once, "
                                       "better at 4 bits and less); 'minmax' keeps the extremes."),
                io.Boolean.Input("symmetric", default=False, advanced=True,
                                 tooltip="Fix the zero-point in the middle of the range. Off is "
                                         "more exact."),
                io.Combo.Input("keep_float", options=[*QUANTIZE_PRESETS, PATTERN],
                               default="none",
                               tooltip="Layers that stay in float: none, the first and last "
                                       "convolution, the time embedding, both, or those that "
                                       "match the pattern below."),
                io.String.Input("pattern", default="", advanced=True,
                                placeholder="input_blocks.0.*, *attn2*",
                                tooltip="With keep_float = pattern: comma-separated layer names "
                                        "to keep in float; * matches anything."),
                io.Boolean.Input("split_shortcuts", default=True, advanced=True,
                                 tooltip="Give the two inputs that meet in a UNet's shortcut "
                                         "convolutions a scale each, as Q-Diffusion does: a few KB "
                                         "more, less error there."),
                BIT_PLAN.Input("plan", optional=True,
                               tooltip="From 'Bit Plan': bits of each layer, in place of 'bits'."),
            ],
            outputs=[
                io.Model.Output("quantized", display_name="MODEL",
                                tooltip="The quantized model."),
                io.String.Output("report", display_name="report",
                                 tooltip="Layers, size before and after, weight error."),
            ],
        )

    @classmethod
    def execute(cls, model, bits, range, symmetric, keep_float, pattern, split_shortcuts,
                plan=None) -> io.NodeOutput:
        spec = QuantSpec(bits=int(bits), symmetric=symmetric, range=range)
        keep = pattern if keep_float == PATTERN else keep_float
        if not keep.strip(" ,"):
            raise QuantTuneError(
                "keep_float is 'pattern', but the pattern is empty; write layer names such as "
                "'*attn2*', or set keep_float to 'none'.")
        quantized, report = quantize_model(model, spec, keep, split_shortcuts=split_shortcuts,
                                          plan=plan)
        return io.NodeOutput(quantized, str(report), ui=shown_model(quantized, str(report)))
