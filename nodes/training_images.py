"""Training Images and Class Images."""

from comfy_api.latest import io, ui

from ..host.class_images import class_images
from ..host.images import (
    CAPTIONS,
    FITS,
    as_image,
    contact_sheet,
    folder_state,
    from_batch,
    image_folders,
    read_folder,
    report,
)
from ..host.pictures import SamplingSettings
from .shown import KEPT

Images = io.Custom("QUANTTUNE_IMAGES")
FOLDER = "(folder below)"


def _resolution():
    return io.Int.Input("resolution", default=512, min=64, max=2048, step=8,
                        tooltip="Size of the pictures in training: 128 for the starter model, 512 "
                                "for SD1.5, 1024 for SDXL.")


def shown(cls, images, warnings=(), columns=6) -> io.NodeOutput:
    """Training images, their contact sheet and a report, which the node also shows."""
    sheet = as_image(contact_sheet(images, columns=columns))
    text = report(images, warnings)
    return io.NodeOutput(images, sheet, text, ui={
        **ui.PreviewImage(sheet, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()})


class TrainingImagesNode(io.ComfyNode):
    """Folder or IMAGE batch to training images."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneTrainingImages",
            display_name="Training Images",
            category="QuantTune/training",
            description="Pictures of a subject, or of a style, with their captions, for 'Train "
                        "Scales (TuneQDM)' and 'LoRA Train'. Chain several for several subjects.",
            search_aliases=["dataset", "load images", "dreambooth"],
            **KEPT,
            inputs=[
                io.Combo.Input("folder", options=[*image_folders(), FOLDER],
                               tooltip="A subject that ships with the starter model, a folder of "
                                       "ComfyUI's input folder, or the path below."),
                io.String.Input("folder_path", default="",
                                tooltip=f"With folder = {FOLDER}: a folder of the input folder or "
                                        "a full path."),
                io.Combo.Input("captions", options=list(CAPTIONS), default=CAPTIONS[0],
                               tooltip="'text files': dog1.txt beside dog1.png, else the phrase; "
                                       "'one phrase': the phrase for all; 'none': train without "
                                       "words, for a style or a whole collection; "
                                       "'metadata.jsonl': a list in the folder, of file_name and "
                                       "caption (also .csv); 'dataset column': a Hugging Face "
                                       "dataset saved to disk, or its .parquet files."),
                io.String.Input("phrase", default="", multiline=True,
                                tooltip="What the pictures show, with a rare word for the subject: "
                                        "'a photo of a sks dog'. For connected images one line "
                                        "each is possible."),
                _resolution(),
                io.Combo.Input("fit", options=list(FITS), default=FITS[0],
                               tooltip="'centre crop' makes squares; 'keep shape' keeps wide and "
                                       "tall pictures so, at the same number of pixels."),
                io.Image.Input("images", optional=True,
                               tooltip="Images from the graph instead of a folder."),
                Images.Input("more", optional=True,
                             tooltip="Another subject, or class images, to train together with "
                                     "these."),
                io.String.Input("caption_column", default="text", optional=True,
                                tooltip="With metadata.jsonl or a dataset: the column of the "
                                        "captions. Empty: the phrase for all, or no words."),
                io.Int.Input("limit", default=0, min=0, max=10_000_000, optional=True,
                             tooltip="Only the first so many pictures of the folder; 0 for all."),
            ],
            outputs=[
                Images.Output("training_images", display_name="training images",
                              tooltip="For 'Train Scales (TuneQDM)' and 'LoRA Train', or for "
                                      "'Augment Training Images' before them."),
                io.Image.Output("sheet", display_name="contact sheet",
                                tooltip="The first pictures as they will be trained on."),
                io.String.Output("report", display_name="report",
                                 tooltip="How many, of which shapes, and what was left out."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder=None, folder_path="", captions=CAPTIONS[0], images=None,
                           **kwargs):
        if images is not None or folder is None:
            return ""
        return folder_state(folder_path if folder == FOLDER else folder, captions)

    @classmethod
    def execute(cls, folder, folder_path, captions, phrase, resolution, fit, images=None,
                more=None, caption_column="text", limit=0) -> io.NodeOutput:
        warnings = ()
        if images is not None:
            found = from_batch(images, "" if captions == "none" else phrase, resolution, fit)
        else:
            reading = read_folder(folder_path if folder == FOLDER else folder, captions, phrase,
                                  resolution, fit, caption_column=caption_column, limit=limit)
            found, warnings = reading.images, reading.warnings
        if more is not None:
            found = found.joined(more)
        return shown(cls, found, warnings)


class ClassImagesNode(io.ComfyNode):
    """Class images for prior preservation, made by the base model or from a folder."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneClassImages",
            display_name="Class Images",
            category="QuantTune/training",
            description="Pictures of the kind of thing that the subject is, for prior "
                        "preservation: trained beside the subject, they keep 'a dog' from "
                        "becoming your dog. Made once and kept on disk.",
            search_aliases=["prior preservation", "regularisation images", "dreambooth"],
            **KEPT,
            inputs=[
                io.Model.Input("model", tooltip="The model that will be trained, before training."),
                io.Clip.Input("clip", tooltip="Reads the class prompt."),
                io.Vae.Input("vae", tooltip="Turns latents into pictures."),
                io.String.Input("class_prompt", default="",
                                tooltip="The kind of thing, without the subject's word: 'a photo "
                                        "of a dog'."),
                io.Int.Input("count", default=50, min=1, max=10_000,
                             tooltip="How many; 50 to 200 is usual."),
                _resolution(),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Denoising steps."),
                io.Float.Input("cfg", default=5.0, min=0.0, max=30.0, step=0.5,
                               tooltip="Guidance."),
                io.Int.Input("seed", default=0, min=0, max=2**53 - 1,
                             control_after_generate=False, tooltip="Of the first picture."),
                io.String.Input("folder_path", default="", advanced=True,
                                tooltip="Read them from this folder instead of making them."),
            ],
            outputs=[
                Images.Output("class_images", display_name="class images",
                              tooltip="Connect to 'more' of 'Training Images'."),
                io.Image.Output("sheet", display_name="contact sheet",
                                tooltip="The first of them."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder_path="", **kwargs):
        return folder_state(folder_path) if folder_path and folder_path.strip() else ""

    @classmethod
    def execute(cls, model, clip, vae, class_prompt, count, resolution, steps, cfg, seed,
                folder_path) -> io.NodeOutput:
        warnings = ()
        if folder_path.strip():
            reading = read_folder(folder_path, "one phrase" if class_prompt.strip() else "none",
                                  class_prompt, resolution, prior=True)
            found, warnings = reading.images, reading.warnings
        else:
            found = class_images(model, clip, vae, class_prompt, count,
                                 SamplingSettings(resolution, resolution, steps, cfg, seed=seed))
        output = shown(cls, found, warnings)
        return io.NodeOutput(*output.args[:2], ui=output.ui)
