"""Inputs that several nodes have: what the host samples, and how."""

import comfy.samplers
from comfy_api.latest import io


def prompt_inputs(told: str) -> tuple:
    """CLIP, positive, negative and prompts; ``told`` is the tooltip of the prompts."""
    return (
        io.Clip.Input("clip", optional=True,
                      tooltip="Reads the prompts below; not needed with 'positive'."),
        io.Conditioning.Input("positive", optional=True,
                              tooltip="Prompts in place of, or beside, those below."),
        io.Conditioning.Input("negative", optional=True,
                              tooltip="The negative prompt; an empty one without it."),
        io.String.Input("prompts", multiline=True, default="", tooltip=told),
    )


def sampler_inputs() -> list:
    """Steps, guidance, sampler and scheduler, named as in the host's KSampler."""
    as_there = "As in the KSampler that will use the model."
    sampler = comfy.samplers.KSampler
    return [
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip=as_there),
        io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1, tooltip=as_there),
        io.Combo.Input("sampler_name", options=sampler.SAMPLERS, default="euler",
                       tooltip=as_there),
        io.Combo.Input("scheduler", options=sampler.SCHEDULERS, default="normal",
                       tooltip=as_there),
    ]
