"""Load Starter Model."""

from comfy_api.latest import io


class LoadStarterModel(io.ComfyNode):
    """The small model that ships with the pack."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneLoadStarterModel",
            display_name="Load Starter Model",
            category="QuantTune/loaders",
            description="Loads the small text-to-image model that ships with QuantTune, so that "
                        "every workflow runs without a download, on a laptop CPU. It draws simple "
                        "coloured objects at 128 x 128 pixels.",
            search_aliases=["starter", "demo model", "checkpoint"],
            outputs=[
                io.Model.Output("model", display_name="MODEL",
                                tooltip="The UNet, in float: SD1 family, 16 x 16 latents."),
                io.Clip.Output("clip", display_name="CLIP",
                               tooltip="Its small text encoder, for CLIP Text Encode."),
                io.Vae.Output("vae", display_name="VAE", tooltip="Its small autoencoder."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from ..starter.load import load_starter

        return io.NodeOutput(*load_starter())
