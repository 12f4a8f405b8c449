"""Calibrate INT8."""

from comfy_api.latest import io

from ..host.calibrate import ROUNDINGS, Calibration, calibrate
from ..host.dynamic_int8 import LAYERS, PRECISIONS
from ..host.samples import conditioning_of
from ..quant.int8 import RangeEstimator
from .sampler_inputs import sampler_inputs
from .shown import KEPT, shown_model


class CalibrateInt8(io.ComfyNode):
    """MODEL and prompts to a MODEL with static activation ranges."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneCalibrateInt8",
            display_name="Calibrate INT8",
            category="QuantTune/int8",
            description="Runs a model on some prompts, notes which values its layers meet, and "
                        "gives back a model that multiplies 8-bit integers with those ranges "
                        "fixed (static post-training quantization). 'Save Quantized UNet' keeps "
                        "them. With rounding = gptq, 4- and 3-bit weights come out far closer to "
                        "the float model, too.",
            search_aliases=["ptq", "static int8", "gptq", "post-training quantization", "w8a8",
                            "w4a8"],
            **KEPT,
            inputs=[
                io.Model.Input("model", tooltip="A float model, which is quantized here, or a "
                                                "quantized one, which keeps its integers. LoRAs "
                                                "and scales that will be used go before."),
                io.Latent.Input("latent", tooltip="The size to calibrate at ('Empty Latent "
                                                  "Image'): pictures are generated from noise. "
                                                  "Or latents of pictures ('VAE Encode'), to "
                                                  "which noise is added."),
                io.Clip.Input("clip", optional=True,
                              tooltip="Reads the prompts below; not needed with 'positive'."),
                io.Conditioning.Input("positive", optional=True,
                                      tooltip="Prompts in place of, or beside, those below. 'Con"
                                              "ditioning (Combine)' joins several."),
                io.Conditioning.Input("negative", optional=True,
                                      tooltip="The negative prompt; an empty one without it."),
                io.String.Input("prompts", multiline=True, default="",
                                tooltip="One prompt a line, used in turn. Ten or more that are "
                                        "like yours are good."),
                io.Int.Input("samples", default=100, min=1, max=100_000,
                             tooltip="Steps of the model to look at: with 20 steps a picture, 100 "
                                     "are five pictures with a prompt each. 100 is usual."),
                io.Combo.Input("range", options=[e.value for e in RangeEstimator], default="mse",
                               tooltip="How each range is chosen: 'mse' (least squared error) "
                                       "or 'minmax' (all values), the best two in our "
                                       "measurements; 'percentile' (99.9 %), 'entropy'."),
                io.Int.Input("timestep_buckets", default=4, min=1, max=100,
                             tooltip="Ranges drift with the noise level: this many equal parts of "
                                     "the timesteps have ranges of their own. It costs no time."),
                io.Combo.Input("bits", options=["8", "4", "3", "2"], default="8",
                               tooltip="Of the weights of a float model. Activations always have "
                                       "8."),
                io.Combo.Input("rounding", options=list(ROUNDINGS), default="nearest",
                               tooltip="Of those weights: 'gptq' makes up for each rounding error "
                                       "by the weights that follow; about half the error at 4 and "
                                       "3 bits, and slow on large models without a GPU."),
                *sampler_inputs(),
                io.Int.Input("seed", default=0, min=0, max=2**53 - 1,
                             control_after_generate=False,
                             tooltip="Of the first picture's noise; the next ones count on."),
                io.Combo.Input("layers", options=list(LAYERS), default="all", advanced=True,
                               tooltip="Which layers multiply integers; as in 'Dynamic INT8'."),
                io.Boolean.Input("dynamic_cross_attention", default=True, advanced=True,
                                 tooltip="Find the ranges of cross-attention at run time: they "
                                         "depend on the prompt more than on anything else."),
                io.Float.Input("percentile", default=99.9, min=51.0, max=100.0, step=0.01,
                               advanced=True, tooltip="With range = percentile: percent of the "
                                                      "values that a range holds."),
                io.Combo.Input("precision", options=list(PRECISIONS), default="auto",
                               advanced=True,
                               tooltip="What everything else computes in; as in 'Dynamic INT8'."),
            ],
            outputs=[
                io.Model.Output("model_int8", display_name="MODEL",
                                tooltip="The model with integer products and static ranges, for "
                                        "samplers and 'Save Quantized UNet'."),
                io.String.Output("report", display_name="report",
                                 tooltip="What was calibrated, and how far the output is from "
                                         "that of the model before."),
            ],
        )

    @classmethod
    def execute(cls, model, latent, prompts, samples, range, timestep_buckets, bits, rounding,
                steps, cfg, sampler_name, scheduler, seed, layers, dynamic_cross_attention,
                percentile, precision, clip=None, positive=None,
                negative=None) -> io.NodeOutput:
        how = Calibration(
            samples=samples, estimator=range, percentile=percentile,
            timestep_buckets=timestep_buckets, dynamic_cross_attention=dynamic_cross_attention,
            bits=int(bits), rounding=rounding, layers=layers, precision=precision, steps=steps,
            cfg=cfg, sampler=sampler_name, scheduler=scheduler, seed=seed)
        positive, negative = conditioning_of(clip, prompts, positive, negative)
        fast, report = calibrate(model, latent, positive, negative, how)
        return io.NodeOutput(fast, report, ui=shown_model(fast, report))
