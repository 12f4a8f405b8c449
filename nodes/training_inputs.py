"""Inputs that the training nodes have in common."""

from comfy_api.latest import io, ui

from ..host.encode import encode, from_latents
from ..host.images import as_image
from ..host.pictures import SamplingSettings
from ..host.run import Validation, run_folder, run_state
from ..quant import QuantTuneError
from .training_images import Images

CONTINUE, ANEW = "continue", "start anew"
LOSSES = "quanttune_losses"
"""Key in a node's ui output of what its chart shows."""


def examples() -> list:
    """What a training learns from."""
    return [
        Images.Input("images", optional=True,
                     tooltip="From 'Training Images'; join 'Class Images' to it for prior "
                             "preservation."),
        io.Clip.Input("clip", optional=True,
                      tooltip="Reads the captions and the validation prompts; needed with images."),
        io.Vae.Input("vae", optional=True,
                     tooltip="Turns the images into latents, and the validation latents into "
                             "pictures; needed with images."),
        io.Latent.Input("latents", optional=True,
                        tooltip="Instead of images: latents, one conditioning each."),
        io.Conditioning.Input("conditioning", optional=True,
                              tooltip="Of the latents, in their order; a single one serves for "
                                      "all."),
    ]


def run(default: str) -> list:
    """Which run."""
    return [
        io.String.Input("run_name", default=default,
                        tooltip="Folder below output/quanttune_runs that holds the state, the "
                                "losses and the validation pictures of this run."),
        io.Combo.Input("if_run_exists", options=[CONTINUE, ANEW], default=CONTINUE,
                       tooltip="Go on where the run of that name was stopped, or delete it and "
                               "start anew."),
    ]


def validation() -> list:
    """What is looked at while training."""
    return [
        io.String.Input("validation_prompts", multiline=True, default="",
                        tooltip="One prompt a line; each is a row of the validation grid and "
                                "drawn anew with what was learnt so far."),
        io.Int.Input("preview_every", default=100, min=0, max=1_000_000,
                     tooltip="Steps between two rounds of validation pictures; 0 for none."),
        io.Int.Input("validation_size", default=512, min=64, max=4096, step=8, advanced=True,
                     tooltip="Side of the validation pictures in pixels."),
        io.Float.Input("validation_cfg", default=5.0, min=0.0, max=30.0, step=0.5, advanced=True,
                       tooltip="Guidance of the validation pictures."),
        io.Int.Input("validation_steps", default=20, min=1, max=1000, advanced=True,
                     tooltip="Denoising steps of the validation pictures."),
        io.Int.Input("save_every", default=100, min=0, max=1_000_000, advanced=True,
                     tooltip="Steps between two savings of the run; a crash loses at most these. "
                             "0 saves at the end."),
    ]


def details() -> list:
    """Losses, timesteps, precision and logs."""
    return [
        io.Float.Input("prior_weight", default=1.0, min=0.0, max=100.0, step=0.05, advanced=True,
                       tooltip="Weight of class images beside the subject's."),
        io.Float.Input("min_snr_gamma", default=0.0, min=0.0, max=100.0, step=0.5, advanced=True,
                       tooltip="Clamps the weight of nearly clean timesteps (5 is usual); 0 for "
                               "none."),
        io.Float.Input("caption_dropout", default=0.0, min=0.0, max=1.0, step=0.05, advanced=True,
                       tooltip="Share of the images that train without their caption."),
        io.Float.Input("first_timestep", default=0.0, min=0.0, max=1.0, step=0.01, advanced=True,
                       tooltip="Train only from this share of the timesteps on (0 = no noise)."),
        io.Float.Input("last_timestep", default=1.0, min=0.0, max=1.0, step=0.01, advanced=True,
                       tooltip="Train only up to this share of the timesteps (1 = all noise)."),
        io.Combo.Input("precision", options=["auto", "fp32", "bf16"], default="auto",
                       advanced=True, tooltip="'auto' computes in bfloat16 on a GPU that has it "
                                              "and in float32 otherwise."),
        io.Boolean.Input("checkpointing", default=True, advanced=True,
                         tooltip="Compute activations again instead of keeping them: a third "
                                 "slower, and far less memory."),
        io.Combo.Input("tracker", options=["none", "tensorboard", "wandb"], default="none",
                       advanced=True,
                       tooltip="Also log the loss there; loss.csv is always written."),
    ]


def pictures() -> list:
    """Outputs for the eye and the disk."""
    return [
        io.Image.Output("validation", display_name="validation",
                        tooltip="A row for each validation prompt, a column for each round; the "
                                "loss chart when there is no prompt."),
        io.Image.Output("loss_chart", display_name="loss chart",
                        tooltip="The loss of each step and its running mean."),
        io.String.Output("loss_file", display_name="loss file",
                         tooltip="Path of the CSV file with the loss of every step."),
        io.String.Output("report", display_name="report",
                         tooltip="What was trained, in words."),
    ]


def encoded(model, images, clip, vae, latents, conditioning, run_name: str, needs_clip: bool):
    """``(TrainingSet, subject)`` of what is connected.

    Raises QuantTuneError when it is not enough; ``needs_clip`` when something else needs a CLIP.
    """
    folder = run_folder(run_name)  # a name that is none is told before any work
    if (images is not None or needs_clip) and (clip is None or vae is None):
        raise QuantTuneError("Images, validation prompts, caption dropout and training the text "
                             "encoder need a CLIP and a VAE; connect both, for instance from the "
                             "checkpoint loader.")
    if images is not None:
        return encode(images, model, clip, vae, folder.parent / ".cache"), \
            images.subject
    if latents is not None and conditioning is not None:
        return from_latents(latents, conditioning, model), ""
    raise QuantTuneError("There is nothing to train on; connect 'Training Images', or latents with "
                         "their conditioning.")


def run_fingerprint(run_name: str | None, if_run_exists: str) -> str:
    """A node's fingerprint: a run that was stopped goes on when the graph is queued again."""
    # A name from another node is not known yet when the host asks.
    return run_state(run_name) if run_name and if_run_exists == CONTINUE else ""


def shown(cls, learnt, outcome, run_name: str) -> io.NodeOutput:
    """What was learnt and `pictures`, as a training node gives and shows them."""
    chart = as_image(outcome.loss_picture)
    grid = chart if outcome.grid is None else as_image(outcome.grid)
    return io.NodeOutput(
        learnt, grid, chart, str(run_folder(run_name) / "loss.csv"), outcome.report,
        ui={**ui.PreviewImage(grid, cls=cls).as_dict(),
            **ui.PreviewText(outcome.report).as_dict(), LOSSES: [outcome.losses]})


def validation_of(prompts: str, size: int, steps: int, cfg: float, seed: int, clip,
                  vae) -> Validation | None:
    """The `Validation` of a node's inputs; None without a prompt."""
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    settings = SamplingSettings(size, size, steps, cfg, seed=seed)
    return Validation(lines, settings, clip, vae) if lines else None
