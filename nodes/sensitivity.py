"""Layer Sensitivity and Bit Plan."""

import torch
from comfy_api.latest import io, ui

from ..host.images import as_image
from ..host.plan import BUDGETS, SEARCHED, SIZE, bit_plan
from ..host.samples import conditioning_of
from ..host.sensitivity import UNITS, SensitivitySettings, layer_sensitivity
from ..metrics.sensitivity import PRECISIONS
from ..metrics.sensitivity_charts import group_chart, heat_map, plan_chart
from ..quant.plan import PRESETS
from .sampler_inputs import prompt_inputs, sampler_inputs
from .shown import KEPT
from .types import BIT_PLAN, LAYER_TIMES, SENSITIVITY


class LayerSensitivity(io.ComfyNode):
    """Float MODEL to what each layer's quantization does to its output."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneLayerSensitivity",
            display_name="Layer Sensitivity",
            category="QuantTune/measure",
            is_output_node=True,
            description="Quantizes one layer of a float model at a time and measures how far its "
                        "output moves, over prompts and timesteps: which layers must keep their "
                        "bits, and when. 'Bit Plan' makes a mixed precision of it.",
            search_aliases=["mixed precision", "ablation", "heat map", "sensitivity analysis"],
            inputs=[
                io.Model.Input("model", tooltip="The float model, LoRAs included."),
                io.Latent.Input("latent", tooltip="The size to measure at ('Empty Latent Image'); "
                                                  "smaller is faster and ranks the layers alike. "
                                                  "Or latents of pictures ('VAE Encode')."),
                *prompt_inputs("One prompt a line, used in turn."),
                *[io.Boolean.Input(f"bits_{p}" if p.isdigit() else p, default=p in ("8", "4"),
                                   tooltip=_TOLD[p]) for p in PRECISIONS],
                io.Combo.Input("unit", options=list(UNITS), default="layer",
                               tooltip="'layer' measures each layer (most exact, slowest); 'group' "
                                       "all of a kind at once: attention, feed-forward, ResNet…"),
                io.Int.Input("forwards", default=8, min=1, max=1000,
                             tooltip="Steps of the sampler each change is judged on, spread over "
                                     "prompts and timesteps. The time it takes is that of about "
                                     "half of layers x precisions x this many runs of the "
                                     "model."),
                io.Int.Input("timestep_buckets", default=4, min=1, max=100,
                             tooltip="Equal parts of the timesteps that the heat map tells "
                                     "apart."),
                io.Int.Input("samples", default=4, min=1, max=1000,
                             tooltip="Pictures that are started, a prompt each, to take those "
                                     "steps from."),
                *sampler_inputs(),
                io.Int.Input("seed", default=0, min=0, max=2**53 - 1,
                             control_after_generate=False, tooltip="Of the noise."),
                io.Combo.Input("range", options=["mse", "minmax"], default="mse", advanced=True,
                               tooltip="How the range of weights is chosen, as in 'Quantize "
                                       "UNet'."),
            ],
            outputs=[
                SENSITIVITY.Output("sensitivity", display_name="sensitivity",
                                   tooltip="For 'Bit Plan'."),
                io.Image.Output("groups", display_name="by group",
                                tooltip="Error of the output for each kind of layer."),
                io.Image.Output("heat_maps", display_name="heat maps",
                                tooltip="Error by layer and timestep, a picture a precision."),
                io.String.Output("report", display_name="report",
                                 tooltip="The most sensitive layers."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, latent, prompts, bits_8, bits_4, bits_3, bits_2, int8, unit, forwards,
                timestep_buckets, samples, steps, cfg, sampler_name, scheduler, seed, range,
                clip=None, positive=None, negative=None) -> io.NodeOutput:
        chosen = tuple(p for p, on in zip(PRECISIONS, (bits_8, bits_4, bits_3, bits_2, int8)) if on)
        how = SensitivitySettings(
            precisions=chosen, unit=unit, forwards=forwards, timestep_buckets=timestep_buckets,
            range=range, samples=samples * steps, steps=steps, cfg=cfg, sampler=sampler_name,
            scheduler=scheduler, seed=seed)
        positive, negative = conditioning_of(clip, prompts, positive, negative)
        found = layer_sensitivity(model, latent, positive, negative, how, cls.hidden.unique_id)
        bars = as_image(group_chart(found))
        maps = torch.cat(_same_size([as_image(heat_map(found, p)) for p in chosen]))
        report = found.report()
        return io.NodeOutput(found, bars, maps, report,
                             ui={**ui.PreviewImage(bars, cls=cls).as_dict(),
                                 **ui.PreviewText(report).as_dict()})


_TOLD = {
    "8": "Measure weights in 8 bits.",
    "4": "Measure weights in 4 bits.",
    "3": "Measure weights in 3 bits.",
    "2": "Measure weights in 2 bits.",
    "int8": "Measure weights and activations in 8 bits, as 'Dynamic INT8' multiplies them.",
}


def _same_size(pictures: list[torch.Tensor]) -> list[torch.Tensor]:
    """Pictures padded with white to the largest one's height and width."""
    height, width = (max(p.shape[i] for p in pictures) for i in (1, 2))
    return [torch.nn.functional.pad(p, (0, 0, 0, width - p.shape[2], 0, height - p.shape[1]),
                                    value=1.0) for p in pictures]


class BitPlanNode(io.ComfyNode):
    """How many bits each layer gets."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneBitPlan",
            display_name="Bit Plan",
            category="QuantTune/measure",
            description="Mixed precision: how many bits each layer gets, searched for the least "
                        "error in a given size or time, or one of the recommendations for a kind "
                        "of machine. 'Quantize UNet' takes a plan of a size, 'Dynamic INT8' one of "
                        "a time.",
            search_aliases=["mixed precision", "knapsack", "bit allocation", "latency budget"],
            **KEPT,
            inputs=[
                io.Model.Input("model", tooltip="The float model the plan is for."),
                io.Combo.Input("plan", options=[SEARCHED, *PRESETS], default=SEARCHED,
                               tooltip="'searched' needs the sensitivity. The others are "
                                       "Diffusia's recommendations for a very constrained "
                                       "machine, a laptop and a workstation."),
                SENSITIVITY.Input("sensitivity", optional=True,
                                  tooltip="From 'Layer Sensitivity' on the same model, measured "
                                          "for every width that the plan may use."),
                io.Float.Input("bits_per_weight", default=5.0, min=1.0, max=16.0, step=0.1,
                               tooltip="How large a searched plan may be: bits a weight on "
                                       "average, scales included. 8.1 is the size of 8 bits "
                                       "throughout, 4.1 that of 4 bits."),
                LAYER_TIMES.Input("times", optional=True,
                                  tooltip="From 'Layer Times' on the same model; needed with "
                                          "budget = time."),
                io.Combo.Input("budget", options=list(BUDGETS), default=SIZE, optional=True,
                               tooltip="What a searched plan keeps to: 'size' chooses the bits of "
                                       "each layer for 'Quantize UNet', 'time' the layers that "
                                       "multiply integers for 'Dynamic INT8' (the sensitivity "
                                       "needs int8). The other number is not looked at."),
                io.Float.Input("time", default=0.8, min=0.05, max=1.0, step=0.01, optional=True,
                               tooltip="How long a step may take with budget = time: a share of "
                                       "the time of a step with every layer in float, in the "
                                       "precision of 'Layer Times', whose report tells the "
                                       "least."),
            ],
            outputs=[
                BIT_PLAN.Output("bit_plan", display_name="plan",
                                tooltip="For 'Quantize UNet'; with budget = time, for 'Dynamic "
                                        "INT8'."),
                io.Image.Output("chart", display_name="chart",
                                tooltip="How many layers of each kind have how many bits."),
                io.String.Output("report", display_name="report",
                                 tooltip="Size, and the error and the time to expect."),
            ],
        )

    @classmethod
    def execute(cls, model, plan, bits_per_weight, budget=SIZE, time=0.8, sensitivity=None,
                times=None) -> io.NodeOutput:
        made, report = bit_plan(model, plan, sensitivity, bits_per_weight, times, budget, time)
        chart = as_image(plan_chart(made))
        return io.NodeOutput(made, chart, report,
                             ui={**ui.PreviewImage(chart, cls=cls).as_dict(),
                                 **ui.PreviewText(report).as_dict()})
