"""pyproject.toml: in step with the requirement files and the folders, whole for the registry.

And what is released with it: the archive installs and runs, the citation is whole.
"""

import asyncio
import json
import posixpath
import re
import shutil
import sys
import urllib.parse
import zipfile
from pathlib import Path

import pytest

from quanttune.devtools import archive, host_process
from quanttune.devtools.console import Stop
from quanttune.tests.harness.server import ComfyServer, check_pictures, host_environment

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PUBLIC = re.compile(
    re.escape(PROJECT["project"]["urls"]["Repository"]) + r"/(?:blob|tree)/main/(.+)"
)
LINK = re.compile(r"\]\(<?([^)>\s]+)>?\)|\b(?:src|href)=\"([^\"]+)\"")
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
    # docs.comfy.org/registry/specifications: letters, digits and single separators, no "ComfyUI".
    assert re.fullmatch(r"[a-z][a-z0-9]*([-_.][a-z0-9]+)*", project["name"])
    assert len(project["name"]) < 100 and "comfyui" not in project["name"]
    assert f"comfy node install {project['name']}" in (ROOT / "README.md").read_text("utf-8")
    for key in ("description", "urls", "readme", "license"):
        assert project[key]
    assert project["urls"]["Repository"].startswith("https://github.com/")
    assert (ROOT / "LICENSE").read_text("utf-8").lstrip().startswith("Apache License")
    icon = urllib.parse.urlsplit(comfy["Icon"]).path.split("/main/", 1)[1]
    assert (ROOT / icon).is_file(), "the icon is served from the repository"


def test_classifiers_are_those_the_registry_reads():
    """Systems and accelerators are told by these, and a mistyped one is ignored."""
    known = {
        "Operating System :: OS Independent", "Environment :: GPU :: NVIDIA CUDA",
        "Operating System :: Microsoft :: Windows", "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
    }  # fmt: skip
    told = {c for c in PROJECT["project"]["classifiers"] if c.startswith(("Operating", "Environ"))}
    assert told and told <= known


def test_the_pack_offers_an_entry_point_and_nothing_that_switches_it_off():
    import quanttune

    assert not hasattr(quanttune, "NODE_CLASS_MAPPINGS")
    assert (ROOT / quanttune.WEB_DIRECTORY).resolve().is_relative_to(ROOT)
    assert asyncio.iscoroutinefunction(quanttune.comfy_entrypoint)


def test_the_checkout_does_not_hide_the_hosts_modules():
    assert ROOT not in [Path(entry).resolve() for entry in sys.path]


def test_the_changelog_begins_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    versions = re.findall(r"(?m)^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", text)
    assert versions and versions[0] == PROJECT["project"]["version"] == archive.version(ROOT)


def test_the_model_card_is_whole_and_its_sizes_are_true():
    text = (ROOT / "starter" / "README.md").read_text("utf-8")
    headings = set(re.findall(r"(?m)^## (.+)$", text))
    assert headings >= {
        "How to write a prompt", "What is in the files", "How it obeys", "How it was made",
        "The small upscaler", "What it is for", "Limits", "Licence",
    }  # fmt: skip
    told = re.findall(r"(?m)^\| `([\w/.-]+\.safetensors)`[^\n]*?\| ([\d.]+) MB(?: each)? \|$", text)
    sizes = {name: (ROOT / "starter" / name).stat().st_size / 1e6 for name, _ in told}
    assert {name: round(size, 2) for name, size in sizes.items()} == {
        name: float(size) for name, size in told
    }
    assert {name.split("/")[0] for name in sizes} >= {"unet.safetensors", "upscale", "quanttune"}


@pytest.fixture(scope="module")
def citation():
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))


class TestCitation:
    """CITATION.cff, by the parts of the Citation File Format 1.2.0 that are used."""

    def test_what_the_format_requires_is_there(self, citation):
        assert citation["cff-version"] == "1.2.0"
        for entry in [citation, *citation["references"]]:
            assert entry["title"] and entry["authors"]
            for author in entry["authors"]:
                assert set(author) in ({"name"}, {"family-names"}, {"family-names", "given-names"})
        assert citation["message"] and citation["type"] == "software"
        assert citation["version"] == PROJECT["project"]["version"]
        assert citation["license"] == PROJECT["project"]["license"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", str(citation["date-released"]))

    def test_the_three_papers_are_named(self, citation):
        told = [json.dumps(entry, default=str) for entry in citation["references"]]
        for paper in ("TuneQDM", "Diffusia", "Singh"):
            assert any(paper in entry for entry in told), paper
        for entry in citation["references"]:
            assert entry["type"] in ("article", "conference-paper", "unpublished", "generic")


def anchors(page):
    """What a `#` in a link can name on a Markdown page, as GitHub calls its headings."""
    page = re.sub(r"(?ms)^```.*?^```", "", page)
    headings = (re.sub(r"[^\w\- ]", "", h.lower()) for h in re.findall(r"(?m)^#+ (.+)$", page))
    return {heading.strip().replace(" ", "-") for heading in headings}


def lost_links(name, page, packed, tracked):
    """Links of a Markdown page in the archive that lead nowhere, as they are written.

    A relative one has to be in the archive, the address of a file in the repository to be tracked.
    `packed` and `tracked` are paths; a page that a `#` leads into is read from the checkout.
    """
    lost = []
    for link in ("".join(found) for found in LINK.findall(re.sub(r"(?ms)^```.*?^```", "", page))):
        public = PUBLIC.fullmatch(link)
        if re.match(r"[a-z]+:", link) and not public:
            continue
        path, _, anchor = (public[1] if public else link).partition("#")
        if not public:
            path = posixpath.join(posixpath.dirname(name), path) if path else name
        path = posixpath.normpath(path)
        there = any(f == path or f.startswith(f"{path}/") for f in (tracked if public else packed))
        if there and anchor and path.endswith(".md"):
            text = page if path == name else (ROOT / path).read_text("utf-8")
            there = anchor in anchors(text)
        if not there:
            lost.append(link)
    return lost


class TestArchive:
    @pytest.mark.parametrize("name, out", [
        ("tests/a.py", True), ("a/tests/b.py", True), ("test.py", False), ("x/y.bin", True),
        ("docs/big/a.png", True), ("other/big/a.png", False), ("here.txt", True),
        ("sub/here.txt", False), ("tests", False), ("bench.json", False),
    ])  # fmt: skip
    def test_comfyignore_reads_as_git_does(self, name, out):
        patterns = ["# a comment", "", "tests/", "*.bin", "docs/big/", "/here.txt"]
        assert archive.ignored(name, patterns) == out
        with pytest.raises(Stop, match="takes back"):
            archive.ignored(name + "x", ["!keep"])

    def test_the_same_files_give_the_same_bytes(self, tmp_path):
        one, two = (archive.build(tmp_path / name).read_bytes() for name in ("a.zip", "b.zip"))
        assert one == two and not list(tmp_path.glob("*.part"))

    def test_it_holds_the_pack_and_not_the_workshop(self):
        names = set(archive.files())
        tops = {name.split("/")[0] for name in names}
        assert not tops & {"tests", "benchmarks", ".github", ".ci", "devtools", "dev.py"}
        for folder in (*PROJECT["tool"]["comfy"]["includes"], "nodes", "host", "quant"):
            mine = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*")
                    if p.is_file() and "__pycache__" not in p.parts}  # fmt: skip
            missing = {name for name in mine & set(archive.tracked(ROOT)) if name not in names}
            assert not missing, f"{folder} is not whole: {sorted(missing)[:5]}"
        assert {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE"} <= names

    def test_every_link_of_its_pages_leads_somewhere(self):
        packed, tracked = archive.files(), archive.tracked(ROOT)
        pages = [name for name in packed if name.endswith(".md")]
        found = {n: lost_links(n, (ROOT / n).read_text("utf-8"), packed, tracked) for n in pages}
        assert {"README.md", "docs/int8.md", "starter/README.md"} <= set(pages)
        assert {name: links for name, links in found.items() if links} == {}

    @pytest.mark.parametrize("link, lost", [
        ("int8.md", False), ("../README.md#install-into-your-comfyui", False), ("#here", False),
        ("images", False), ("https://example.com/x", False), ("int8", True), ("#there", True),
        ("../README.md#nowhere", True), ("../benchmarks/results/README.md", True),
        ("../../elsewhere.md", True), ("{home}/blob/main/dev.py", False),
        ("{home}/tree/main/benchmarks/results", False), ("{home}/blob/main/no.py", True),
        ("{home}/blob/main/benchmarks/results/README.md#sizes", False),
        ("{home}/blob/main/benchmarks/results/README.md#sizzes", True),
    ])  # fmt: skip
    def test_a_link_that_leads_nowhere_is_noticed(self, link, lost):
        link = link.format(home=PROJECT["project"]["urls"]["Repository"])
        for page in (f"# Here\n[a]({link})", f'# Here\n<img src="{link}">'):
            packed = ["docs/a.md", *archive.files()]
            found = lost_links("docs/a.md", page, packed, archive.tracked(ROOT))
            assert found == ([link] if lost else [])

    def test_outside_of_git_it_says_so(self, tmp_path):
        with pytest.raises(Stop, match="not a git checkout"):
            archive.build(tmp_path / "a.zip", tmp_path)
        assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A ComfyUI in whose `custom_nodes` the archive was unpacked, and nothing else is."""
    base = tmp_path_factory.mktemp("installed")
    pack = base / "custom_nodes" / host_process.PACK_NAME
    with zipfile.ZipFile(archive.build(base / "pack.zip")) as zipped:
        zipped.extractall(pack)
    with pytest.MonkeyPatch.context() as patch:
        # The server must not put a link to this checkout there, nor find it as `quanttune`.
        patch.setattr(host_process, "link_folder", lambda link, target: None)
        server = ComfyServer(host_environment(), base)
    try:
        server.wait(timeout=300)
        yield server
    finally:
        server.stop()
        shutil.rmtree(base, ignore_errors=True)


@pytest.mark.server
class TestInstalledArchive:
    def test_every_node_is_there(self, installed):
        assert not installed.failed_imports(), installed.log_text()[-3000:]
        known = json.loads((ROOT / "tests/nodes/schemas.json").read_text("utf-8"))
        info = installed.client.object_info()
        assert {name for name in info if name.startswith("QuantTune")} == set(known)
        assert info["QuantTuneLoadStarterModel"]["python_module"].endswith(host_process.PACK_NAME)

    def test_what_the_frontend_asks_for_is_served(self, installed):
        pack = installed.folder / "custom_nodes" / host_process.PACK_NAME
        client = installed.client
        at = f"/extensions/{host_process.PACK_NAME}"
        for page in sorted((pack / "web").rglob("*.*")):
            path = f"{at}/{page.relative_to(pack / 'web').as_posix()}"
            assert client.request(path) == page.read_bytes()
        scripts = {f"{at}/{p.relative_to(pack / 'web').as_posix()}"
                   for p in (pack / "web").rglob("*.js")}  # fmt: skip
        assert scripts <= set(client.get("/extensions"))
        templates = client.get("/workflow_templates")[host_process.PACK_NAME]
        files = sorted((pack / "workflows").glob("*.json"))
        assert sorted(templates) == [file.stem for file in files] and files
        for file in [*files, *(f.with_suffix(".jpg") for f in files)]:
            path = f"/api/workflow_templates/{host_process.PACK_NAME}/{file.name}"
            assert client.request(path) == file.read_bytes()
        languages = client.get("/i18n")
        for folder in sorted((pack / "locales").glob("*")):
            assert folder.name in languages, f"the host does not serve {folder.name}"

    def test_the_starter_makes_a_picture(self, installed):
        from quanttune.tests.host.test_server import graph

        loader = {"class_type": "QuantTuneLoadQuantizedUNet",
                  "inputs": {"unet_name": "starter-4bit.safetensors"}}  # fmt: skip
        history, _ = installed.queue(graph(["load", 0]) | {"load": loader})
        check_pictures(installed.pictures(history), ["image"])
