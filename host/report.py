"""A report on a float MODEL: what quantizing it costs, loses and needs, measured and written up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..metrics.markdown import table
from ..metrics.pareto import chart, csv, markdown
from ..metrics.recommend import recommend, recommend_layers, recommend_timing
from ..metrics.report import Attachment, Picture, Report, Section
from ..metrics.sensitivity import Sensitivity, label_of
from ..metrics.sensitivity_charts import group_chart, heat_map, plan_chart
from ..metrics.similarity import WINDOW
from ..quant import QuantSpec, QuantTuneError
from ..quant.plan import BitPlan
from .benchmark import benchmark
from .build import quantized_model
from .check import check_model
from .dynamic_int8 import dynamic_int8, fast_float, float_changes
from .pareto import Candidates, pareto
from .pictures import SamplingSettings, empty_latent
from .plan import SEARCHED, bit_plan
from .quantize import quantize_model
from .samples import conditioning_of
from .save_report import as_picture, environment, facts
from .sensitivity import SensitivitySettings, layer_sensitivity

PART = "report"
"""Marks the progress of a whole part, for who listens to the host's progress bars."""
RANGES = {"timestep_buckets": (1, 100), "cfg": (0, 100), "seed": (0, 2**53 - 1)}
"""Least and most of settings, as the nodes have them."""
WORST = 8
"""Layers that the table of the most sensitive ones names."""


@dataclass(frozen=True)
class ReportSettings:
    """How the parts of a report are measured.

    Attributes:
        prompts: that the model is run on, in turn, as many as there are samples or pictures; the
            first one is that of the picture.
        latent: side of the latents.
        bits: uniform widths, which a plan may choose from, too.
        unit: "layer" or "group", see `SensitivitySettings`.
        forwards: steps of the sampler that every error is measured on.
        timestep_buckets: intervals of the timesteps that the heat maps tell apart.
        samples: pictures that are started to take those steps from.
        pictures: made with each candidate and compared by SSIM; 0 for none.
        runs: timed steps of each model.
        steps, cfg, sampler, scheduler, seed: as in the KSampler.
    """

    prompts: tuple[str, ...]
    latent: int = 64
    bits: tuple[int, ...] = (8, 4, 2)
    unit: str = "layer"
    forwards: int = 8
    timestep_buckets: int = 4
    samples: int = 4
    pictures: int = 0
    runs: int = 10
    steps: int = 20
    cfg: float = 5.0
    sampler: str = "dpmpp_2m"
    scheduler: str = "karras"
    seed: int = 0

    def __post_init__(self) -> None:
        if not any(p.strip() for p in self.prompts):
            raise QuantTuneError("There is no prompt to measure with; give at least one.")
        if not self.bits:
            raise QuantTuneError("There is no bit width to measure; give at least one of 8, 4, 3 "
                                 "and 2.")
        for name, (least, most) in RANGES.items():
            if not least <= getattr(self, name) <= most:
                raise QuantTuneError(f"The setting {name} is {getattr(self, name)}, but it has to "
                                     f"be from {least} to {most}.")
        for name in ("latent", "runs", "samples", "steps", "forwards"):
            if getattr(self, name) < 1:
                raise QuantTuneError(f"The setting {name} is {getattr(self, name)}, but it has to "
                                     "be at least 1.")
        if self.pictures < 0:
            raise QuantTuneError(f"The setting pictures is {self.pictures}, but it has to be at "
                                 "least 0.")


def report_on(model, clip, vae, name: str, how: ReportSettings, command: str = "",
              say: Callable[[str], None] = lambda text: None) -> Report:
    """Measure time and memory, sensitivity to fewer bits, plans of a size and error over size and
    time of a float MODEL, check one plan, and write up what was found.

    Args:
        model, clip, vae: the host's, of one checkpoint.
        name: what to call the model.
        how: the settings.
        command: that repeats it, or "".
        say: is told what begins.

    Raises:
        QuantTuneError: a quantized MODEL, or one that cannot be measured so.
    """
    if quantized_model(model) is not None:
        raise QuantTuneError("This MODEL is quantized already; give the float model, which is "
                             "quantized here in several ways.")
    # Those whose turn does not come are not told as if it had.
    how = replace(how, prompts=how.prompts[:max(how.samples, how.pictures)])
    positive, negative = conditioning_of(clip, "\n".join(how.prompts), None, None)
    side = how.latent * vae.spacial_compression_encode()
    if how.pictures and side < WINDOW:
        raise QuantTuneError(f"The setting latent is {how.latent}, which makes pictures of "
                             f"{side} x {side} pixels, but SSIM needs {WINDOW} x {WINDOW}; use "
                             "larger latents, or set pictures to 0.")
    latent = {"samples": empty_latent(model, vae, side, side)}
    sampled = SensitivitySettings(
        precisions=tuple(map(str, how.bits)), unit=how.unit, forwards=how.forwards,
        timestep_buckets=how.timestep_buckets, samples=max(how.samples, how.pictures) * how.steps,
        steps=how.steps, cfg=how.cfg, sampler=how.sampler, scheduler=how.scheduler, seed=how.seed)

    say("time and memory")
    costs = _costs(model, latent, positive, negative, how)
    say("sensitivity of the layers")
    found = layer_sensitivity(model, latent, positive, negative, sampled, PART)
    budgets, chosen = budgets_for(found)
    plan, told = bit_plan(model, SEARCHED, found, chosen)
    say("error over size and time")
    points = pareto(model, vae if how.pictures else None, latent, positive, negative, sampled,
                    Candidates(how.bits, budgets, True, min(how.runs, 5), how.pictures), found,
                    PART)
    say("the plan, checked")
    planned, _ = quantize_model(model, QuantSpec(4, range="mse"), name=name, plan=plan)
    check = check_model(planned, clip, vae, how.prompts[0],
                        SamplingSettings(side, side, how.steps, how.cfg, how.sampler,
                                         how.scheduler, how.seed), model, PART)
    sentences = [*recommend(points), *recommend_layers(found), *recommend_timing(costs)]
    return Report(
        f"Quantization report: {name}", facts=facts(), sections=(
            Section("Time and memory", costs.markdown(),
                    [Picture(costs.chart(), "Time and memory of a step")]),
            Section("Which layers need their bits", sensitivity_text(found),
                    [Picture(group_chart(found), "Error by kind of layer"),
                     *(Picture(heat_map(found, p), f"Error by layer and timestep, {label_of(p)}")
                       for p in found.precisions)]),
            Section("A searched plan", told, [Picture(plan_chart(plan), "Bits of each kind of "
                                                                       "layer")]),
            Section("Error over size and time", markdown(points),
                    [Picture(chart(points), "What nothing else beats")]),
            Section("The plan, checked", check.report, [] if check.picture is None else
                    [Picture(as_picture(check.picture[0]), how.prompts[0])]),
            Section("What follows", "\n".join(f"- {s}" for s in sentences)),
            Section("To repeat it", settings_text(how, command))),
        attachments=(
            Attachment("benchmark.csv", costs.csv()), Attachment("pareto.csv", csv(points)),
            Attachment("sensitivity.json", found.to_json()),
            Attachment("plan.csv", plan_csv(plan))))


def _costs(model, latent, positive, negative, how: ReportSettings):
    """Benchmark of the float model, integer products and uniform bits, freed afterwards."""
    models = [("float", model)]
    if changes := float_changes(model):
        models.append((", ".join(["float", *changes]), fast_float(model)))
    models.append(("INT8 products", dynamic_int8(model)[0]))
    models += [(f"{bits} bits", quantize_model(model, QuantSpec(bits, range="mse"))[0])
               for bits in how.bits]
    # One prompt: of several, each step would run them all.
    return benchmark(models, latent, positive[:1], negative, how.cfg, how.runs, 2, how.steps, PART)


def budgets_for(found: Sensitivity) -> tuple[tuple[float, ...], float]:
    """Bits a weight of the plans to compare, and the one to look at more closely.

    They are the sizes of the uniform widths, to the next tenth, and the halves between them; the
    least leaves nothing to choose. The one is of the size of the second least width.
    """
    own = sorted(math.ceil(10 * found.bits_per_weight(BitPlan(dict.fromkeys(found.shapes, bits))))
                 / 10 for bits in {int(p) for p in found.precisions if p.isdigit()})
    if len(own) == 1:
        # Between the one width there is and float.
        only = min(own[0] + 2, 15.9)
        return (only,), only
    halves = [round((a + b) / 2, 2) for a, b in zip(own, own[1:])]
    return tuple(sorted({*own[1:], *halves})), own[1]


def sensitivity_text(found: Sensitivity) -> str:
    """Tables of the kinds of layers and of the most sensitive layers."""
    labels = [label_of(p) for p in found.precisions]
    rows = [(group, *(f"{100 * max(e, 0.0) ** 0.5:.2g}%" for e in errors))
            for group, errors in found.by_group().items()]
    alone = len(found.units) == len(found.shapes)
    what = ("of the layers of a kind, each quantized alone, taken together as if independent"
            if alone else "when only the layers of a kind are quantized")
    parts = [f"Relative error of the model's output {what}, on {sum(found.forwards)} forwards.",
             table(["kind of layer", *labels], rows)]
    if alone:
        worst = [found.worst(p, WORST) for p in found.precisions]
        parts += [f"The {len(worst[0])} layers that lose most alone:",
                  table(["", *labels], [(i, *(f"`{name}` {100 * error:.2g}%"
                                              for name, error in row))
                                        for i, row in enumerate(zip(*worst), 1)])]
    return "\n\n".join(parts)


def plan_csv(plan: BitPlan) -> str:
    """Layer and bits, "float" where it stays."""
    return "layer,bits\n" + "".join(f'"{name}",{bits or "float"}\n'
                                    for name, bits in plan.bits.items())


def settings_text(how: ReportSettings, command: str) -> str:
    """Everything that the numbers depend on."""
    rows = [("prompts", " / ".join(how.prompts)), ("latents", f"{how.latent} x {how.latent}"),
            ("bits", ", ".join(map(str, how.bits))), ("unit of the sensitivity", how.unit),
            ("forwards", how.forwards), ("intervals of the timesteps", how.timestep_buckets),
            ("samples", how.samples), ("pictures compared", how.pictures),
            ("timed steps", how.runs), ("steps of a picture", how.steps), ("cfg", how.cfg),
            ("sampler", f"{how.sampler}, {how.scheduler}"), ("seed", how.seed),
            *environment().items()]
    text = table(["setting", "value"], rows)
    return f"```\n{command}\n```\n\n{text}" if command else text
