"""Apply, load and save TuneQDM scales."""

from comfy_api.latest import io, ui

from ..host import folders
from ..host.routing import apply_scale_set
from ..host.save import save_scales
from ..host.tuneqdm import read_scales
from ..quant import QuantTuneError
from .shown import KEPT

Scales = io.Custom("QUANTTUNE_SCALES")
CONNECTED = "(connected scales)"


def _scale_name_input(options, tooltip):
    return io.Combo.Input("scale_name", options=options, tooltip=tooltip)


class ApplyScales(io.ComfyNode):
    """MODEL and a scale set to a MODEL routed by timestep."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneApplyScales",
            display_name="Apply TuneQDM Scales",
            category="QuantTune/scales",
            description="Personalises a model with a scale set of a few MB. At every "
                        "denoising step the expert for that timestep is used (TuneQDM, eq. 5-6). "
                        "The model may be quantized, float, fp8, GGUF or of bitsandbytes. "
                        "Chain several to blend subjects.",
            search_aliases=["tuneqdm", "subject", "dreambooth", "experts"],
            **KEPT,
            inputs=[
                io.Model.Input("model", tooltip="The model the scales were trained on, or the same "
                                                "one in any other precision."),
                _scale_name_input([CONNECTED, *folders.scale_files()],
                                  "A file from models/quanttune_scales, or the scales connected "
                                  "to 'scales'."),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.05,
                               tooltip="0 is the base model, 1 the scales as trained; between and "
                                       "beyond interpolates. Several chained sets add up."),
                Scales.Input("scales", optional=True,
                             tooltip="Scales from another node; used when scale_name is "
                                     f"'{CONNECTED}'."),
            ],
            outputs=[io.Model.Output("routed", display_name="MODEL",
                                     tooltip="The model with the scales; the input model stays "
                                             "as it was and shares its weights.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model=None, scale_name=None, strength=None, scales=None):
        if scale_name in (None, CONNECTED):
            return ""
        return folders.file_state(folders.scales_path(scale_name))

    @classmethod
    def execute(cls, model, scale_name, strength, scales=None) -> io.NodeOutput:
        if scale_name != CONNECTED:
            scales = read_scales(folders.scales_path(scale_name))
        elif scales is None:
            raise QuantTuneError("No scales are connected; choose a file in scale_name or connect "
                                 "'Load TuneQDM Scales'.")
        routed, warnings = apply_scale_set(model, scales, strength, scale_name,
                                           cls.hidden.unique_id)
        text = "\n".join([f"{scales.num_experts} experts, {scales.num_parameters:,} scales",
                          *warnings])
        experts = {"experts": scales.num_experts, "timesteps": scales.num_timesteps}
        return io.NodeOutput(routed, ui={**ui.PreviewText(text).as_dict(),
                                         "quanttune_experts": [experts]})


class LoadScales(io.ComfyNode):
    """A scale file to scales."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneLoadScales",
            display_name="Load TuneQDM Scales",
            category="QuantTune/loaders",
            description="Reads a scale set, for 'Apply TuneQDM Scales' or to train on.",
            inputs=[_scale_name_input(folders.scale_files(),
                                      "A file from models/quanttune_scales, or the "
                                      "tuneqdm_state.pt of a training by TuneQDM's authors' "
                                      "code.")],
            outputs=[Scales.Output("scales", display_name="scales", tooltip="The scale set.")],
        )

    @classmethod
    def fingerprint_inputs(cls, scale_name):
        if scale_name is None:  # another node gives it
            return ""
        return folders.file_state(folders.scales_path(scale_name))

    @classmethod
    def execute(cls, scale_name) -> io.NodeOutput:
        return io.NodeOutput(read_scales(folders.scales_path(scale_name)))


class SaveScales(io.ComfyNode):
    """Scales to a file."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneSaveScales",
            display_name="Save TuneQDM Scales",
            category="QuantTune/savers",
            description="Writes a scale set to one small safetensors file.",
            is_output_node=True,
            inputs=[
                Scales.Input("scales", tooltip="The scale set to write."),
                io.String.Input("filename_prefix", default="quanttune_scales/subject",
                                tooltip="Name of the file in the output folder; a number is added. "
                                        "Names under quanttune_scales/ appear in the load nodes."),
            ],
            outputs=[io.String.Output("path", display_name="path",
                                      tooltip="Where the file was written.")],
        )

    @classmethod
    def execute(cls, scales, filename_prefix) -> io.NodeOutput:
        path, summary = save_scales(scales, filename_prefix)
        return io.NodeOutput(path, ui=ui.PreviewText(summary))
