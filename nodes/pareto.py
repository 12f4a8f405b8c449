"""Pareto Front."""

from comfy_api.latest import io, ui

from ..host.images import as_image
from ..host.pareto import Candidates, budgets_of, pareto, time_budgets_of
from ..host.samples import conditioning_of
from ..host.sensitivity import SensitivitySettings
from ..metrics.pareto import chart, csv, markdown
from .sampler_inputs import sampler_inputs
from .types import LAYER_TIMES, SENSITIVITY


class ParetoFront(io.ComfyNode):
    """Float MODEL to quality over size and time of its quantized forms."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneParetoFront",
            display_name="Pareto Front",
            category="QuantTune/measure",
            is_output_node=True,
            description="Quantizes a float model in several ways and draws error over size and "
                        "over time: which of them nothing else beats. With a sensitivity (and "
                        "layer times), searched mixed precisions take part.",
            search_aliases=["trade-off", "quality versus size", "mixed precision"],
            inputs=[
                io.Model.Input("model", tooltip="The float model, LoRAs included."),
                io.Latent.Input("latent", tooltip="The size to measure at ('Empty Latent "
                                                  "Image')."),
                io.Clip.Input("clip", optional=True,
                              tooltip="Reads the prompts below; not needed with 'positive'."),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the pictures; not needed with "
                                                           "pictures = 0."),
                SENSITIVITY.Input("sensitivity", optional=True,
                                  tooltip="From 'Layer Sensitivity' on the same model, for the "
                                          "budgets."),
                io.Conditioning.Input("positive", optional=True,
                                      tooltip="Prompts in place of, or beside, those below."),
                io.Conditioning.Input("negative", optional=True,
                                      tooltip="The negative prompt; an empty one without it."),
                io.String.Input("prompts", multiline=True, default="",
                                tooltip="One prompt a line, used in turn."),
                *[io.Boolean.Input(f"bits_{b}", default=True,
                                   tooltip=f"All layers in {b} bits.") for b in (8, 4, 3, 2)],
                io.Boolean.Input("int8", default=True, tooltip="'Dynamic INT8' of all layers."),
                io.String.Input("budgets", default="",
                                tooltip="Bits a weight of searched plans, such as '3, 4, 5, 6, 8'. "
                                        "Needs the sensitivity."),
                io.Int.Input("forwards", default=8, min=1, max=1000,
                             tooltip="Steps of the sampler that the error is measured on, spread "
                                     "over prompts and timesteps."),
                io.Int.Input("samples", default=4, min=1, max=1000,
                             tooltip="Pictures that are started to take those steps from."),
                io.Int.Input("pictures", default=0, min=0, max=1000,
                             tooltip="Pictures made with each and compared with the float model's "
                                     "by SSIM; 0 saves the time."),
                io.Int.Input("rounds", default=5, min=1, max=100,
                             tooltip="Timed steps of each, in turns with the float model's."),
                *sampler_inputs(),
                io.Int.Input("seed", default=0, min=0, max=2**53 - 1,
                             control_after_generate=False, tooltip="Of the noise."),
                io.Combo.Input("range", options=["mse", "minmax"], default="mse", advanced=True,
                               tooltip="How the range of weights is chosen, as in 'Quantize "
                                       "UNet'."),
                LAYER_TIMES.Input("times", optional=True,
                                  tooltip="From 'Layer Times' on the same model, for the time "
                                          "budgets."),
                io.String.Input("time_budgets", default="", optional=True,
                                tooltip="Time of a step in searched plans for 'Dynamic INT8', such "
                                        "as '0.6, 0.8': shares of the step with every layer in "
                                        "float that 'Layer Times' tells. Needs the times, and the "
                                        "sensitivity with int8."),
            ],
            outputs=[
                io.Image.Output("chart", display_name="chart",
                                tooltip="Error over size and over time, with the fronts."),
                io.String.Output("report", display_name="report",
                                 tooltip="The table, as Markdown."),
                io.String.Output("csv", display_name="csv", tooltip="The table for a "
                                                                    "spreadsheet."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, latent, prompts, bits_8, bits_4, bits_3, bits_2, int8, budgets,
                forwards, samples, pictures, rounds, steps, cfg, sampler_name, scheduler, seed,
                range, time_budgets="", clip=None, vae=None, sensitivity=None, positive=None,
                negative=None, times=None) -> io.NodeOutput:
        bits = tuple(b for b, on in ((8, bits_8), (4, bits_4), (3, bits_3), (2, bits_2)) if on)
        how = SensitivitySettings(
            forwards=forwards, range=range, samples=max(samples, pictures) * steps, steps=steps,
            cfg=cfg, sampler=sampler_name, scheduler=scheduler, seed=seed)
        positive, negative = conditioning_of(clip, prompts, positive, negative)
        points = pareto(model, vae, latent, positive, negative, how,
                        Candidates(bits, budgets_of(budgets), int8, rounds, pictures,
                                   time_budgets_of(time_budgets)),
                        sensitivity, cls.hidden.unique_id, times)
        drawn, report = as_image(chart(points)), markdown(points)
        return io.NodeOutput(drawn, report, csv(points),
                             ui={**ui.PreviewImage(drawn, cls=cls).as_dict(),
                                 **ui.PreviewText(report).as_dict()})
