"""The host inside the test process: its modules, and single nodes run as its executor runs them."""

from __future__ import annotations

import asyncio
import inspect
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def run_node(node: type, **inputs: Any) -> Any:
    """Execute one V3 node class and return its `io.NodeOutput` (`.args`, `.ui`).

    Runs a locked clone of the class inside `torch.inference_mode()`, as the host's executor does.
    Inputs that are not given take the default of the schema, optional ones are left out.
    """
    import torch

    schema = node.GET_SCHEMA()
    known = {entry.id for entry in schema.inputs}
    if unknown := set(inputs) - known:
        raise TypeError(f"{schema.node_id} has no input {', '.join(sorted(unknown))}")
    for entry in schema.inputs:
        if entry.id not in inputs and not entry.optional and hasattr(entry, "default"):
            value = entry.default
            if value is None and getattr(entry, "options", None):
                value = entry.options[0]
            inputs[entry.id] = value
    clone = node.PREPARE_CLASS_CLONE(None)
    with torch.inference_mode():
        if inspect.iscoroutinefunction(node.execute):
            return asyncio.run(clone.EXECUTE_NORMALIZED_ASYNC(**inputs))
        return clone.EXECUTE_NORMALIZED(**inputs)


def pack_nodes() -> dict[str, type]:
    """Every node class of the pack by its id, from the entry point that the host calls."""
    import quanttune

    async def listed():
        extension = await quanttune.comfy_entrypoint()
        await extension.on_load()
        return await extension.get_node_list()

    # In a thread, since a browser test has an event loop running in this one.
    with ThreadPoolExecutor(1) as thread:
        nodes = thread.submit(asyncio.run, listed()).result()
    return {node.GET_SCHEMA().node_id: node for node in nodes}


@pytest.fixture(scope="session")
def comfy_inprocess() -> ModuleType:
    """The imported `comfy` package, on the CPU; fails when the host is not set up."""
    import comfy
    import comfy.model_management

    assert comfy.model_management.cpu_state.name == "CPU", "the host was imported before --cpu"
    return comfy


@pytest.fixture
def integer_products(comfy_inprocess) -> None:
    """Skips where no layer can multiply integers, as on processors without VNNI.

    The pack says so there and computes in float; what needs integers is refused.
    """
    import torch

    from quanttune.host.int8 import backend_for

    backend, refused = backend_for(torch.nn.Linear(64, 64))
    if backend is None:
        pytest.skip(f"this machine has no integer backend: {refused}")


@pytest.fixture
def host_folders(comfy_inprocess, tmp_path, monkeypatch) -> Path:
    """A folder of the test's own that the host reads models from and writes its output to.

    Its subfolders are `input`, `output`, `temp`, `user` and `models/<kind>` for every kind of model
    that the host knows. The host's former folders come back after the test.
    """
    import folder_paths

    for name in ("input", "output", "temp", "user"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    kinds = {}
    for kind, (_, extensions) in folder_paths.folder_names_and_paths.items():
        folder = tmp_path / "models" / kind
        folder.mkdir(parents=True)
        kinds[kind] = ([os.fspath(folder)], extensions)
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", kinds)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    return tmp_path
