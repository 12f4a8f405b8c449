"""Augment Training Images."""

from comfy_api.latest import io

from ..host.augment import augment
from ..training.augment import Augmentation
from .training_images import Images, shown


class AugmentImages(io.ComfyNode):
    """Training images to more of them."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneAugmentImages",
            display_name="Augment Training Images",
            category="QuantTune/training",
            description="Adds mirrored, cropped and recoloured copies of each picture, so that "
                        "few pictures are not learnt by heart. Class images stay as they are.",
            search_aliases=["augmentation", "flip", "random crop", "color jitter", "dataset"],
            inputs=[
                Images.Input("images", tooltip="From 'Training Images'."),
                io.Int.Input("copies", default=4, min=1, max=1000,
                             tooltip="Variants of each picture; the first is the picture itself. "
                                     "As many times longer takes the encoding, once."),
                io.Float.Input("flip", default=0.5, min=0.0, max=1.0, step=0.05,
                               tooltip="Share of the variants that are mirrored. Set 0 for text, "
                                       "for faces that have to be recognised, and for whatever "
                                       "has a left and a right side."),
                io.Float.Input("crop", default=0.1, min=0.0, max=0.9, step=0.01,
                               tooltip="Most of a side that is cut off at random; the rest is "
                                       "enlarged to the size before, its shape kept. Large crops "
                                       "teach close-ups."),
                io.Float.Input("colour", default=0.1, min=0.0, max=1.0, step=0.01,
                               tooltip="Most that brightness, contrast and saturation change, as "
                                       "a share; the hue turns a little. Set 0 for a style, or a "
                                       "subject known by its colour."),
                io.Int.Input("seed", default=0, min=0, max=2**53 - 1,
                             control_after_generate=False,
                             tooltip="The same seed and pictures give the same variants."),
            ],
            outputs=[
                Images.Output("training_images", display_name="training images",
                              tooltip="The pictures and their variants, for a training node."),
                io.Image.Output("sheet", display_name="contact sheet",
                                tooltip="The first pictures, each with its variants beside it."),
                io.String.Output("report", display_name="report",
                                 tooltip="How many there are now, and of which shapes."),
            ],
        )

    @classmethod
    def execute(cls, images, copies, flip, crop, colour, seed) -> io.NodeOutput:
        found = augment(images, Augmentation(copies, flip, crop, colour, seed))
        return shown(cls, found, columns=max(2, min(copies, 8)))
