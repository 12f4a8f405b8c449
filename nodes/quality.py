"""Compare Images and Image Set Quality."""

from comfy_api.latest import io, ui

from ..host.folders import file_state, metric_files, metric_path
from ..host.images import as_image, folder_state
from ..host.quality import (
    CLIP_VISION,
    NETWORKS,
    NONE,
    NOT_MEASURED,
    STARTER,
    compare_images,
    image_set_quality,
)


class CompareImages(io.ComfyNode):
    """Two IMAGE batches to their SSIM, PSNR, LPIPS and a picture of the difference."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneCompareImages",
            display_name="Compare Images",
            category="QuantTune/measure",
            description="How much images differ from a reference, one by one: SSIM, PSNR, LPIPS, "
                        "and the difference as a picture. For what quantization changed at one "
                        "seed.",
            search_aliases=["ssim", "psnr", "lpips", "difference", "metrics"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The images to judge."),
                io.Image.Input("reference", tooltip="What each should look like: as many images, "
                                                    "or a single one for all, of the same size."),
                io.Combo.Input("lpips_network", options=[NONE, *metric_files()], default=NONE,
                               optional=True,
                               tooltip="AlexNet, VGG16 or SqueezeNet 1.1 weights of torchvision in "
                                       "models/quanttune_metrics; with 'none' LPIPS is not "
                                       "measured."),
                io.Float.Input("amplify", default=4.0, min=1.0, max=64.0, step=0.5, optional=True,
                               tooltip="How many times the difference is multiplied in the "
                                       "picture; the numbers do not change."),
            ],
            outputs=[
                io.Image.Output("difference", display_name="difference",
                                tooltip="Reference, image and amplified difference in each row."),
                io.Float.Output("ssim", display_name="SSIM",
                                tooltip="Structural similarity, mean; 1 is identical."),
                io.Float.Output("psnr", display_name="PSNR",
                                tooltip="Signal-to-noise ratio in dB, mean; more is closer, 100 "
                                        "stands for identical."),
                io.Float.Output("lpips", display_name="LPIPS",
                                tooltip="Perceptual distance, mean; 0 is identical, -1 means not "
                                        "measured."),
                io.String.Output("report", display_name="report",
                                 tooltip="The numbers of each image."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lpips_network=NONE, **kwargs):
        return "" if lpips_network in (NONE, None) else file_state(metric_path(lpips_network))

    @classmethod
    def execute(cls, images, reference, lpips_network=NONE, amplify=4.0) -> io.NodeOutput:
        found = compare_images(images, reference, lpips_network, amplify)
        picture = as_image(found.picture)
        return io.NodeOutput(picture, found.ssim, found.psnr, found.lpips, found.report,
                             ui={**ui.PreviewImage(picture, cls=cls).as_dict(),
                                 **ui.PreviewText(found.report).as_dict()})


class ImageSetQuality(io.ComfyNode):
    """A set of images to FID, KID, IS, CLIP-I or DINO-I, and CLIP-T."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneImageSetQuality",
            display_name="Image Set Quality",
            category="QuantTune/measure",
            description="How good a set of images is: its distance to a reference set (FID, KID), "
                        "the likeness of a subject (CLIP-I, DINO-I), obedience to prompts "
                        "(CLIP-T), and variety (IS). What is not connected is not measured.",
            search_aliases=["fid", "kid", "inception score", "clip score", "dino", "metrics"],
            is_output_node=True,
            inputs=[
                io.Combo.Input("network", options=list(NETWORKS), default=STARTER,
                               tooltip=f"What looks at the images: '{STARTER}' needs no download "
                                       "and knows the starter model's pictures; "
                                       f"'{CLIP_VISION}' is the CLIP or DINOv2 connected to "
                                       "'clip_vision'."),
                io.String.Input("folder", default="",
                                tooltip="A folder of images to measure: of ComfyUI's input folder "
                                        "or a full path. Added to connected images."),
                io.String.Input("reference_folder", default="",
                                tooltip="A folder of reference images, in the same way."),
                io.String.Input("captions", default="", multiline=True,
                                tooltip="What the images should show, one text a line, used in "
                                        "turn; for text similarity, with clip and clip_vision."),
                io.Image.Input("images", optional=True, tooltip="The images to measure."),
                io.Image.Input("reference", optional=True,
                               tooltip="Real images, those of the float model, or photos of the "
                                       "subject."),
                io.ClipVision.Input("clip_vision", optional=True,
                                    tooltip=f"With network = {CLIP_VISION}: from 'Load CLIP "
                                            "Vision'."),
                io.Clip.Input("clip", optional=True,
                              tooltip="Reads the captions: the text half of the same CLIP model."),
            ],
            outputs=[
                io.Float.Output("fid", display_name="FID",
                                tooltip="Distance to the reference set, 0 when alike; -1 means not "
                                        "measured."),
                io.Float.Output("kid", display_name="KID",
                                tooltip="Unbiased distance to the reference set, about 0 when "
                                        "alike; -1 means not measured."),
                io.Float.Output("inception_score", display_name="IS",
                                tooltip="Variety and clearness, from 1 up; -1 means not "
                                        "measured."),
                io.Float.Output("image_similarity", display_name="image similarity",
                                tooltip="CLIP-I or DINO-I: mean cosine with the reference images, "
                                        "up to 1; -1 means not measured."),
                io.Float.Output("text_similarity", display_name="text similarity",
                                tooltip="CLIP-T: mean cosine with the captions, up to 1; -1 means "
                                        "not measured."),
                io.String.Output("report", display_name="report",
                                 tooltip="All of it, and what the numbers are worth."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder="", reference_folder="", **kwargs):
        return str([folder_state(f) for f in (folder, reference_folder) if f and f.strip()])

    @classmethod
    def execute(cls, network, folder, reference_folder, captions, images=None, reference=None,
                clip_vision=None, clip=None) -> io.NodeOutput:
        quality, report = image_set_quality(images, folder, reference, reference_folder, network,
                                            clip_vision, clip, captions)
        values = (quality.fid, quality.kid, quality.inception_score, quality.image_similarity,
                  quality.text_similarity)
        return io.NodeOutput(*(NOT_MEASURED if v is None else v for v in values), report,
                             ui=ui.PreviewText(report))
