"""Train Scales (TuneQDM)."""

from comfy_api.latest import io

from ..host.encode import encode_empty
from ..host.train import train
from ..training.config import PRESETS
from ..training.settings import OPTIMIZERS, SCHEDULERS
from . import training_inputs as shared
from .scales import Scales
from .shown import KEPT
from .training_inputs import ANEW, CONTINUE

OF_PRESET = "(preset)"


class TrainScales(io.ComfyNode):
    """Quantized MODEL and images to a scale set."""

    @classmethod
    def define_schema(cls):
        details = shared.details()
        return io.Schema(
            node_id="QuantTuneTrainScales",
            display_name="Train Scales (TuneQDM)",
            category="QuantTune/training",
            description="Fine-tunes the scales of a quantized model and nothing else: a subject "
                        "takes a few MB and little memory (TuneQDM, Alg. 1). The model itself "
                        "stays as it is. Stop keeps what was learnt; queue again to go on.",
            search_aliases=["dreambooth", "fine-tune", "personalise", "peqa", "lora training"],
            **KEPT,
            inputs=[
                io.Model.Input("model", tooltip="A model from 'Quantize UNet' or 'Load Quantized "
                                                "UNet'."),
                *shared.examples(),
                *shared.run("my-subject"),
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
                *shared.validation(),
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
                *details[:2],
                io.Float.Input("ema_decay", default=0.0, min=0.0, max=0.9999, step=0.001,
                               advanced=True, tooltip="Gives an average of the scales instead of "
                                                      "the last ones; 0 for none."),
                *details[2:],
            ],
            outputs=[
                Scales.Output("scales", display_name="scales",
                              tooltip="The trained scales, for 'Apply TuneQDM Scales' and 'Save "
                                      "TuneQDM Scales'."),
                *shared.pictures(),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, run_name=None, if_run_exists=CONTINUE, **kwargs):
        return shared.run_fingerprint(run_name, if_run_exists)

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
        data, subject = shared.encoded(model, images, clip, vae, latents, conditioning, run_name,
                                       bool(validation_prompts.strip() or caption_dropout))
        outcome = train(
            model, data, config, run_name, subject,
            encode_empty(model, clip, data) if caption_dropout else None,
            shared.validation_of(validation_prompts, validation_size, validation_steps,
                                 validation_cfg, seed, clip, vae),
            [] if tracker == "none" else [tracker], cls.hidden.unique_id,
            if_run_exists == ANEW)
        return shared.shown(cls, outcome.result.scale_set, outcome, run_name)
