"""LoRA Train."""

from comfy_api.latest import io

from ..host.encode import encode_empty
from ..host.lora_train import BASES, train_lora
from ..training.lora_config import TARGETS, LoraTraining
from ..training.settings import OPTIMIZERS, SCHEDULERS
from . import training_inputs as shared
from .shown import KEPT
from .training_inputs import ANEW, CONTINUE
from .types import LORA_MODEL


class LoraTrain(io.ComfyNode):
    """MODEL and images to a LoRA."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantTuneLoraTrain",
            display_name="LoRA Train",
            category="QuantTune/training",
            description="Trains a LoRA on a float, 8-bit, 4-bit or NF4 model with peft. The "
                        "result fits every LoRA loader. Stop keeps what was learnt; queue again "
                        "to go on.",
            search_aliases=["lora training", "dreambooth", "fine-tune", "qlora", "dora", "peft"],
            **KEPT,
            inputs=[
                io.Model.Input("model", tooltip="A float model from any loader, or a quantized one "
                                                "from 'Quantize UNet' or 'Load Quantized UNet', "
                                                "which takes far less memory."),
                *shared.examples(),
                LORA_MODEL.Input("start_from", optional=True,
                                 tooltip="A LoRA to train on, from 'Load LoRA (quantized)' or a "
                                         "training; targets have to be its own, and rank one of "
                                         "its ranks. A text encoder that does not train keeps "
                                         "its part."),
                *shared.run("my-lora"),
                io.Combo.Input("base", options=list(BASES), default=BASES[0],
                               tooltip="What the LoRA is trained on: the model as it is connected, "
                                       "or, for a float model, its Linear layers in 4-bit "
                                       "NormalFloat (QLoRA; needs bitsandbytes)."),
                io.Int.Input("rank", default=16, min=1, max=1024,
                             tooltip="Size of the LoRA: 4 to 16 for a subject, 32 and more for a "
                                     "style or a whole collection."),
                io.Float.Input("alpha", default=0.0, min=0.0, max=1024.0, step=1.0,
                               tooltip="The LoRA is scaled by alpha / rank; 0 takes the rank, so "
                                       "that it is not scaled."),
                io.Combo.Input("targets", options=list(TARGETS), default=list(TARGETS)[0],
                               tooltip="Layers that take a LoRA; more of them learn more and make "
                                       "a larger file."),
                io.Int.Input("steps", default=500, min=1, max=1_000_000,
                             tooltip="Optimizer steps."),
                io.Int.Input("epochs", default=0, min=0, max=100_000,
                             tooltip="How often every image is seen, in place of steps (those that "
                                     "fill up a batch more often); 0 takes the steps."),
                io.Int.Input("batch_size", default=1, min=1, max=1024,
                             tooltip="Images a step; more is steadier and slower."),
                io.Float.Input("learning_rate", default=1e-4, min=0.0, max=1.0, step=1e-6,
                               round=False,
                               tooltip="1e-4 is usual; half of it when pictures turn garish, twice "
                                       "as much when nothing is learnt."),
                io.Int.Input("seed", default=0, min=0, max=2**53 - 1,
                             control_after_generate=False,
                             tooltip="The same seed and settings give the same LoRA."),
                *shared.validation(),
                io.Boolean.Input("train_text_encoder", default=False,
                                 tooltip="Also put a LoRA on the text encoder, so that the "
                                         "subject's word itself learns."),
                io.Float.Input("text_encoder_learning_rate", default=0.0, min=0.0, max=1.0,
                               step=1e-6, round=False, advanced=True,
                               tooltip="Of the text encoder; 0 takes half of the learning rate."),
                io.String.Input("pattern", default="", advanced=True,
                                tooltip="With targets = 'pattern below': regular expressions for "
                                        "names of layers, such as attn2, or to_[qv]$, separated by "
                                        "commas."),
                io.Float.Input("dropout", default=0.0, min=0.0, max=0.95, step=0.05, advanced=True,
                               tooltip="Share of the LoRA's inputs left out while training, "
                                       "against learning few images by heart."),
                io.Boolean.Input("rslora", default=False, advanced=True,
                                 tooltip="Scale by alpha / sqrt(rank), which lets high ranks learn "
                                         "(rsLoRA)."),
                io.Boolean.Input("dora", default=False, advanced=True,
                                 tooltip="Learn the size of each output apart from its direction "
                                         "(DoRA): often nearer to full fine-tuning, slower."),
                io.Int.Input("gradient_accumulation", default=1, min=1, max=1024, advanced=True,
                             tooltip="Batches a step: a larger batch without its memory."),
                io.Combo.Input("optimizer", options=list(OPTIMIZERS), default=OPTIMIZERS[0],
                               advanced=True,
                               tooltip="AdamW or Lion; those of bitsandbytes with 8-bit states "
                                       "take a quarter of the optimizer's memory."),
                io.Combo.Input("scheduler", options=list(SCHEDULERS), default="cosine",
                               advanced=True, tooltip="How the learning rate runs."),
                io.Int.Input("warmup_steps", default=10, min=0, max=1_000_000, advanced=True,
                             tooltip="Steps in which the learning rate rises from 0."),
                io.Float.Input("max_grad_norm", default=1.0, min=0.0, max=1000.0, step=0.1,
                               advanced=True,
                               tooltip="Gradients are clipped to this norm; 0 leaves them."),
                io.Float.Input("weight_decay", default=0.0, min=0.0, max=1.0, step=0.001,
                               advanced=True, tooltip="Pulls the LoRA towards nothing; 0.01 is "
                                                      "usual where it learns too much."),
                *shared.details(),
            ],
            outputs=[
                LORA_MODEL.Output("lora", display_name="lora",
                                  tooltip="For 'Save LoRA', and to apply with 'Load LoRA "
                                          "(quantized)' or ComfyUI's 'Load LoRA Model'."),
                *shared.pictures(),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, run_name=None, if_run_exists=CONTINUE, **kwargs):
        return shared.run_fingerprint(run_name, if_run_exists)

    @classmethod
    def execute(cls, model, run_name, if_run_exists, base, steps, epochs, first_timestep,
                last_timestep, validation_prompts, validation_size, validation_steps,
                validation_cfg, tracker, images=None, clip=None, vae=None, latents=None,
                conditioning=None, start_from=None, **settings) -> io.NodeOutput:
        config = LoraTraining(steps=steps, timestep_range=(first_timestep, last_timestep),
                              **settings)
        data, subject = shared.encoded(
            model, images, clip, vae, latents, conditioning, run_name,
            bool(validation_prompts.strip() or config.caption_dropout
                 or config.train_text_encoder))
        if epochs:
            config = config.replace(steps=data.steps(epochs, config.batch_size,
                                                     config.gradient_accumulation))
        outcome = train_lora(
            model, data, config, run_name, base, subject, clip, start_from,
            encode_empty(model, clip, data) if config.caption_dropout else None,
            shared.validation_of(validation_prompts, validation_size, validation_steps,
                                 validation_cfg, config.seed, clip, vae),
            [] if tracker == "none" else [tracker], cls.hidden.unique_id,
            if_run_exists == ANEW)
        return shared.shown(cls, outcome.lora, outcome, run_name)
