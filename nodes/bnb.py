"""bitsandbytes Quantize."""

from comfy_api.latest import io

from ..host.bnb import KINDS
from ..host.bnb_quantize import quantize_bnb
from .shown import KEPT, shown_model


class BitsandbytesQuantize(io.ComfyNode):
    """Float MODEL to MODEL with bitsandbytes' Linear layers."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneBitsandbytes",
            display_name="bitsandbytes Quantize",
            category="QuantTune/quantize",
            description="Turns the Linear layers of a float model into NF4, FP4 or LLM.int8 of "
                        "bitsandbytes, to compare with and to train LoRAs on (QLoRA). "
                        "Convolutions stay in float, since bitsandbytes has none; 'Quantize UNet' "
                        "quantizes them, too.",
            search_aliases=["nf4", "fp4", "llm.int8", "qlora", "bnb"],
            **KEPT,
            inputs=[
                io.Model.Input("model", tooltip="A float model."),
                io.Combo.Input("kind", options=list(KINDS), default=KINDS[0],
                               tooltip="nf4 and fp4 take 4.5 bits a weight, int8 takes 8. Only "
                                       "weights are rounded, of int8 as well."),
                io.String.Input("keep_float", default="", advanced=True,
                                placeholder="time_embed.*, *attn2*",
                                tooltip="Comma-separated names of Linear layers to keep in float; "
                                        "* matches anything."),
            ],
            outputs=[
                io.Model.Output("quantized", display_name="MODEL",
                                tooltip="For samplers, LoRAs, scales, 'LoRA Train', 'Benchmark "
                                        "Model' and 'Export Float UNet'."),
                io.String.Output("report", display_name="report",
                                 tooltip="Layers, what stays in float, sizes, weight error."),
            ],
        )

    @classmethod
    def execute(cls, model, kind, keep_float) -> io.NodeOutput:
        quantized, report = quantize_bnb(model, kind, keep_float)
        return io.NodeOutput(quantized, str(report), ui=shown_model(quantized, str(report)))
