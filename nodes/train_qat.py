"""Train QAT."""

from comfy_api.latest import io, ui

from ..host.calibrate import Calibration
from ..host.images import as_image
from ..host.qat import train_qat
from ..host.run import run_state
from ..host.samples import conditioning_of
from ..training.qat import WEIGHTINGS, QatTraining
from .sampler_inputs import prompt_inputs, sampler_inputs
from .shown import KEPT, shown_model
from .training_inputs import ANEW, CONTINUE, LOSSES


class TrainQat(io.ComfyNode):
    """Calibrated MODEL and its float original to a MODEL with trained integers."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneTrainQat",
            display_name="Train QAT",
            category="QuantTune/training",
            description="Quantization-aware training: a calibrated model learns to answer as the "
                        "float model does, with its rounding and clipping simulated while it "
                        "trains. It needs prompts and no pictures, and gives true integers. Stop "
                        "keeps what was learnt; queue again to go on.",
            search_aliases=["quantization-aware training", "distillation", "lsq"],
            **KEPT,
            inputs=[
                io.Model.Input("model", tooltip="From 'Calibrate INT8'."),
                io.Model.Input("reference", tooltip="The float model it was made from, which it "
                                                    "learns from."),
                io.Latent.Input("latent", tooltip="The size to train at ('Empty Latent Image'): "
                                                  "the float model generates from noise. Or "
                                                  "latents of pictures, to which noise is "
                                                  "added."),
                *prompt_inputs("One prompt a line, used in turn; the more and the more varied, "
                               "the better."),
                io.String.Input("run_name", default="my-qat",
                                tooltip="Folder below output/quanttune_runs that holds the state "
                                        "and the losses of this run."),
                io.Combo.Input("if_run_exists", options=[CONTINUE, ANEW], default=CONTINUE,
                               tooltip="Go on where the run of that name was stopped, or delete "
                                       "it and start anew."),
                io.Int.Input("train_steps", default=200, min=1, max=1_000_000,
                             tooltip="Optimizer steps. 100 to 300 mend most of what can be "
                                     "mended."),
                io.Int.Input("samples", default=160, min=2, max=100_000,
                             tooltip="Steps of the float model to learn from: with 20 steps a "
                                     "picture, 160 are eight pictures with a prompt each. One "
                                     "picture in eight is kept to judge the result by."),
                io.Int.Input("batch_size", default=2, min=1, max=1024,
                             tooltip="Of those, for each optimizer step."),
                io.Float.Input("learning_rate", default=1e-3, min=0.0, max=1.0, step=1e-5,
                               round=False, tooltip="Of step sizes and activation ranges, "
                                                    "relative to what they are."),
                io.Float.Input("weight_learning_rate", default=1e-3, min=0.0, max=1.0, step=1e-4,
                               round=False,
                               tooltip="Of the weights, in steps of their integers. Much faster "
                                       "and they learn the prompts by heart. 0 leaves the "
                                       "integers and trains step sizes and ranges alone, at a "
                                       "small part of the memory."),
                *sampler_inputs(),
                io.Int.Input("seed", default=1000, min=0, max=2**53 - 1,
                             control_after_generate=False,
                             tooltip="Of the noise and the order. Another one than in 'Calibrate "
                                     "INT8' shows the model something new."),
                io.Int.Input("save_every", default=50, min=0, max=1_000_000, advanced=True,
                             tooltip="Steps between two savings of the run; a crash loses at most "
                                     "these. 0 saves at the end."),
                io.Combo.Input("precision", options=["auto", "fp32", "bf16"], default="auto",
                               advanced=True,
                               tooltip="'auto' computes in bfloat16 on a GPU that has it and in "
                                       "float32 otherwise."),
                io.Boolean.Input("checkpointing", default=True, advanced=True,
                                 tooltip="Compute activations again instead of keeping them: a "
                                         "third slower, and far less memory."),
                io.Combo.Input("weighting", options=list(WEIGHTINGS), default=WEIGHTINGS[0],
                               advanced=True,
                               tooltip="'picture' weighs each step of the float model by how much "
                                       "its error shows in the picture; 'even' takes all alike, "
                                       "so that nearly clean steps, which are the hardest to "
                                       "match and change the picture least, count most."),
            ],
            outputs=[
                io.Model.Output("model_int8", display_name="MODEL",
                                tooltip="The trained model, which multiplies integers; for "
                                        "samplers and 'Save Quantized UNet'."),
                io.Image.Output("loss_chart", display_name="loss chart",
                                tooltip="The squared relative error of each step and its running "
                                        "mean."),
                io.String.Output("report", display_name="report",
                                 tooltip="The error before and after, with true integers."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, run_name=None, if_run_exists=CONTINUE, **kwargs):
        return run_state(run_name) if run_name and if_run_exists == CONTINUE else ""

    @classmethod
    def execute(cls, model, reference, latent, prompts, run_name, if_run_exists, train_steps,
                samples, batch_size, learning_rate, weight_learning_rate, steps, cfg,
                sampler_name, scheduler, seed, save_every, precision, checkpointing,
                weighting=WEIGHTINGS[0], clip=None, positive=None, negative=None) -> io.NodeOutput:
        config = QatTraining(
            steps=train_steps, batch_size=batch_size, learning_rate=learning_rate,
            weight_learning_rate=weight_learning_rate, save_every=save_every, seed=seed,
            precision=precision, checkpointing=checkpointing, weighting=weighting)
        how = Calibration(samples=samples, steps=steps, cfg=cfg, sampler=sampler_name,
                          scheduler=scheduler, seed=seed)
        positive, negative = conditioning_of(clip, prompts, positive, negative)
        outcome = train_qat(model, reference, latent, positive, negative, how, config, run_name,
                            cls.hidden.unique_id, if_run_exists == ANEW)
        chart = as_image(outcome.loss_picture)
        return io.NodeOutput(outcome.model, chart, outcome.report,
                             ui={**ui.PreviewImage(chart, cls=cls).as_dict(),
                                 **shown_model(outcome.model, outcome.report),
                                 LOSSES: [outcome.losses]})
