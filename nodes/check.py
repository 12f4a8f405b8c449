"""Check Quantized Model."""

import torch
from comfy_api.latest import io, ui

from ..host.check import check_model
from ..host.pictures import SamplingSettings


class CheckQuantizedModel(io.ComfyNode):
    """Quantized MODEL to a verdict."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneCheckModel",
            display_name="Check Quantized Model",
            category="QuantTune/measure",
            is_output_node=True,
            description="Is a quantized model in order? Looks at its tensors, runs it from noise "
                        "to picture, measures memory, compares it with the float model if that is "
                        "connected, makes a picture, and says what it thinks.",
            search_aliases=["validate", "verify", "test model"],
            inputs=[
                io.Model.Input("model", tooltip="From 'Quantize UNet', 'Load Quantized UNet', "
                                                "'Dynamic INT8', 'Calibrate INT8' or 'Apply "
                                                "TuneQDM Scales'."),
                io.Clip.Input("clip", tooltip="Reads the prompt."),
                io.Vae.Input("vae", tooltip="Decodes the picture."),
                io.Model.Input("reference", optional=True,
                               tooltip="The float model, to compare with; without it nothing is "
                                       "said of how good the model is. Leave it away for a model "
                                       "with scales, which is meant to differ."),
                io.String.Input("prompt", multiline=True, default="a red star on a blue "
                                                                  "background",
                                tooltip="Of the picture; something the model is good at."),
                io.Int.Input("size", default=512, min=64, max=4096, step=8,
                             tooltip="Width and height of the picture: 128 for the starter model, "
                                     "512 for SD1.5, 1024 for SDXL."),
                io.Int.Input("steps", default=12, min=1, max=1000,
                             tooltip="Of the picture."),
                io.Float.Input("cfg", default=5.0, min=0.0, max=30.0, step=0.5,
                               tooltip="Guidance."),
                io.Int.Input("seed", default=0, min=0, max=2**53 - 1,
                             control_after_generate=False, tooltip="Of the noise."),
            ],
            outputs=[
                io.String.Output("report", display_name="report",
                                 tooltip="The verdict and what it rests on."),
                io.Boolean.Output("usable", display_name="usable",
                                  tooltip="False if the model must not be used. True if it "
                                          "computes and, with a reference, is near it; without "
                                          "one nothing is known of how good it is."),
                io.Image.Output("picture", display_name="picture",
                                tooltip="Of the prompt; black if the model cannot make one."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, clip, vae, prompt, size, steps, cfg, seed,
                reference=None) -> io.NodeOutput:
        settings = SamplingSettings(size, size, steps, cfg, seed=seed)
        check = check_model(model, clip, vae, prompt, settings, reference, cls.hidden.unique_id)
        picture = torch.zeros(1, size, size, 3) if check.picture is None else check.picture
        return io.NodeOutput(check.report, not check.faults, picture,
                             ui={**ui.PreviewImage(picture, cls=cls).as_dict(),
                                 **ui.PreviewText(check.report).as_dict()})
