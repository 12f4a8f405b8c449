"""Train Scales (TuneQDM)."""

from comfy_api.latest import io, ui

from ..host.encode import encode, encode_empty, from_latents
from ..host.images import as_image
from ..host.pictures import SamplingSettings
from ..host.run import Validation, run_folder, run_state
from ..host.train import train
from ..quant import QuantTuneError
from ..training.config import PRESETS
from ..training.settings import OPTIMIZERS, SCHEDULERS
from .scales import Scales
from .training_images import Images

CONTINUE, ANEW = "continue", "start anew"
OF_PRESET = "(preset)"


class TrainScales(io.ComfyNode):
    """Quantized MODEL and images to a scale set."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneTrainScales",
            display_name="Train Scales (TuneQDM)",
            category="QuantTune/training",
            description="Fine-tunes the scales of a quantized model and nothing else: a subject "
                        "takes a few MB and little memory (TuneQDM, Alg. 1). The model itself "
                        "stays as it is. Stop keeps what was learnt; queue again to go on.",
            search_aliases=["dreambooth", "fine-tune", "personalise", "peqa", "lora training"],
            inputs=[
                io.Model.Input("model", tooltip="A model from 'Quantize UNet' or 'Load Quantized "
                                                "UNet'."),
                Images.Input("images", optional=True,
                             tooltip="From 'Training Images'; join 'Class Images' to it for prior "
                                     "preservation."),
                io.Clip.Input("clip", optional=True,
                              tooltip="Reads the captions and the validation prompts; needed "
                                      "with images."),
                io.Vae.Input("vae", optional=True,
                             tooltip="Turns the images into latents, and the validation latents "
                                     "into pictures; needed with images."),
                io.Latent.Input("latents", optional=True,
                                tooltip="Instead of images: latents, one conditioning each."),
                io.Conditioning.Input("conditioning", optional=True,
                                      tooltip="Of the latents, in their order; a single one "
                                              "serves for all."),
                io.String.Input("run_name", default="my-subject",
                                tooltip="Folder below output/quanttune_runs that holds the state, "
                                        "the losses and the validation pictures of this run."),
                io.Combo.Input("if_run_exists", options=[CONTINUE, ANEW], default=CONTINUE,
                               tooltip="Go on where the run of that name was stopped, or delete "
                                       "it and start anew."),
                io.Combo.Input("preset", options=list(PRESETS), default="recommended",
                               tooltip="'recommended': what works best in our measurements; "
                                       "'paper': the published settings of TuneQDM; 'peqa': one "
                                       "set of output scales only."),
                io.Int.Input("steps", default=400, min=1, max=1_000_000,
                             tooltip="Optimizer steps. 400 is usual for a subject."),
                io.Int.Input("num_experts", default=0, min=0, max=1000,
                             tooltip="Sets of scales, one for each equal part of the denoising "
                                     "timesteps; 0 takes the preset's."),
                io.Float.Input("learning_rate", default=0.0, min=0.0, max=1.0, step=1e-6,
                               round=False, tooltip="0 takes the preset's."),
                io.Int.Input("batch_size", default=1, min=1, max=1024,
                             tooltip="Images a step; more is steadier and slower."),
                io.Int.Input("seed", default=0, min=0, max=2**53 - 1,
                             control_after_generate=False,
                             tooltip="The same seed and settings give the same scales."),
                io.String.Input("validation_prompts", multiline=True, default="",
                                tooltip="One prompt a line; each is a row of the validation grid "
                                        "and drawn anew with the present scales."),
                io.Int.Input("preview_every", default=100, min=0, max=1_000_000,
                             tooltip="Steps between two rounds of validation pictures; 0 for "
                                     "none."),
                io.Int.Input("validation_size", default=512, min=64, max=4096, step=8,
                             advanced=True, tooltip="Side of the validation pictures in pixels."),
                io.Float.Input("validation_cfg", default=5.0, min=0.0, max=30.0, step=0.5,
                               advanced=True, tooltip="Guidance of the validation pictures."),
                io.Int.Input("validation_steps", default=20, min=1, max=1000, advanced=True,
                             tooltip="Denoising steps of the validation pictures."),
                io.Int.Input("save_every", default=100, min=0, max=1_000_000, advanced=True,
                             tooltip="Steps between two savings of the run; a crash loses at most "
                                     "these. 0 saves at the end."),
                io.Float.Input("s_in_learning_rate", default=0.0, min=0.0, max=1.0, step=1e-6,
                               round=False, advanced=True,
                               tooltip="Of the input scales; 0 takes the same as the others."),
                io.Int.Input("gradient_accumulation", default=1, min=1, max=1024, advanced=True,
                             tooltip="Batches a step: a larger batch without its memory."),
                io.Combo.Input("optimizer", options=[OF_PRESET, *OPTIMIZERS], default=OF_PRESET,
                               advanced=True,
                               tooltip="AdamW, or one of bitsandbytes' (8-bit states take a "
                                       "quarter of the memory, which is small anyway here)."),
                io.Combo.Input("scheduler", options=[OF_PRESET, *SCHEDULERS], default=OF_PRESET,
                               advanced=True, tooltip="How the learning rate runs."),
                io.Float.Input("prior_weight", default=1.0, min=0.0, max=100.0, step=0.05,
                               advanced=True, tooltip="Weight of class images beside the "
                                                      "subject's."),
                io.Float.Input("min_snr_gamma", default=0.0, min=0.0, max=100.0, step=0.5,
                               advanced=True,
                               tooltip="Clamps the weight of nearly clean timesteps (5 is usual); "
                                       "0 for none."),
                io.Float.Input("ema_decay", default=0.0, min=0.0, max=0.9999, step=0.001,
                               advanced=True, tooltip="Gives an average of the scales instead of "
                                                      "the last ones; 0 for none."),
                io.Float.Input("caption_dropout", default=0.0, min=0.0, max=1.0, step=0.05,
                               advanced=True, tooltip="Share of the images that train without "
                                                      "their caption."),
                io.Float.Input("first_timestep", default=0.0, min=0.0, max=1.0, step=0.01,
                               advanced=True, tooltip="Train only from this share of the "
                                                      "timesteps on (0 = no noise)."),
                io.Float.Input("last_timestep", default=1.0, min=0.0, max=1.0, step=0.01,
                               advanced=True, tooltip="Train only up to this share of the "
                                                      "timesteps (1 = all noise)."),
                io.Combo.Input("precision", options=["auto", "fp32", "bf16"], default="auto",
                               advanced=True, tooltip="'auto' computes in bfloat16 on a GPU that "
                                                      "has it and in float32 otherwise."),
                io.Boolean.Input("checkpointing", default=True, advanced=True,
                                 tooltip="Compute activations again instead of keeping them: a "
                                         "third slower, and far less memory."),
                io.Combo.Input("tracker", options=["none", "tensorboard", "wandb"],
                               default="none", advanced=True,
                               tooltip="Also log the loss there; loss.csv is always written."),
            ],
            outputs=[
                Scales.Output("scales", display_name="scales",
                              tooltip="The trained scales, for 'Apply TuneQDM Scales' and 'Save "
                                      "TuneQDM Scales'."),
                io.Image.Output("validation", display_name="validation",
                                tooltip="A row for each validation prompt, a column for each "
                                        "round; the loss chart when there is no prompt."),
                io.Image.Output("loss_chart", display_name="loss chart",
                                tooltip="The loss of each step and its running mean."),
                io.String.Output("loss_file", display_name="loss file",
                                 tooltip="Path of the CSV file with the loss of every step."),
                io.String.Output("report", display_name="report",
                                 tooltip="What was trained, in words."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, run_name=None, if_run_exists=CONTINUE, **kwargs):
        # A run that was stopped goes on when the graph is queued again.
        # A name from another node is not known yet when the host asks.
        return run_state(run_name) if run_name and if_run_exists == CONTINUE else ""

    @classmethod
    def execute(cls, model, run_name, if_run_exists, preset, steps, num_experts,
                learning_rate, batch_size, seed, validation_prompts, preview_every,
                validation_size, validation_cfg, validation_steps, save_every,
                s_in_learning_rate, gradient_accumulation, optimizer, scheduler, prior_weight,
                min_snr_gamma, ema_decay, caption_dropout, first_timestep, last_timestep,
                precision, checkpointing, tracker, images=None, clip=None, vae=None,
                latents=None, conditioning=None) -> io.NodeOutput:
        chosen = {"num_experts": num_experts, "learning_rate": learning_rate,
                  "optimizer": "" if optimizer == OF_PRESET else optimizer,
                  "scheduler": "" if scheduler == OF_PRESET else scheduler}
        config = PRESETS[preset].replace(
            steps=steps, batch_size=batch_size, seed=seed, preview_every=preview_every,
            save_every=save_every, s_in_learning_rate=s_in_learning_rate,
            gradient_accumulation=gradient_accumulation, prior_weight=prior_weight,
            min_snr_gamma=min_snr_gamma, ema_decay=ema_decay, caption_dropout=caption_dropout,
            timestep_range=(first_timestep, last_timestep), precision=precision,
            checkpointing=checkpointing, **{k: v for k, v in chosen.items() if v})
        folder = run_folder(run_name)
        prompts = [line.strip() for line in validation_prompts.splitlines() if line.strip()]
        if (images is not None or prompts or caption_dropout) and (clip is None or vae is None):
            raise QuantTuneError("Images, validation prompts and caption dropout need a CLIP and "
                                 "a VAE; connect both, for instance from the checkpoint loader.")
        if images is not None:
            data = encode(images, model, clip, vae, folder.parent / ".cache")
            subject = images.subject
        elif latents is not None and conditioning is not None:
            data, subject = from_latents(latents, conditioning, model), ""
        else:
            raise QuantTuneError("There is nothing to train on; connect 'Training Images', or "
                                 "latents with their conditioning.")
        settings = SamplingSettings(validation_size, validation_size, validation_steps,
                                    validation_cfg, seed=seed)
        outcome = train(
            model, data, config, run_name, subject,
            encode_empty(model, clip) if caption_dropout else None,
            Validation(prompts, settings, clip, vae) if prompts else None,
            [] if tracker == "none" else [tracker], cls.hidden.unique_id,
            if_run_exists == ANEW)
        chart = as_image(outcome.loss_picture)
        grid = chart if outcome.grid is None else as_image(outcome.grid)
        return io.NodeOutput(
            outcome.result.scale_set, grid, chart, str(folder / "loss.csv"), outcome.report,
            ui={**ui.PreviewImage(grid, cls=cls).as_dict(),
                **ui.PreviewText(outcome.report).as_dict()})
