"""Messages to the page that queued what runs, and what the page asks of the server."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..quant import QuantTuneError
from ..quant.safe_file import METADATA_KEY, read_header
from ..quant.scale_file import SCALES_FORMAT
from . import folders

LOSSES, EXPERTS = "quanttune.losses", "quanttune.experts"
"""Names of the messages: of a training's losses, and of a sampling's timesteps."""
MOST = 100_000
"""No scale file has more experts or timesteps."""
PACK = Path(__file__).parents[1].name
"""The folder that the pack lies in, and the name by which the page asks for its files."""


def server():
    """The host's server, or None where there is none (tests, the command line)."""
    try:
        from server import PromptServer
    except ImportError:
        return None
    return getattr(PromptServer, "instance", None)


def running() -> tuple[str, str]:
    """``(prompt, node)``: ids of what the host executes in this thread; empty for nothing."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        return "", ""
    context = get_executing_context()
    return ("", "") if context is None else (str(context.prompt_id), str(context.node_id))


def tell_page(event: str, data: Mapping[str, Any]) -> None:
    """Send a message to the page that queued the present prompt.

    Nothing happens without a server, or where a program without a page has queued it.
    """
    host = server()
    client = getattr(host, "client_id", None)
    if client is not None:
        host.send_sync(event, dict(data), client)


def experts_in(name: str) -> dict[str, int] | None:
    """Experts and timesteps of a listed scale file, by its header; None where it tells none.

    ``name`` has to be one that the nodes offer, so that no path leads out of the folders.
    """
    if name not in folders.scale_files():
        return None
    try:
        strings, _ = read_header(folders.scales_path(name))
        facts = json.loads(strings.get(METADATA_KEY, "null"))
        told, counts = facts["format"], (facts["num_experts"], facts["num_timesteps"])
    except (QuantTuneError, OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        logging.debug(f"'{name}' tells no experts: {error}")
        return None
    if told != SCALES_FORMAT or not all(type(n) is int and 1 <= n <= MOST for n in counts):
        return None
    return {"experts": counts[0], "timesteps": counts[1]}


def warn_of_name(folder: str) -> None:
    """Tell in the log when the host cannot serve the page what lies in the pack's folder.

    The host looks for the name as it stands, where the page asks for it with ``%20`` for a space:
    help pages, charts, badges and thumbnails would be missing without a word.
    """
    if re.search(r"[^\w.~!$&'()*+,;=:@-]", folder, re.ASCII):
        logging.warning(f"QuantTune: the folder's name '{folder}' has signs that ComfyUI cannot "
                        "serve to the page, so help, charts and badges will be missing; rename it "
                        "to ComfyUI-QuantTune and start ComfyUI again.")


def register_routes() -> None:
    """``GET /quanttune/experts?name=FILE``: `experts_in`, ``{}`` for None."""
    host = server()
    if host is None or not hasattr(host, "routes"):
        return
    from aiohttp import web

    async def experts(request):
        found = await asyncio.to_thread(experts_in, request.query.get("name", ""))
        return web.json_response(found or {})

    host.routes.get("/quanttune/experts")(experts)
