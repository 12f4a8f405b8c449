"""Load, save and merge LoRAs."""

from comfy_api.latest import io, ui

from ..host import folders
from ..host.apply_lora import apply_lora
from ..host.lora_export import FORMATS, KOHYA, save_in_format
from ..host.lora_file import DTYPES, read_lora
from ..host.merge_lora import merge_lora, notes
from ..quant import SUPPORTED_BITS, QuantTuneError
from .shown import KEPT, shown_model
from .types import LORA_MODEL

CONNECTED = "(connected LoRA)"
AS_IT_IS = "as it is"


class LoadLora(io.ComfyNode):
    """MODEL and a LoRA to MODEL and the LoRA itself, with a look at the file first."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneLoadLora",
            display_name="Load LoRA (quantized)",
            category="QuantTune/lora",
            description="Puts a LoRA on a quantized or float model, as ComfyUI's own 'Load LoRA' "
                        "does, and says how much of it fits. Packed integers are not rounded "
                        "again. Reads files of ComfyUI, kohya's tools, diffusers and peft. Chain "
                        "several.",
            search_aliases=["lora", "lora loader", "apply lora", "dora", "peft"],
            **KEPT,
            inputs=[
                io.Model.Input("model", tooltip="Any model: float, quantized, or one that "
                                                "multiplies integers."),
                io.Combo.Input("lora_name", options=[CONNECTED, *folders.lora_files()],
                               tooltip="A file from models/loras, or the LoRA connected to "
                                       "'lora'."),
                io.Float.Input("strength_model", default=1.0, min=-100.0, max=100.0, step=0.01,
                               tooltip="0 is the model without it, 1 the LoRA as trained. Several "
                                       "chained LoRAs add up."),
                io.Float.Input("strength_clip", default=1.0, min=-100.0, max=100.0, step=0.01,
                               tooltip="The same for the text encoder, if a CLIP is connected."),
                io.Clip.Input("clip", optional=True,
                              tooltip="The text encoder, for LoRAs that change it too."),
                LORA_MODEL.Input("lora", optional=True,
                                 tooltip="From 'LoRA Train' or 'Train LoRA'; used when lora_name "
                                         f"is '{CONNECTED}'."),
            ],
            outputs=[
                io.Model.Output("patched", display_name="MODEL",
                                tooltip="The model with the LoRA; the input model stays as it was "
                                        "and shares its weights."),
                io.Clip.Output("patched_clip", display_name="CLIP",
                               tooltip="The text encoder with the LoRA; empty if none is "
                                       "connected."),
                io.String.Output("report", display_name="report",
                                 tooltip="How many layers matched, rank, alpha and strength."),
                LORA_MODEL.Output("lora", display_name="lora",
                                  tooltip="The LoRA itself, as the file holds it: for 'Save LoRA' "
                                          "and start_from of 'LoRA Train'."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model=None, lora_name=None, strength_model=None,
                           strength_clip=None, clip=None, lora=None):
        if lora_name in (None, CONNECTED):
            return ""
        return folders.file_state(folders.lora_path(lora_name))

    @classmethod
    def execute(cls, model, lora_name, strength_model, strength_clip, clip=None,
                lora=None) -> io.NodeOutput:
        if lora_name != CONNECTED:
            lora = read_lora(folders.lora_path(lora_name))
        elif lora is None:
            raise QuantTuneError("No LoRA is connected; choose a file in lora_name or connect "
                                 "'LoRA Train'.")
        patched, clip, report = apply_lora(model, clip, lora, strength_model, strength_clip)
        return io.NodeOutput(patched, clip, report, lora, ui=ui.PreviewText(report))


class SaveLora(io.ComfyNode):
    """LORA_MODEL to a file."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneSaveLora",
            display_name="Save LoRA",
            category="QuantTune/lora",
            description="Writes a LoRA to a safetensors file that ComfyUI's own 'Load LoRA' and "
                        "kohya-style tools read, with the metadata that they show; or to a folder "
                        "that diffusers or peft load.",
            search_aliases=["export lora", "kohya", "diffusers", "peft"],
            is_output_node=True,
            inputs=[
                LORA_MODEL.Input("lora", tooltip="From 'LoRA Train', 'Load LoRA (quantized)', or "
                                                 "ComfyUI's own 'Train LoRA'."),
                io.String.Input("filename_prefix", default="loras/my_lora",
                                tooltip="Name of the file in the output folder; a number is added. "
                                        "Names under loras/ appear in 'Load LoRA'."),
                io.Combo.Input("dtype", options=list(DTYPES), default="float16",
                               tooltip="float16 is half the size and hardly different; float32 "
                                       "keeps every bit, for training on."),
                io.Combo.Input("format", options=list(FORMATS), default=KOHYA, optional=True,
                               tooltip="One file for ComfyUI and kohya's tools; or a folder with "
                                       "pytorch_lora_weights.safetensors for diffusers, or with "
                                       "adapter_model.safetensors and adapter_config.json for "
                                       "peft."),
                io.Model.Input("model", optional=True,
                               tooltip="The model that the LoRA is for; diffusers and peft know "
                                       "layers by their names in it."),
                io.Clip.Input("clip", optional=True,
                              tooltip="The text encoder, for LoRAs that change it too, in the "
                                      "formats of diffusers and peft."),
            ],
            outputs=[io.String.Output("path", display_name="path",
                                      tooltip="Where the file was written.")],
        )

    @classmethod
    def execute(cls, lora, filename_prefix, dtype, format=KOHYA, model=None,
                clip=None) -> io.NodeOutput:
        path, summary = save_in_format(lora, format, filename_prefix, dtype, model, clip)
        return io.NodeOutput(path, ui=ui.PreviewText(summary))


class MergeLora(io.ComfyNode):
    """Quantized MODEL with LoRAs on it to quantized MODEL without."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneMergeLora",
            display_name="Merge LoRA into Quantized UNet",
            category="QuantTune/lora",
            description="Adds the LoRAs on a quantized model to its weights and rounds the sums to "
                        "integers again, for those who want one file. The report says what that "
                        "costs; LoRAs that stay files of their own cost nothing.",
            search_aliases=["bake lora", "fuse lora"],
            **KEPT,
            inputs=[
                io.Model.Input("model", tooltip="A quantized model with one or more LoRAs on it, "
                                                "from any 'Load LoRA'."),
                io.Combo.Input("bits", options=[AS_IT_IS, *map(str, sorted(SUPPORTED_BITS,
                                                                          reverse=True))],
                               default="8",
                               tooltip="Bits of the layers that the LoRA changes. 8 keeps nearly "
                                       "all of it, at twice the size of 4."),
                io.Combo.Input("range", options=["minmax", "mse"], default="mse",
                               tooltip="How each output channel's range is chosen: 'mse' clips "
                                       "outliers where that lowers the squared error; 'minmax' "
                                       "keeps the extremes."),
            ],
            outputs=[
                io.Model.Output("merged", display_name="MODEL",
                                tooltip="The merged model, for 'Save Quantized UNet'."),
                io.String.Output("report", display_name="report",
                                 tooltip="The error of the new integers, how much of the LoRA they "
                                         "hold, and the worst layers."),
            ],
        )

    @classmethod
    def execute(cls, model, bits, range) -> io.NodeOutput:
        merged, report = merge_lora(model, 0 if bits == AS_IT_IS else int(bits), range)
        text = "\n".join([str(report), *notes(model)])
        return io.NodeOutput(merged, text, ui=shown_model(merged, text))
