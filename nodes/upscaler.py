"""Load SD 4x Upscaler."""

from comfy_api.latest import io

from ..host.load_upscaler import load_upscaler
from ..host.precision import PRECISIONS
from ..host.upscaler_files import SHIPPED, find_upscaler, upscaler_names, upscaler_state
from ..quant import QuantTuneError
from .shown import KEPT, shown_model


class LoadUpscaler(io.ComfyNode):
    """A folder or file to MODEL, CLIP and VAE of an upscaler."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneLoadUpscaler",
            display_name="Load SD 4x Upscaler",
            category="QuantTune/upscale",
            description="Loads Stable Diffusion's x4 upscaler for 'SD 4x Upscale': from a "
                        "diffusers folder, from a single file, or the small one that ships with "
                        "the pack. Nothing is downloaded.",
            search_aliases=["x4 upscaler", "stable-diffusion-x4-upscaler", "diffusers", "upscale"],
            **KEPT,
            inputs=[
                io.Combo.Input("upscaler", options=upscaler_names(), default=SHIPPED,
                               tooltip="The shipped one, a folder of "
                                       "stabilityai/stable-diffusion-x4-upscaler in "
                                       "models/diffusers, or x4-upscaler-ema.safetensors in "
                                       "models/checkpoints."),
                io.Combo.Input("precision", options=list(PRECISIONS), default="float",
                               tooltip="Of the UNet. 8-bit is hardly visible and takes a quarter "
                                       "of fp32; 4-bit half of that; dynamic INT8 also multiplies "
                                       "integers, which is faster on processors."),
            ],
            outputs=[
                io.Model.Output("model", display_name="MODEL",
                                tooltip="The upscaler's UNet."),
                io.Clip.Output("clip", display_name="CLIP",
                               tooltip="Its text encoder, for CLIP Text Encode; nothing when a "
                                       "single file comes without one."),
                io.Vae.Output("vae", display_name="VAE",
                              tooltip="Its autoencoder: 4 x 4 pixels for each pixel of a latent."),
            ],
        )

    @classmethod
    def validate_inputs(cls, upscaler):
        # In place of ComfyUI's own check, which would not say what to put where. A name that
        # another node gives is not known yet.
        try:
            find_upscaler(SHIPPED if upscaler is None else upscaler)
        except QuantTuneError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, upscaler, precision):
        return "" if upscaler is None else upscaler_state(upscaler)  # another node's name

    @classmethod
    def execute(cls, upscaler, precision) -> io.NodeOutput:
        model, clip, vae = load_upscaler(upscaler, precision)
        return io.NodeOutput(model, clip, vae, ui=shown_model(model))
