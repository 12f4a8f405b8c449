"""Load Diffusers UNet."""

from comfy_api.latest import io

from ..host.load_unet import load_unet
from ..host.precision import PRECISIONS
from ..host.unet_files import find_unet_source, unet_names, unet_state
from ..quant import QuantTuneError
from .shown import KEPT, shown_model


class LoadDiffusersUNet(io.ComfyNode):
    """A diffusers folder, or a file with a UNet, to MODEL."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneLoadDiffusersUNet",
            display_name="Load Diffusers UNet",
            category="QuantTune/loaders",
            description="Loads the UNet of an SD1.x, SD2.x, SDXL or SDXL refiner model from a "
                        "diffusers folder, whole or in shards, or from a file of any kind: "
                        "diffusers' names or the original ones, fp32, fp16, bf16 or fp8, "
                        "safetensors or ckpt. In 8 or 4 bits it goes straight to integers, so that "
                        "the float model is never in memory.",
            search_aliases=["diffusers", "unet loader", "huggingface", "shards", "fp8"],
            **KEPT,
            inputs=[
                io.Combo.Input("unet", options=unet_names(),
                               tooltip="A folder in models/diffusers (its name ends in /), or a "
                                       "file in models/diffusion_models or models/checkpoints."),
                io.Combo.Input("precision", options=list(PRECISIONS), default="float",
                               tooltip="8-bit is hardly visible and takes a quarter of fp32; 4-bit "
                                       "half of that; dynamic INT8 also multiplies integers, "
                                       "which is faster on processors."),
            ],
            outputs=[io.Model.Output("model", display_name="MODEL",
                                     tooltip="The UNet; text encoder and VAE come from their own "
                                             "loaders.")],
        )

    @classmethod
    def validate_inputs(cls, unet):
        # In place of ComfyUI's own check, which would not say what to put where. A name that
        # another node gives is not known yet.
        if unet is None:
            return True
        try:
            find_unet_source(unet)
        except QuantTuneError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, unet, precision):
        return "" if unet is None else unet_state(unet)  # another node's name

    @classmethod
    def execute(cls, unet, precision) -> io.NodeOutput:
        model = load_unet(unet, precision)
        return io.NodeOutput(model, ui=shown_model(model))
