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
                  "joblib", "pandas"},
    "reaches out": {"requests", "urllib", "urllib3", "http", "socket", "ssl", "aiohttp", "httpx",
                    "ftplib", "smtplib", "telnetlib", "websocket", "websockets", "webbrowser",
                    "huggingface_hub", "xmlrpc", "asyncio"},
    "starts programs": {"subprocess", "multiprocessing", "pty", "pip", "ensurepip", "venv"},
    "leaves Python": {"ctypes", "cffi"},
    "runs text": {"code", "codeop", "runpy", "importlib", "imp"},
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
    ("starter/train.py", "runpy"): "the recipe of the starter, never run in ComfyUI",
    ("starter/upscaler_evaluate.py", "runpy"): "the recipe of the starter, never run in ComfyUI",
    ("starter/upscaler_preview.py", "runpy"): "the recipe of the starter, never run in ComfyUI",
    ("starter/upscaler_train.py", "runpy"): "the recipe of the starter, never run in ComfyUI",
}
"""Why a file may import such a module."""
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.startfile",
         "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.package.PackageImporter",
         "hf_hub_download", "snapshot_download", "load_dataset", "urlopen", "urlretrieve",
         "torch.utils.cpp_extension.load", "torch.utils.cpp_extension.load_inline"}
"""Calls that are not made, by their last or whole dotted name."""
PROCESSES = re.compile(r"os\.(exec|spawn|posix_spawn|fork)\w*")


def python_faults(path: str, text: str) -> list[str]:
    """What a file does that it may not; ``path`` is relative to the pack."""
    found = []
    for node in ast.walk(ast.parse(text)):
        line = getattr(node, "lineno", 0)
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
            [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
        for module in {name.partition(".")[0] for name in names}:
            for what, modules in MODULES.items():
                if module in modules and (path, module) not in REVIEWED:
                    found.append(f"{path}:{line} imports {module}, which {what}")
        if isinstance(node, ast.Call):
            found += [f"{path}:{line} {fault}" for fault in call_faults(node)]
    return found


def call_faults(call: ast.Call) -> list[str]:
    """What is wrong with one call."""
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    told = {k.arg: ast.unparse(k.value) for k in call.keywords}
    if name in CALLS or (last in CALLS and last not in ("eval", "compile", "exec", "load")):
        return [f"calls {name}"]
    if PROCESSES.fullmatch(name):
        return [f"calls {name}"]
    if name in ("torch.load", "torch.serialization.load") and told.get("weights_only") != "True":
        return ["calls torch.load without weights_only=True"]
    if last == "load" and told.get("allow_pickle") not in (None, "False"):
        return ["loads pickled arrays"]
    if last in ("from_pretrained", "from_single_file", "from_config") and name != (
            "torch.nn.Embedding.from_pretrained") and told.get("local_files_only") != "True":
        return [f"calls {name} without local_files_only=True"]
    if last == "import_module" or name == "getattr" and len(call.args) > 1 and (
            ast.unparse(call.args[1]).strip("'\"") in ("eval", "exec", "system", "loads")):
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
        assert re.search(rf"^\s*(import|from) {module}\b", text, re.MULTILINE), (path, module)


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
])
def test_planted_python_is_found(text):
    assert python_faults("quant/planted.py", text)


@pytest.mark.parametrize("text", [
    "model.eval()", "torch.compile(f)", "re.compile('x')", "torch.load(p, weights_only=True)",
    "np.load(p, mmap_mode='r')", "x.from_pretrained(p, local_files_only=True)", "pattern.exec(x)",
    "import json, os", "from .safe_file import read_header",
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
