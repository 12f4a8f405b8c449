"""The Markdown of reports: read into blocks, and written so that no text becomes markup."""

import pytest

from quanttune.metrics.markdown import blocks, numeric, printable, table, to_html, to_markdown

TEXT = """Verdict, in words.
Second line.

| model | s a step | note |
|---|---|---|
| a\\|b | 0.25 | <b>fast</b> |
| `in_0` | 1,200 |
# Layers
- first_last
- **two**
1. one
2) two

layer    mean %  max %
conv_in    1.2    3.4
"""


def test_blocks_of_a_text():
    found = blocks(TEXT)
    assert [b.kind for b in found] == ["paragraph", "table", "heading", "list", "numbered", "table"]
    assert found[0].lines == ("Verdict, in words.", "Second line.")
    assert found[1].rows == (("model", "s a step", "note"), ("a|b", "0.25", "<b>fast</b>"),
                             ("`in_0`", "1,200", ""))
    assert found[3].lines == ("first_last", "**two**") and found[4].lines == ("one", "two")
    assert found[5].rows == (("layer", "mean %", "max %"), ("conv_in", "1.2", "3.4"))


def test_what_blanks_align():
    text = "image   SSIM\nmean    0.9\n1       -\nLPIPS was not measured."
    table_, rest = blocks(text)
    assert table_.rows == (("image", "SSIM"), ("mean", "0.9"), ("1", "-"))
    assert numeric(table_.rows, 1) and rest.lines == ("LPIPS was not measured.",)
    ragged, = blocks("a    b\na    b    c\n  d    e")
    assert ragged.kind == "code" and ragged.lines == ("a    b", "a    b    c", "  d    e")
    assert blocks("One  blank too many.\nNot here.")[0].kind == "paragraph"


def test_html_of_a_text():
    html = to_html(blocks(TEXT))
    assert "Verdict, in words.<br>" in html and "&lt;b&gt;fast&lt;/b&gt;" in html
    assert "<code>in_0</code>" in html and "<li><strong>two</strong></li>" in html
    assert '<td class="n">1,200</td>' in html and "<h3>Layers</h3>" in html
    assert html.count("<td") == 9 and html.count("<th") - html.count("<thead") == 6


def test_markdown_reads_back_as_the_same():
    found = blocks(TEXT)
    again = blocks(to_markdown(found, 0).replace("  \n", "\n").replace("\\`", "`")
                   .replace("&lt;", "<").replace("&gt;", ">"))
    assert [b.kind for b in again] == [b.kind for b in found]
    assert again[1].rows == found[1].rows and again[-1] == found[-1]


def test_a_table_takes_any_cell():
    rows = [("a|b", "two\nlines"), ("\\", "")]
    found, = blocks(table(["x", "y"], rows[:1]))
    assert found.rows == (("x", "y"), ("a|b", "two lines"))


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "`<i>`", "**<i>**", "&lt;script&gt;",
                                  "# <h1>", "- <li>", "|<a>|\n|---|\n|<b>|", "```\n<pre>\n```"])
def test_no_text_becomes_html(text):
    html = to_html(blocks(text))
    for tag in ("<script", "<i>", "<h1", "<a>", "<b>", "<li><li>", "<pre>\n<pre>"):
        assert tag not in html
    assert "&lt;" in html or text.startswith("&")
    if text.startswith("&"):
        assert "&amp;lt;script" in html, "what was written is what is seen"


@pytest.mark.parametrize("text,kept", [
    ("<img src=x>", "&lt;img src=x&gt;"), ("[a](javascript:x)", "\\[a\\](javascript:x)"),
    ("*star* _under_ in_layers_0", "\\*star\\* \\_under\\_ in_layers_0"), ("a & b", "a &amp; b"),
    ("> quoted", "&gt; quoted"), ("+ plus", "\\+ plus"), ("`code_<x>`", "`code_<x>`"),
    ("===", "\\==="), ("plan 4.2 | x", "plan 4.2 | x"),
    ("4.5 %", "4.5 %"), ("-0.5", "\\-0.5"), ("~~~", "\\~\\~\\~"),
    ("~~b~~", "\\~\\~b\\~\\~"), ("$x$", "\\$x\\$")])
def test_no_text_becomes_markdown(text, kept):
    assert to_markdown(blocks(text)) == kept


def test_a_fence_is_longer_than_those_inside():
    code = blocks("```\n````\n```")[0]
    assert to_markdown([code]).startswith("`````\n````\n`````")


def test_code_that_begins_a_line_is_no_fence():
    found = blocks("```x``` is code\nand this is not")
    assert [b.kind for b in found] == ["paragraph"] and "and this is not" in to_html(found)


def test_a_long_cell_is_read_in_no_time():
    """A pattern that tries all divisions of the digits would take minutes."""
    assert not numeric((("a",), ("1" * 100_000 + "y",)), 0)


def test_columns_of_numbers():
    rows = (("a", "b", "c", "d"), ("1", "float", "12 %", ""), ("2,000.5", "3", "-1e-3", ""))
    assert [numeric(rows, i) for i in range(4)] == [True, False, True, False]


def test_what_no_file_can_hold_is_replaced():
    assert printable("a\x00b\ud800c\r\nd\te") == "a\ufffdb\ufffdc\nd\te"
    printable("\ud800").encode()


@pytest.mark.parametrize("text", ["", "\n\n", "|", "|---|", "|a|\n|---", "```", "#", "-", "1.",
                                  "| a |\n| - |\n|", "||\n|-|"])
def test_odd_texts_are_read(text):
    to_html(blocks(text)), to_markdown(blocks(text))
