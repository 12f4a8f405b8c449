"""pyproject.toml: in step with the requirement files and the folders, whole for the registry."""

import asyncio
import re
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
TOOLING = {"tests", "benchmarks", "devtools", "docs", "web", "locales", "workflows"}


def requirements(name):
    lines = (ROOT / name).read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_requirement_files_are_in_step():
    assert requirements("requirements.txt") == PROJECT["project"]["dependencies"]
    extra = PROJECT["project"]["optional-dependencies"]["dev"]
    assert requirements("requirements-dev.txt") == extra


def test_the_hosts_torch_and_numpy_are_never_replaced():
    for line in PROJECT["project"]["dependencies"]:
        version = line.split(";")[0]  # what follows only says where it is needed
        assert not re.search(r"==|<|~=", version), f"{line} could downgrade one of the host's"
    assert "torch" in PROJECT["project"]["dependencies"]


def test_every_package_folder_is_listed():
    expected = {"quanttune"}
    for path in ROOT.glob("[a-z]*/**/*.py"):
        parts = path.relative_to(ROOT).parent.parts
        if parts[0] not in TOOLING:
            expected.add(".".join(("quanttune", *parts)))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == expected


def test_the_registry_finds_all_it_asks_for():
    comfy = PROJECT["tool"]["comfy"]
    assert {"PublisherId", "DisplayName", "Icon", "requires-comfyui", "includes"} <= set(comfy)
    assert "web" not in comfy, "WEB_DIRECTORY is set in __init__.py; both at once load it twice"
    project = PROJECT["project"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert re.fullmatch(r"[a-z][a-z0-9-]*", project["name"])
    for key in ("description", "urls", "readme", "license"):
        assert project[key]
    assert (ROOT / "LICENSE").read_text("utf-8").lstrip().startswith("Apache License")


def test_the_pack_offers_an_entry_point_and_nothing_that_switches_it_off():
    import quanttune

    assert not hasattr(quanttune, "NODE_CLASS_MAPPINGS")
    assert (ROOT / quanttune.WEB_DIRECTORY).resolve().is_relative_to(ROOT)
    assert asyncio.iscoroutinefunction(quanttune.comfy_entrypoint)


def test_the_checkout_does_not_hide_the_hosts_modules():
    assert ROOT not in [Path(entry).resolve() for entry in sys.path]
