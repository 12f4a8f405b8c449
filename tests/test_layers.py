"""The one-way rule: nodes → host → {training, metrics} → quant, and only the top knows ComfyUI."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST_MODULES = {
    "comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths",
    "latent_preview", "node_helpers", "nodes", "server",
}  # fmt: skip
# What each layer may import of the pack besides itself.
MAY_IMPORT = {
    "quant": set(),
    "training": {"quant"},
    "metrics": {"quant"},
    "host": {"quant", "training", "metrics", "starter"},
    "starter": {"quant", "training", "metrics", "host"},
    "nodes": {"quant", "training", "metrics", "host", "starter"},
}
KNOWS_COMFYUI = {"host", "nodes"}
# The starter model is loaded, trained and judged with the host; the rest of its recipe may use the
# host inside functions only, so that importing it (for its pictures, say) needs no ComfyUI.
STARTER_KNOWS_COMFYUI = {"load", "load_upscaler", "train", "evaluate"}

FILES = sorted(p for layer in MAY_IMPORT for p in (ROOT / layer).rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])


def imports(path: Path, *, inside: bool = True) -> list[tuple[str, int]]:
    """Absolute dotted names of all that a file imports; those of the pack begin with ".".

    Those inside of functions are left out unless `inside`.
    """
    found = []
    package = path.relative_to(ROOT).parent.parts
    todo = [ast.parse(path.read_text("utf-8"), str(path))]
    while todo:
        node = todo.pop()
        if inside or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.module, node.lineno))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            own = [*base, *(node.module.split(".") if node.module else ())]
            names = [own] if own else [[alias.name] for alias in node.names]
            found += [("." + ".".join(name), node.lineno) for name in names]
    return found


def test_the_layers_are_there():
    assert {"quant", "host", "nodes"} <= {path.relative_to(ROOT).parts[0] for path in FILES}


@each_file
def test_imports_go_one_way(path):
    layer = path.relative_to(ROOT).parts[0]
    for name, line in imports(path):
        if not name.startswith("."):
            continue
        target = name[1:].split(".")[0]
        if target in MAY_IMPORT and target != layer:
            assert target in MAY_IMPORT[layer], f"line {line}: {layer} may not import {target}"


@each_file
def test_only_the_top_layers_know_comfyui(path):
    layer = path.relative_to(ROOT).parts[0]
    if layer in KNOWS_COMFYUI or (layer == "starter" and path.stem in STARTER_KNOWS_COMFYUI):
        return
    for name, line in imports(path, inside=layer != "starter"):
        assert name.split(".")[0] not in HOST_MODULES, f"line {line}: {name} belongs to the host"


@each_file
def test_the_pack_imports_itself_relatively(path):
    if path.relative_to(ROOT).parts[0] == "starter":
        return  # its recipe is also run as a script
    for name, line in imports(path):
        assert name.split(".")[0] != "quanttune", f"line {line}: ComfyUI does not know this name"


@pytest.mark.parametrize("layer", ["quant", "training", "metrics"])
def test_lower_layers_load_without_comfyui(layer):
    if not (ROOT / layer / "__init__.py").exists():
        pytest.skip(f"{layer}/ is not there yet")
    code = (
        f"import sys, quanttune.{layer}\n"
        f"bad = {sorted(HOST_MODULES)!r}\n"
        "sys.exit(', '.join(n for n in bad if n in sys.modules) or 0)"
    )
    env = {"PYTHONPATH": str(ROOT / ".dev" / "site"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


def test_nothing_shipped_pickles_or_evaluates_or_installs():
    bad = re.compile(r"\bpickle\b|\beval\(|\bexec\(|torch\.load\(|pip install|logging\.basicConfig")
    for path in FILES:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if "torch.load(" in line and "weights_only=True" in line:
                continue
            code = line.split("#")[0]
            # `.eval()` of a module is another thing, and words in messages or docstrings are fine.
            if found := bad.search(re.sub(r"\.eval\(|([\"'`]).*?\1", "", code)):
                pytest.fail(f"{path.relative_to(ROOT)}:{number}: {found[0]}")


def test_ruff_is_content():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:]
