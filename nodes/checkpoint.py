"""Load Quantized UNet, Save Quantized UNet and Save for Stock ComfyUI."""

from comfy_api.latest import io, ui

from ..host import folders
from ..host.dynamic_int8 import load_ready
from ..host.save import save_for_stock, save_model
from ..host.unet_files import quantized_unet_state
from .shown import KEPT, shown_model


class LoadQuantizedUNet(io.ComfyNode):
    """A file of ours to MODEL."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneLoadQuantizedUNet",
            display_name="Load Quantized UNet",
            category="QuantTune/loaders",
            description="Loads a UNet that 'Save Quantized UNet' wrote, one of ComfyUI's own INT8 "
                        "files, a checkpoint of Q-Diffusion (.pth, .pt, .ckpt), or the integers "
                        "of a tuneqdm_state.pt in its pipeline's folder. The integers stay packed "
                        "in memory: a 4-bit SD1.5 UNet takes about 0.4 GB. A model from "
                        "'Calibrate INT8' multiplies integers at once; 'Dynamic INT8' after it "
                        "changes how.",
            search_aliases=["unet loader", "int4", "int8", "tuneqdm_state", "q-diffusion",
                            "import"],
            **KEPT,
            inputs=[
                io.Combo.Input("unet_name", options=folders.unet_files(),
                               tooltip="A file from models/quanttune, models/diffusion_models or "
                                       "models/unet."),
                io.Combo.Input("bits", options=["auto", "8", "4", "3", "2"], default="auto",
                               optional=True,
                               tooltip="Only for checkpoints of Q-Diffusion, which do not say how "
                                       "many bits they have: auto looks at the weights. Other "
                                       "files say it themselves."),
            ],
            outputs=[io.Model.Output("model", display_name="MODEL",
                                     tooltip="The quantized model.")],
        )

    @classmethod
    def fingerprint_inputs(cls, unet_name, bits="auto"):
        if unet_name is None:  # another node gives it
            return ""
        return quantized_unet_state(folders.unet_path(unet_name))

    @classmethod
    def execute(cls, unet_name, bits="auto") -> io.NodeOutput:
        declared = None if bits == "auto" else int(bits)
        model = load_ready(folders.unet_path(unet_name), unet_name, declared)
        return io.NodeOutput(model, ui=shown_model(model))


class SaveQuantizedUNet(io.ComfyNode):
    """Quantized MODEL to a file."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneSaveQuantizedUNet",
            display_name="Save Quantized UNet",
            category="QuantTune/savers",
            description="Writes a quantized model to one safetensors file that 'Load Quantized "
                        "UNet' reads. Scales applied to it are not part of the file; with a LoRA "
                        "on it, it is refused.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A quantized model, from before any LoRA."),
                io.String.Input("filename_prefix", default="quanttune/model",
                                tooltip="Name of the file in the output folder; a number is "
                                        "added. Names under quanttune/ appear in 'Load Quantized "
                                        "UNet'."),
            ],
            outputs=[io.String.Output("path", display_name="path",
                                      tooltip="Where the file was written.")],
        )

    @classmethod
    def execute(cls, model, filename_prefix) -> io.NodeOutput:
        path, summary = save_model(model, filename_prefix)
        return io.NodeOutput(path, ui=ui.PreviewText(summary))


class SaveForStock(io.ComfyNode):
    """Quantized MODEL to a file that needs no pack."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneSaveForStock",
            display_name="Save for Stock ComfyUI",
            category="QuantTune/savers",
            description="Writes a quantized model for people without this pack: ComfyUI's own "
                        "'Load Diffusion Model' runs its Linear layers in INT8. Convolutions, for "
                        "which ComfyUI has no integers, go back to float16.",
            search_aliases=["int8_tensorwise", "export", "native int8"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A model from 'Quantize UNet', best with 8 bits "
                                                "and symmetric: its Linear layers are written as "
                                                "they are. Other bits are rounded once more."),
                io.String.Input("filename_prefix", default="diffusion_models/model-int8",
                                tooltip="Name of the file in the output folder; a number is "
                                        "added. Move it to models/diffusion_models."),
            ],
            outputs=[io.String.Output("path", display_name="path",
                                      tooltip="Where the file was written.")],
        )

    @classmethod
    def execute(cls, model, filename_prefix) -> io.NodeOutput:
        path, summary = save_for_stock(model, filename_prefix)
        return io.NodeOutput(path, ui=ui.PreviewText(summary))
