"""SD 4x Upscale."""

import comfy.samplers
import comfy.utils
from comfy_api.latest import io

from ..host.upscale import upscale
from ..host.upscale_inputs import SMALLEST_TILE, conditioning


class Upscale4x(io.ComfyNode):
    """IMAGE to one of four times its sides, by Stable Diffusion's x4 upscaler."""

    @classmethod
    def define_schema(cls):
        sampler = comfy.samplers.KSampler
        return io.Schema(
            node_id="QuantTuneUpscale4x",
            display_name="SD 4x Upscale",
            category="QuantTune/upscale",
            description="Makes images four times as large with Stable Diffusion's x4 upscaler, "
                        "tile by tile: tiles overlap and are blended at every step, so no seam "
                        "shows, and memory does not grow with the image. Any size and shape.",
            search_aliases=["upscale", "super resolution", "x4 upscaler", "enlarge", "tiled",
                            "StableDiffusionUpscalePipeline"],
            inputs=[
                io.Image.Input("image", tooltip="The images to enlarge; a batch is done one by "
                                                "one. Transparency is kept."),
                io.Model.Input("model", tooltip="The upscaler: from 'Load SD 4x Upscaler', or from "
                                                "'Load Checkpoint' with "
                                                "x4-upscaler-ema.safetensors."),
                io.Vae.Input("vae", tooltip="Its VAE, from the same loader."),
                io.Clip.Input("clip", optional=True,
                              tooltip="Its CLIP, which reads the prompts below; not needed with "
                                      "'positive' and 'negative'."),
                io.Conditioning.Input("positive", optional=True,
                                      tooltip="In place of 'prompt': when this is connected, it "
                                              "wins and 'prompt' is not read."),
                io.Conditioning.Input("negative", optional=True,
                                      tooltip="In place of 'negative_prompt': when this is "
                                              "connected, it wins and 'negative_prompt' is not "
                                              "read."),
                io.String.Input("prompt", multiline=True, default="",
                                tooltip="What the image shows; it guides the new detail. Needs "
                                        "clip; a connected 'positive' wins over it."),
                io.String.Input("negative_prompt", multiline=True, default="",
                                tooltip="What to keep out, such as blur. Needs clip; a connected "
                                        "'negative' wins over it."),
                io.Int.Input("noise_level", default=20, min=0, max=350,
                             tooltip="How noisy the image is made before it is enlarged: more lets "
                                     "the model invent more and repairs worse images, less stays "
                                     "closer."),
                io.Int.Input("steps", default=25, min=1, max=10000,
                             tooltip="Denoising steps; the time is proportional to them."),
                io.Float.Input("cfg", default=9.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="How closely the prompt is followed. 1 leaves the negative "
                                       "prompt out and takes half the time."),
                io.Int.Input("seed", default=0, min=0, max=2**53 - 1, control_after_generate=True,
                             tooltip="Of the noise; the same seed and settings give the same "
                                     "image. The second image of a batch takes seed + 1, and so "
                                     "on."),
                io.Combo.Input("sampler_name", options=sampler.SAMPLERS, default="ddim",
                               tooltip="Any of the KSampler's; ddim with ddim_uniform is what the "
                                       "upscaler's own pipeline does."),
                io.Combo.Input("scheduler", options=sampler.SCHEDULERS, default="ddim_uniform",
                               tooltip="Where the steps lie; see sampler_name."),
                io.Int.Input("tile_size", default=144, min=SMALLEST_TILE, max=4096, step=8,
                             tooltip="Longest side of a tile, in pixels of the image that comes "
                                     "in. Larger tiles need more memory; an image not larger than "
                                     "a tile is done whole."),
                io.Int.Input("overlap", default=16, min=0, max=2048, step=8,
                             tooltip="What neighbouring tiles share at least, in pixels of the "
                                     "image that comes in; more blends more softly and takes "
                                     "longer. 0 shows seams."),
                io.Boolean.Input("tile_vae", default=True,
                                 tooltip="Also decode by tiles, as the memory of decoding grows "
                                         "faster than the image. Off decodes the image whole."),
            ],
            outputs=[io.Image.Output("image", display_name="IMAGE",
                                     tooltip="The image, four times as wide and high.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, image, model, vae, prompt, negative_prompt, cfg, sampler_name, scheduler,
                clip=None, positive=None, negative=None, **settings) -> io.NodeOutput:
        positive, negative = conditioning(clip, prompt, negative_prompt, positive, negative, cfg)
        bar = comfy.utils.ProgressBar(1, node_id=cls.hidden.unique_id)
        return io.NodeOutput(upscale(model, vae, image, positive, negative, cfg=cfg,
                                     sampler=sampler_name, scheduler=scheduler,
                                     progress=bar.update_absolute, **settings))
