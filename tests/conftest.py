"""Set up every test: where the host and the pack are imported from, and the shared fixtures.

The order on `sys.path` matters: the checkout itself must not be there, because its `nodes` package
would hide the host's `nodes` module. Tests import the pack as `quanttune`, and helpers beside them
as `quanttune.tests.…`.
"""

import os
import random
import sys
from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
HOST = Path(os.environ.get("QUANTTUNE_HOST") or ROOT / ".dev" / "ComfyUI")

sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != ROOT]
if str(ROOT / ".dev" / "site") not in sys.path:
    sys.path.insert(0, str(ROOT / ".dev" / "site"))
if HOST.is_dir() and str(HOST) not in sys.path:
    sys.path.append(str(HOST))

settings.register_profile(
    "quanttune",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("quanttune")

pytest_plugins = [
    "quanttune.tests.harness.inprocess",
    "quanttune.tests.harness.server",
    "quanttune.tests.harness.browser",
]


FIRST = ("workflows", "host/test_lora_train.py", "nodes/test_train_scales.py", "host")
"""What takes longest, in `tests/`: with several processes, none then waits for the other's end."""


def pytest_ignore_collect(collection_path, config):
    """With `-m smoke`, import nothing but the files that hold smoke tests."""
    folder = ROOT / "tests"
    if config.option.markexpr != "smoke" or not collection_path.is_relative_to(folder):
        return None
    if collection_path.suffix != ".py" or collection_path.name == "conftest.py":
        return None
    from quanttune.tests.harness.smoke import files

    return collection_path.relative_to(folder).as_posix() not in files() or None


def pytest_collection_modifyitems(items):
    """Mark the smoke tests, and begin with the longest files (processes take files in order)."""
    from quanttune.tests.harness.smoke import mark

    mark(items)
    unstable = [item.nodeid for item in items if " at 0x" in item.nodeid]
    assert not unstable, f"names that differ from process to process: {unstable[:3]}"

    def place(item):
        path = Path(item.path).relative_to(ROOT / "tests").as_posix()
        return next((i for i, first in enumerate(FIRST) if path.startswith(first)), len(FIRST))

    items.sort(key=place)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Every test and its fixtures draw the same numbers, whatever ran before in their process."""
    random.seed(0)
    for name, seed in (("numpy", "random.seed"), ("torch", "manual_seed")):
        if name in sys.modules:
            attrgetter(seed)(sys.modules[name])(0)


def pytest_configure():
    """Keep the host off the GPU before any test module imports it."""
    if HOST.is_dir():
        from comfy.cli_args import args

        args.cpu = True
