"""The nodes' texts in every language: complete, in step with the schemas, and nothing lost."""

import re
from types import SimpleNamespace

import pytest

from quanttune.devtools import locales
from quanttune.devtools.locale_checks import code_words, guide, problems, tables
from quanttune.tests.harness.inprocess import pack_nodes

UPDATE = "run `python dev.py python -m quanttune.devtools.locales` and translate what it names"


@pytest.fixture(scope="module")
def schemas(comfy_inprocess):
    return [node.GET_SCHEMA() for node in pack_nodes().values()]


def test_english_is_that_of_the_schemas(schemas):
    new, old = locales.flat(locales.english(schemas, locales.drawn_words())), locales.read("en")
    changed = sorted(".".join(path) for path in {*new, *old} if new.get(path) != old.get(path))
    assert not changed, f"{UPDATE}: {changed[:5]}"


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_every_text_is_translated(schemas, language):
    there = locales.read(language)
    lacking = [
        ".".join(p)
        for p in locales.flat(locales.english(schemas, locales.drawn_words()))
        if p not in there
    ]
    assert not lacking, f"{UPDATE}: {language} lacks {lacking[:5]}"


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_nothing_is_lost_in_translation(schemas, language):
    found = problems(language, locales.read("en"), locales.read(language), schemas)
    assert not found, "\n".join(found[:20])


def test_the_host_reads_what_is_there(comfy_inprocess, tmp_path, monkeypatch):
    """Every folder is a language, and the host gives the frontend its texts as they are written."""
    import folder_paths
    from app.custom_node_manager import CustomNodeManager

    assert {p.name for p in locales.FOLDER.iterdir()} == {"en", *locales.LANGUAGES}
    (tmp_path / "quanttune").mkdir()
    (tmp_path / "quanttune" / "locales").symlink_to(locales.FOLDER)
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda kind: [str(tmp_path)])
    sent = CustomNodeManager().build_translations()
    for language in ("en", *locales.LANGUAGES):
        texts = dict(sent[language])
        nodes = texts.pop("nodeDefs")
        assert locales.flat({"nodeDefs": nodes, "main": texts}) == locales.read(language)


def test_english_is_what_the_frontend_can_look_up_and_read():
    """Dots of keys would be steps into the tree; these signs mean something in its messages."""
    for path, text in locales.read("en").items():
        if path[1] == "quanttune":  # looked up by web/js/words.js
            continue
        assert not any("." in key for key in path), path
        assert not set(text) & set("{}@|"), f"{'.'.join(path)}: {text}"


def test_the_guide_has_a_word_for_each_language():
    glossary, host = guide()
    assert len(glossary) > 20 and len(host) > 5
    for row in [*glossary, *host]:
        assert all(row[language] for language in locales.LANGUAGES), row
    assert len({row["English"] for row in glossary}) == len(glossary)


# A pack of two nodes, its texts in English and, rightly, in another language.
SCHEMAS = [
    SimpleNamespace(
        node_id="Cut",
        inputs=[SimpleNamespace(id="way", options=["all", "a b"]), SimpleNamespace(id="max_side")],
    )
]
ENGLISH = {
    ("nodeDefs", "Cut", "display_name"): "Cut Layers",
    ("nodeDefs", "Cut", "description"): "Cuts layers of a UNet, see 'Sew Layers' and eq. 5-6.",
    ("nodeDefs", "Cut", "inputs", "way", "name"): "way",
    ("nodeDefs", "Cut", "inputs", "way", "tooltip"): "'a b' halves max_side; needs models/x.pth.",
    ("nodeDefs", "Cut", "inputs", "max_side", "name"): "max_side",
    ("nodeDefs", "Cut", "inputs", "max_side", "tooltip"): "With way = all: 512 for SD1.5.",
    ("nodeDefs", "Sew", "display_name"): "Sew Layers",
    ("main", "nodeCategories", "QuantTune"): "QuantTune",
    ("main", "quanttune", "step {a} of {b}"): "step {a} of {b}",
}
CHINESE = dict(
    zip(
        ENGLISH,
        [
            "切割层",
            "切割 UNet 的层，参见“缝合层”和公式 5-6。",
            "方式",
            "“a b”将最大边长减半；需要 models/x.pth。",
            "最大边长",
            "“方式”为 all 时：SD1.5 用 512。",
            "缝合层",
            "QuantTune",
            "第 {a} 步，共 {b} 步",
        ],
    )
)
WAY = ("nodeDefs", "Cut", "inputs", "way", "tooltip")
SIDE = ("nodeDefs", "Cut", "inputs", "max_side", "tooltip")
ABOUT = ("nodeDefs", "Cut", "description")
STEP = ("main", "quanttune", "step {a} of {b}")
TITLE = ("nodeDefs", "Cut", "display_name")


def test_a_right_translation_passes():
    assert problems("zh", ENGLISH, CHINESE, SCHEMAS) == []
    in_figures = {**CHINESE, ABOUT: "切割 1 个 UNet 的层，参见“缝合层”和公式 5-6。"}
    assert problems("zh", ENGLISH, in_figures, SCHEMAS) == []


@pytest.mark.parametrize(
    "path, text, complaint",
    [
        (TITLE, "Cut Layers", "still English"),
        (TITLE, "", "empty"),
        (TITLE, " 切割层", "space"),
        (TITLE, "切割层@", "instruction"),
        (TITLE, "切割{层}", "instruction"),
        (STEP, "第 {a} 步", "places to fill"),
        (STEP, "第 {a} 步，共 {c} 步", "places to fill"),
        (STEP, "第 {a} 步，共 {b 步", "places to fill"),
        (ABOUT, "Cut UNet: 5-6.", "not in its language"),
        (ABOUT, "レイヤー UNet 层，“缝合层”和公式 5-6。", "Japanese"),
        (ABOUT, "切割 UNet 的层，参见“缝合层”和公式 5-6", "end"),
        (ABOUT, "切割 UNet 的层，参见“缝合层”和公式 5。", "numbers"),
        (ABOUT, "切割 UNet 的层，参见“缝合层”和公式 5-6-6。", "numbers"),
        (ABOUT, "切割 2 个 UNet 的层，参见“缝合层”和公式 5-6。", "numbers"),
        (ABOUT, "切割模型的层，参见“缝合层”和公式 5-6。", "UNet as it is"),
        (ABOUT, "切割 UNet 的层，参见“拼接层”和公式 5-6。", "say 缝合层"),
        (ABOUT, "切割 UNet 的层，参见'缝合层'和公式 5-6。", "quotation marks"),
        (ABOUT, "切割 UNet 的*层*，参见“缝合层”和公式 5-6。", "as many"),
        (ABOUT, "切割 UNet，参见缝合和公式 5-6。", "call layer"),
        (WAY, "“全部”将最大边长减半；需要 models/x.pth。", "say a b"),
        (WAY, "“a b”将边长减半；需要 models/x.pth。", "say 最大边长"),
        (WAY, "“a b”将最大边长减半；需要 models/y.pth。", "models/x.pth as it is"),
        (WAY, "“a b”将“最长边”减半（最大边长）；需要 models/x.pth。", "quotes 最长边"),
        (SIDE, "“方式”为全部时：SD1.5 用 512。", "say all"),
        (SIDE, "为 all 时：SD1.5 用 512。", "say 方式"),
        (SIDE, "“方式”为 all 时：SD1.5 用 512 像素，噪波。", "says 噪波"),
    ],
)
def test_a_wrong_translation_is_told(path, text, complaint):
    found = problems("zh", ENGLISH, {**CHINESE, path: text}, SCHEMAS)
    assert any(".".join(path) in line and complaint in line for line in found), found


def test_a_text_of_no_node_is_told():
    found = problems(
        "zh", ENGLISH, {**CHINESE, ("nodeDefs", "Old", "description"): "旧。"}, SCHEMAS
    )
    assert found == ["zh has nodeDefs.Old.description, which nothing reads"]


def test_words_that_no_language_changes():
    text = (
        "TuneQDM's models/unet (.pth, tuneqdm_state.pt) on a 4-bit SD1.5 UNet, LoRAs and fp16, "
        "99.9 % of it, well-known."
    )
    assert set(code_words(text)) == {
        "TuneQDM",
        "models/unet",
        ".pth",
        "tuneqdm_state.pt",
        "SD1.5",
        "UNet",
        "LoRA",
        "fp16",
    }


def test_words_of_scripts_are_collected(tmp_path):
    (tmp_path / "a.js").write_text('label(word("loss"), word(\n"a \\"b\\" {c}", {c})); sword("x")')
    (tmp_path / "b.js").write_text('export function word(english) {} word("loss"); word(variable)')
    assert locales.drawn_words(tmp_path) == ['a "b" {c}', "loss"]


def test_tables_of_a_page():
    page = "# A\n\n| x | y |\n|---|---|\n| 1 | |\n\ntext | with a bar\n## B\n| z |\n|:-:|\n| 2 |\n"
    assert tables(page) == {"A": [{"x": "1", "y": ""}], "B": [{"z": "2"}]}


def test_a_translation_of_changed_english_is_taken_out_and_told(tmp_path):
    """And a text that is translated elsewhere comes with its translation."""

    def schema(**tooltips):
        inputs = [SimpleNamespace(id=i, display_name=None, tooltip=t) for i, t in tooltips.items()]
        return SimpleNamespace(
            node_id="Cut",
            display_name="Cut",
            description="Cuts.",
            inputs=inputs,
            outputs=[],
            category="QuantTune/x",
        )

    first = locales.update([schema(a="Is one.", b="Is two.")], tmp_path)
    assert len(first) == 8 * len(locales.LANGUAGES)  # title, description, 2 inputs, 2 categories
    texts = {path: f"{text}译" for path, text in locales.read("en", tmp_path).items()}
    locales.write("zh", texts, tmp_path)
    assert not [
        line
        for line in locales.update([schema(a="Is one.", b="Is two.")], tmp_path)
        if line.startswith("zh")
    ]
    told = [
        line
        for line in locales.update([schema(a="Is three.", b="Is two.", c="Is two.")], tmp_path)
        if line.startswith("zh")
    ]
    assert told == [
        "zh lacks nodeDefs.Cut.inputs.a.tooltip: 'Is three.' (was: 'Is one.译' for 'Is one.')",
        "zh lacks nodeDefs.Cut.inputs.c.name: 'c'",
    ]
    now = locales.read("zh", tmp_path)
    assert now["nodeDefs", "Cut", "inputs", "c", "tooltip"] == "Is two.译"
    assert ("nodeDefs", "Cut", "inputs", "a", "tooltip") not in now
    assert re.search(r"译", (tmp_path / "zh" / "nodeDefs.json").read_text("utf-8"))
