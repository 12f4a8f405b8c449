"""Weight Change Map."""

from comfy.utils import ProgressBar
from comfy_api.latest import io, ui

from ..host.images import as_image
from ..host.weight_change import compare_models
from ..metrics.weight_change import change_boxes, change_map, change_table
from .shown import KEPT


class WeightChangeMap(io.ComfyNode):
    """Two MODELs to a picture of how their weights differ."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneWeightChangeMap",
            display_name="Weight Change Map",
            category="QuantTune/analyse",
            description="Draws how far fine-tuning moved the weights of a layer, as TuneQDM's "
                        "figure 2 does: a map, and box plots by output and by input channel. "
                        "Scales of outputs alone make stripes across, those of inputs stripes "
                        "down, a full fine-tune makes neither.",
            search_aliases=["heatmap", "compare models", "figure 2"],
            **KEPT,
            inputs=[
                io.Model.Input("base", tooltip="The model before."),
                io.Model.Input("tuned", tooltip="The same model after: with scales, a LoRA, "
                                                "quantized, or fine-tuned."),
                io.String.Input("layer", default="",
                                tooltip="Name of a layer; empty takes the one that changed most."),
                io.Int.Input("timestep", default=500, min=0, max=999,
                             tooltip="Scales differ by timestep; this one's experts are shown."),
            ],
            outputs=[
                io.Image.Output("map", display_name="map",
                                tooltip="Change of each weight, output channels down."),
                io.Image.Output("boxes", display_name="box plots",
                                tooltip="Spread of the change in each channel."),
                io.String.Output("table", display_name="table",
                                 tooltip="The most changed layers."),
            ],
        )

    @classmethod
    def execute(cls, base, tuned, layer, timestep) -> io.NodeOutput:
        bar = ProgressBar(1)
        name, changes = compare_models(base, tuned, layer, timestep, bar.update_absolute)
        picture, boxes = (as_image(draw(changes[name], name)) for draw in (change_map,
                                                                           change_boxes))
        table = change_table(changes)
        return io.NodeOutput(picture, boxes, table, ui={**ui.PreviewImage(picture, cls=cls)
                             .as_dict(), **ui.PreviewText(table).as_dict()})
