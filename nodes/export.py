"""Export Float UNet: any MODEL as an ordinary one, for use elsewhere."""

from comfy_api.latest import io, ui

from ..host.export_unet import COMFYUI, DTYPES, FORMATS, export_unet


class ExportUNet(io.ComfyNode):
    """MODEL with whatever is on it to a float MODEL and a file."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneExportUNet",
            display_name="Export Float UNet",
            category="QuantTune/savers",
            description="Writes any model as an ordinary float UNet for use elsewhere: quantized "
                        "weights are dequantized, LoRAs and scales are merged. As one file with "
                        "the names of original checkpoints, which ComfyUI and others load, or as "
                        "a folder of diffusers.",
            search_aliases=["merge", "bake", "dequantize", "diffusers", "save checkpoint"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="Any model: quantized, scaled, with LoRAs, GGUF, "
                                                "fp8, bitsandbytes."),
                io.Combo.Input("format", options=list(FORMATS), default=COMFYUI,
                               tooltip="One file for ComfyUI and other programs, a folder for "
                                       "UNet2DConditionModel of diffusers, or no file: the MODEL "
                                       "output then goes into ComfyUI's own save and merge "
                                       "nodes."),
                io.Combo.Input("dtype", options=list(DTYPES), default="float16",
                               tooltip="float16 is what most programs expect; float32 rounds "
                                       "nothing."),
                io.String.Input("filename_prefix", default="diffusion_models/merged",
                                tooltip="Name of the file or folder in the output folder; a "
                                        "number is added."),
                io.Int.Input("interval", default=0, min=0, max=1000,
                             tooltip="Of scales with several experts, the one to merge: 1 is that "
                                     "of the least noise. 0 for scales with one expert, or "
                                     "none."),
            ],
            outputs=[
                io.Model.Output("merged", display_name="MODEL",
                                tooltip="The float model, for ComfyUI's own nodes."),
                io.String.Output("path", display_name="path",
                                 tooltip="Where it was written; empty for no file."),
            ],
        )

    @classmethod
    def execute(cls, model, format, dtype, filename_prefix, interval) -> io.NodeOutput:
        merged, path, summary = export_unet(model, format, dtype, filename_prefix, interval)
        return io.NodeOutput(merged, path, ui=ui.PreviewText(summary))
