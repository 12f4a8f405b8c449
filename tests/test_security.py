"""What SECURITY.md promises: nothing shipped can unpickle, evaluate, reach out or write elsewhere.

The source is looked through, and a run of the main nodes is watched. Each look is shown to find
what it is for.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"][
    "packages"]
FOLDERS = sorted({p.partition(".")[2].partition(".")[0] for p in PACKAGES} - {""})
PYTHON = [ROOT / "__init__.py", ROOT / "__main__.py",
          *(p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py")))]
PAGES = [p for p in sorted((ROOT / "web").rglob("*")) if p.suffix in (".js", ".mjs", ".html")]

MODULES = {
    "unpickles": {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle",
                  "joblib", "pandas", "copyreg"},
    "reaches out": {"requests", "urllib", "urllib3", "http", "socket", "ssl", "aiohttp", "httpx",
                    "ftplib", "smtplib", "telnetlib", "websocket", "websockets", "webbrowser",
                    "huggingface_hub", "xmlrpc", "asyncio", "_socket", "_ssl", "socketserver",
                    "nntplib", "poplib", "imaplib", "pycurl", "fsspec", "gdown", "wandb",
                    "datasets"},
    "starts programs": {"subprocess", "multiprocessing", "pty", "pip", "ensurepip", "venv",
                        "posix", "nt"},
    "leaves Python": {"ctypes", "cffi"},
    "runs text": {"code", "codeop", "runpy", "importlib", "imp", "timeit", "pdb", "pydoc",
                  "pkgutil", "zipimport", "builtins"},
}
"""Modules that need a reason, by what they can do."""
REVIEWED = {
    ("host/live.py", "asyncio"): "a header is read in a thread, so that the server goes on",
    ("host/live.py", "aiohttp"): "the type of an answer to the page by the host's own server",
    ("quant/int8/kitchen.py", "importlib"): "find_spec: whether comfy-kitchen is installed",
    ("quant/int8/triton_backend.py", "importlib"): "find_spec: whether Triton is installed",
    ("quant/paging.py", "ctypes"): "malloc_trim and madvise of the C library",
    ("quant/whole_file.py", "ctypes"): "the bytes of a tensor without a copy",
    ("metrics/report.py", "urllib"): "urllib.parse: names of files in a page's links",
    ("starter/evaluate.py", "runpy"): "the recipe of the starter, never run in ComfyUI",
    ("starter/parallel.py", "multiprocessing"): "the recipe of the starter, never run in ComfyUI",
    ("starter/stage_vae.py", "multiprocessing"): "the recipe of the starter, never run in ComfyUI",
    ("starter/train.py", "runpy"): "the recipe of the starter, never run in ComfyUI",
    ("starter/upscaler_evaluate.py", "runpy"): "the recipe of the starter, never run in ComfyUI",
    ("starter/upscaler_preview.py", "runpy"): "the recipe of the starter, never run in ComfyUI",
    ("starter/upscaler_train.py", "runpy"): "the recipe of the starter, never run in ComfyUI",
}
"""Why a file may import such a module."""
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.startfile",
         "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.package.PackageImporter",
         "hf_hub_download", "snapshot_download", "load_dataset", "urlopen", "urlretrieve",
         "torch.utils.cpp_extension.load", "torch.utils.cpp_extension.load_inline",
         "torch.jit.load", "torch.export.load", "torch.hub.download_url_to_file",
         "torch.ops.load_library", "torch.classes.load_library", "yaml.load", "yaml.unsafe_load",
         "init_process_group"}
"""Calls that are not made, by their last or whole dotted name."""
HOMES = {"expanduser", "expandvars", "Path.home", "pathlib.Path.home", "tempfile.gettempdir"}
"""Calls that lead out of ComfyUI's folders, by their last or whole dotted name."""
RECIPES = {("starter/train_scales.py", "tempfile.TemporaryDirectory")}
"""Temporary files outside of ComfyUI's folders, of recipes that never run in ComfyUI."""
HANDED_ON = {"eval", "exec", "__import__", "__builtins__", "builtins", "os.system", "os.popen",
             "os.startfile", "torch.load", "sys.modules"}
"""What is called by its own name alone or not at all."""
PROCESSES = re.compile(r"os\.(exec|spawn|posix_spawn|fork)\w*")


def aliases(tree: ast.AST) -> dict[str, str]:
    """What a file calls what it imports, and the whole dotted names of these."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def whole_name(node: ast.AST, known: dict[str, str]) -> str:
    """The dotted name of an expression with its first part as it was imported."""
    first, dot, rest = ast.unparse(node).partition(".")
    return known.get(first, first).removeprefix("builtins.") + dot + rest


def python_faults(path: str, text: str) -> list[str]:
    """What a file does that it may not; ``path`` is relative to the pack."""
    found, tree = [], ast.parse(text)
    known = aliases(tree)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
            [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
        if isinstance(node, ast.ImportFrom) and not node.level:
            names += [f"{node.module}.{a.name}" for a in node.names]
        parts = {part for name in names for part in name.split(".")}
        for what, modules in MODULES.items():
            found += [f"{path}:{line} imports {module}, which {what}" for module in parts & modules
                      if (path, module) not in REVIEWED]
        if isinstance(node, ast.Call):
            found += [f"{path}:{line} {fault}" for fault in call_faults(node, known)
                      if (path, whole_name(node.func, known)) not in RECIPES]
        elif isinstance(node, ast.Name | ast.Attribute) and id(node) not in called:
            # Another name for it, or handed on: nobody sees then what is called.
            name = whole_name(node, known).removeprefix("builtins.")
            if name in HANDED_ON or PROCESSES.fullmatch(name):
                found.append(f"{path}:{line} hands on {name}")
        if isinstance(node, ast.Attribute) and node.attr in MODULES["unpickles"] | {
                "pickle_module", "_pickle"}:
            found.append(f"{path}:{line} reaches for {ast.unparse(node)}")
    return found


def call_faults(call: ast.Call, known: dict[str, str]) -> list[str]:
    """What is wrong with one call; ``known`` are the file's own names for what it imports."""
    name = whole_name(call.func, known).removeprefix("builtins.")
    last = name.rpartition(".")[2]
    told = {k.arg: ast.unparse(k.value) for k in call.keywords}
    if name in CALLS or (last in CALLS and last not in ("eval", "compile", "exec", "load")):
        return [f"calls {name}"]
    if PROCESSES.fullmatch(name):
        return [f"calls {name}"]
    if name in ("torch.load", "torch.serialization.load") and (
            told.get("weights_only") != "True" or None in told):
        return ["calls torch.load without weights_only=True"]
    if name == "comfy.utils.load_torch_file" and told.get("safe_load") != "True":
        return ["calls load_torch_file without safe_load=True"]
    if name.startswith(("np.", "numpy.")) and last in ("load", "read_array") and (
            len(call.args) > 2 or None in told):
        return ["loads arrays by arguments that are not seen"]
    if last in ("load", "read_array") and told.get("allow_pickle") not in (None, "False"):
        return ["loads pickled arrays"]
    if name in HOMES or last in HOMES:
        return [f"calls {name}, which leads out of ComfyUI's folders"]
    if name.startswith("tempfile.") and told.get("dir", "None") == "None":
        return [f"calls {name} without the folder to write in"]
    if told.get("trust_remote_code") not in (None, "False"):
        return ["runs code of a folder"]
    if last in ("from_pretrained", "from_single_file", "from_config") and name != (
            "torch.nn.Embedding.from_pretrained") and told.get("local_files_only") != "True":
        return [f"calls {name} without local_files_only=True"]
    if last == "import_module" or name == "getattr" and len(call.args) > 1 and (
            ast.unparse(call.args[1]).strip("'\"") in ("eval", "exec", "system", "loads")
            or ast.unparse(call.args[0]) in ("os", "builtins", "__builtins__")
            and not isinstance(call.args[1], ast.Constant)):
        return [f"calls {name} on what it does not name"]
    return []


SCRIPT = {
    r"\beval\s*\(": "evaluates", r"\bnew\s+Function\b|\bFunction\s*\(": "makes code of text",
    r"set(Timeout|Interval)\s*\(\s*[\"'`]": "runs text",
    r"\.(inner|outer)HTML\s*\+?=|insertAdjacentHTML|document\.write|DOMParser|srcdoc": "makes HTML",
    r"\bXMLHttpRequest\b|\bWebSocket\s*\(|\bEventSource\s*\(|sendBeacon|\bRTCPeer": "reaches out",
    r"(?<!api\.)\bfetch\s*\((?!\s*[\"'`]/)": "fetches by itself",
    r"\bimport\s*\(\s*(?![\"']\.{0,2}/)": "imports what it does not name",
    r"(?<!www\.w3\.org)(https?:)?//(?!www\.w3\.org/)[\w-]+\.[\w.-]+": "names another origin",
    r"<script\b|\bjavascript:|\son\w+\s*=\s*[\"']": "puts code into a page",
}
"""What a page's script may not do."""


def script_faults(path: str, text: str) -> list[str]:
    """What a script or page does that it may not; comments are left out."""
    bare = re.sub(r"/\*.*?\*/|(?<![:\"'`])//[^\n]*", "", text, flags=re.DOTALL)
    return [f"{path} {what}: {match[0]!r}" for pattern, what in SCRIPT.items()
            for match in re.finditer(pattern, bare)]


def test_everything_shipped_is_looked_at():
    assert {"quant", "host", "nodes", "training", "metrics", "starter"} <= set(FOLDERS)
    assert len(PYTHON) > 150


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_python(path):
    assert not python_faults(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))


def test_reasons_are_of_imports_that_there_are():
    for path, module in REVIEWED:
        text = (ROOT / path).read_text("utf-8")
        imported = rf"^\s*(import|from) ([\w.]+\.)?{module}\b"
        assert re.search(imported, text, re.MULTILINE), (path, module)


def test_scripts_and_pages():
    assert not [f for p in PAGES
                for f in script_faults(p.relative_to(ROOT).as_posix(), p.read_text("utf-8"))]


@pytest.mark.parametrize("text", [
    "import pickle", "from pickle import loads", "import dill as d", "import socket",
    "def f():\n    import urllib.request", "from http.client import HTTPConnection",
    "import subprocess", "import ctypes", "import importlib", "import requests", "eval('1')",
    "exec(text)", "compile(text, '', 'exec')", "__import__('os')", "import os\nos.system('ls')",
    "os.execv('a', [])", "torch.load(p)", "torch.load(p, weights_only=False)",
    "torch.load(p, weights_only=flag)", "np.load(p, allow_pickle=True)",
    "CLIPModel.from_pretrained('openai/clip')", "Pipe.from_pretrained(x, local_files_only=False)",
    "huggingface_hub.hf_hub_download('a', 'b')", "from huggingface_hub import snapshot_download",
    "torch.hub.load('a', 'b')", "importlib.import_module(name)", "getattr(builtins, 'eval')(x)",
    # Under another name, by a detour, or with arguments that are not seen.
    "run = exec\nrun(text)", "map(eval, texts)", "import builtins as b\nb.exec(text)",
    "from builtins import exec as run", "__builtins__['eval'](text)", "load = __import__",
    "from torch import load\nload(p)", "import torch as t\nt.load(p)",
    "from torch import load as read\nread(p, weights_only=False)", "f = torch.load",
    "torch.load(p, weights_only=True, **more)", "torch.serialization.pickle.load(f)",
    "from torch.serialization import pickle_module\nimport os as o\no.system('ls')",
    "from os import system\nsystem('ls')", "from os import execv as go\ngo('a', [])",
    "getattr(os, 'sys' + 'tem')('ls')", "import sys\nsys.modules['pickle'].loads(b)",
    "import torch.hub as h\nh.load('a', 'b')", "torch.hub.download_url_to_file(u, p)",
    "from torch.hub import load_state_dict_from_url as get\nget(u)",
    "from torch import multiprocessing", "import torch.multiprocessing as mp",
    "import torch.distributed as d\nd.init_process_group('gloo')", "import _socket",
    "torch.jit.load(p)", "torch.ops.load_library('x.so')", "np.load(p, None, True)",
    "from numpy import load\nload(p, **more)", "np.lib.format.read_array(f, allow_pickle=True)",
    "import comfy.utils\ncomfy.utils.load_torch_file(p)",
    "AutoModel.from_pretrained(p, local_files_only=True, trust_remote_code=True)",
    "from datasets import load_dataset as rows", "import wandb", "yaml.load(text)",
    "open(os.path.expanduser('~/.cache/x'), 'w')", "from pathlib import Path\nPath.home()",
    "import tempfile\ntempfile.mkstemp()", "from tempfile import mkdtemp as make\nmake()",
])
def test_planted_python_is_found(text):
    assert python_faults("quant/planted.py", text)


@pytest.mark.parametrize("text", [
    "model.eval()", "torch.compile(f)", "re.compile('x')", "torch.load(p, weights_only=True)",
    "np.load(p, mmap_mode='r')", "x.from_pretrained(p, local_files_only=True)", "pattern.exec(x)",
    "import json, os", "from .safe_file import read_header", "tempfile.mkstemp(dir=folder)",
    "from torch import nn, Tensor", "import numpy as np\nnp.load(p)", "from .data import load",
])
def test_ordinary_python_is_not(text):
    assert not python_faults("quant/ordinary.py", text)


@pytest.mark.parametrize("text", [
    "eval('1')", "const f = new Function('a')", "setTimeout('x()', 1)", "e.innerHTML = name",
    "e.innerHTML += name", "e.insertAdjacentHTML('x', y)", "document.write(x)",
    "fetch('https://example.com/x')", "fetch(url)", "fetch('//example.com')",
    "new WebSocket('ws://x')", "new XMLHttpRequest()", "import(name)",
    "const u = 'https://cdn.example.com/x.js'", "a.href = 'javascript:x()'",
    "s = '<script src=x>'", "s = '<img onerror=\"x()\">'", "navigator.sendBeacon('/x')",
])
def test_planted_script_is_found(text):
    assert script_faults("web/js/planted.js", text)


@pytest.mark.parametrize("text", [
    'import { app } from "/scripts/app.js"', "api.fetchApi('/quanttune/losses')",
    "const ns = 'http://www.w3.org/2000/svg'", "// see https://docs.comfy.org", "a / b / c",
    "e.textContent = name", "fetch('/quanttune/x')", "await import('./chart.js')",
])
def test_ordinary_script_is_not(text):
    assert not script_faults("web/js/ordinary.js", text)


def watched(folder, *arguments):
    """`watched_run.py` in a process of its own."""
    import comfy.cli_args

    paths = [str(ROOT / ".dev" / "site"), str(Path(comfy.cli_args.__file__).parents[1])]
    code = f"import sys, runpy; sys.path[:0] = {paths!r}; sys.argv = sys.argv[1:]; " \
           "runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-B", "-c", code, str(Path(__file__).with_name("watched_run.py")),
         str(folder), *arguments], capture_output=True, text=True, timeout=600)


def test_a_run_writes_in_the_hosts_folders_alone_and_reaches_nobody(comfy_inprocess, tmp_path):
    done = watched(tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "nothing forbidden" in done.stdout
    assert list((tmp_path / "output").rglob("*.safetensors"))


@pytest.mark.parametrize("plant", ["write", "rename", "connect", "resolve", "unpickle", "program"])
def test_a_run_that_breaks_a_promise_is_found(plant, comfy_inprocess, tmp_path):
    done = watched(tmp_path, "--plant", plant)
    assert done.returncode == 3, (done.stdout + done.stderr)[-2000:]
    assert f"planted {plant}" not in done.stdout and "forbidden:" in done.stdout
