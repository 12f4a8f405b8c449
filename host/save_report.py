"""Save Report: what is connected, on a page of its own in the output folder."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import comfy.model_management as management
import comfyui_version
import torch
from comfy.cli_args import args
from PIL import Image

from ..metrics.markdown import printable
from ..metrics.report import FORMATS, Attachment, Picture, Report, Section, save_report
from ..quant import QuantTuneError
from .benchmark import device_name
from .folders import output_path

EXAMPLE = "reports/quanttune"


@dataclass(frozen=True)
class Part:
    """A section as it is connected.

    Attributes:
        heading: or "".
        text: or None.
        images: the host's IMAGE ``[n, H, W, C]``, or None.
    """

    heading: str
    text: str | None
    images: torch.Tensor | None


def save_parts(title: str, note: str, parts: Sequence[Part], csv: str | None, prefix: str,
               format: str, workflow: Mapping | None = None) -> tuple[str, str]:
    """Write a report into the output folder.

    Args:
        title, note: of the report.
        parts: its sections; those with nothing connected are left out.
        csv: a table to attach, or None.
        prefix: of the file, below the output folder.
        format: of `FORMATS`.
        workflow: the graph that made it, attached so that it can be repeated, unless the host was
            started with --disable-metadata.

    Returns:
        The page's path, and what to tell.

    Raises:
        QuantTuneError: nothing is connected, a name outside the output folder, or a disk that does
            not take it.
    """
    if format not in FORMATS:
        raise QuantTuneError(f"The format is '{format}', but it has to be one of "
                             f"{', '.join(FORMATS)}.")
    sections = [Section(p.heading, p.text or "", pictures_of(p.images, p.heading)) for p in parts
                if (p.text or "").strip() or (p.images is not None and len(p.images))]
    if not sections and not (csv or "").strip():
        raise QuantTuneError("There is nothing to report; connect a 'report' or a 'chart' of a "
                             "measuring node, such as 'Benchmark Model'.")
    attachments = [Attachment("table.csv", csv)] if (csv or "").strip() else []
    if workflow and not args.disable_metadata:
        attachments.append(Attachment("workflow.json", json.dumps(workflow)))
    report = Report(title.strip() or "Report", note, facts(), sections, attachments)
    base = output_path(prefix, "", EXAMPLE)
    written = save_report(report, base, format)
    told = "\n".join([*(f"Saved {path}" for path in written), "", printable(report.text())])
    return str(written[0]), told


def environment() -> dict[str, str]:
    """Versions and the device, for reports."""
    return {"device": device_name(management.get_torch_device()),
            "ComfyUI": comfyui_version.__version__,
            "PyTorch": str(torch.__version__), "Python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}"}


def facts() -> str:
    """When and on what a report was made, in a line."""
    made = environment()
    return (f"{datetime.now():%Y-%m-%d %H:%M} · {made['device']} · ComfyUI {made['ComfyUI']} · "
            f"PyTorch {made['PyTorch']}")


def as_rgb(images: torch.Tensor) -> torch.Tensor:
    """The host's IMAGE ``[..., C]`` with three channels, float32 in 0..1 on the CPU.

    One channel is grey, two are grey and opacity; opacity is left out.
    """
    own = images[..., :3] if images.shape[-1] > 2 else images[..., :1]
    return own.float().nan_to_num(0).clamp(0, 1).cpu().expand(*own.shape[:-1], 3)


def as_picture(image: torch.Tensor) -> Image.Image:
    """One of the host's IMAGE, ``[H, W, C]`` float in 0..1, as a picture."""
    return Image.fromarray((as_rgb(image) * 255).round().byte().contiguous().numpy())


def pictures_of(images: torch.Tensor | None, caption: str) -> list[Picture]:
    """Pictures of a batch of the host's IMAGE, counted if there are several."""
    if images is None:
        return []
    return [Picture(as_picture(image), caption if len(images) == 1 else
                    f"{caption} {number} of {len(images)}".strip())
            for number, image in enumerate(images, 1)]
