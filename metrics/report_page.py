"""A report as one HTML page: light and dark, for wide screens and phones, without scripts."""

from __future__ import annotations

import html
from base64 import b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .markdown import blocks, inline_html, one_line, to_html

if TYPE_CHECKING:
    from .report import Picture, Report, Section

SMALL = 560
"""Pictures up to this width stand beside each other."""
KINDS = {"csv": "text/csv", "json": "application/json"}

STYLE = """
:root { color-scheme: light dark;
  --paper: #f6f7f9; --card: #ffffff; --ink: #22252b; --soft: #5d6470; --line: #e1e4ea;
  --accent: #2b5fb4; --band: #f3f6fb; --code: #eef1f6; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15171b; --card: #1e2127; --ink: #e4e7ec; --soft: #9aa3b2; --line: #343943;
  --accent: #8db4f5; --band: #242831; --code: #2a2f39; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
header { padding: 0 .25rem; }
h1 { font-size: clamp(1.5rem, 4vw + .6rem, 2.3rem); line-height: 1.2; margin: 0 0 .4rem;
  letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .8rem; overflow-wrap: anywhere; }
h3, h4, h5, h6 { font-size: 1.02rem; margin: 1.6rem 0 .5rem; }
p { margin: .7rem 0; overflow-wrap: anywhere; }
.facts { color: var(--soft); font-size: .88rem; margin: 0 0 1rem; }
nav { display: flex; flex-wrap: wrap; gap: .4rem; margin: 1rem 0 0; }
nav a { padding: .2rem .7rem; border: 1px solid var(--line); border-radius: 99px; color: inherit;
  background: var(--card); font-size: .88rem; text-decoration: none; }
nav a:hover, nav a:focus-visible { border-color: var(--accent); color: var(--accent); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1.4rem clamp(.9rem, 3vw, 1.8rem); margin: 1.2rem 0; scroll-margin-top: 1rem; }
section > :last-child { margin-bottom: 0; }
ul, ol { padding-left: 1.3rem; margin: .7rem 0; }
li { margin: .35rem 0; overflow-wrap: anywhere; }
a { color: var(--accent); }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .7rem; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: .84rem; white-space: nowrap;
  vertical-align: bottom; }
tbody tr:nth-child(even) { background: var(--band); }
tbody tr:last-child td { border-bottom: 0; }
.n { text-align: right; white-space: nowrap; }
pre, code { font-family: ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace;
  background: var(--code); border-radius: 6px; }
code { padding: .1em .35em; font-size: .9em; overflow-wrap: anywhere; }
pre { padding: .8rem 1rem; overflow-x: auto; font-size: .84rem; line-height: 1.45; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.2rem 0 0; }
figure { margin: 0; flex: 1 1 100%; min-width: 0; overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; border-radius: 8px;
  background: #fff; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .4rem; text-align: center;
  position: sticky; left: 0; }
figure:not(.small) img { min-width: 34rem; }
figure.small { flex: 0 1 auto; }
figure.small img { margin: 0; }
figure.small figcaption { text-align: left; }
.files { display: flex; flex-wrap: wrap; gap: .6rem; list-style: none; padding: 0; }
@media print { section { break-inside: avoid-page; border: 0; } nav { display: none; } }
"""

# Should text ever get out of its quotes: no script runs and nothing is fetched.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(report: Report, files: Sequence[tuple[str, bytes]]) -> str:
    """The page of a report; ``files`` are name and content of what can be taken from it."""
    title = html.escape(one_line(report.title))
    parts = [
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>", f"<style>{STYLE}</style>", "</head>", "<body>", "<main>",
        "<header>", f"<h1>{title}</h1>"]
    if report.facts:
        parts.append(f'<p class="facts">{inline_html(one_line(report.facts))}</p>')
    if report.note.strip():
        parts.append(to_html(blocks(report.note), 1))
    named = [(i, s) for i, s in enumerate(report.sections, 1) if s.heading]
    if len(named) > 1:
        links = "\n".join(f'<a href="#part-{i}">{html.escape(one_line(s.heading))}</a>'
                          for i, s in named)
        parts.append(f'<nav aria-label="Parts">\n{links}\n</nav>')
    parts.append("</header>")
    parts += [_section(section, i) for i, section in enumerate(report.sections, 1)]
    if files:
        parts.append('<section id="files">\n<h2>Files</h2>\n<ul class="files">\n'
                     + "\n".join(_file(*f) for f in files) + "\n</ul>\n</section>")
    return "\n".join([*parts, "</main>", "</body>", "</html>"]) + "\n"


def _section(section: Section, number: int) -> str:
    parts = [f'<section id="part-{number}">']
    if section.heading:
        parts.append(f"<h2>{html.escape(one_line(section.heading))}</h2>")
    if section.text.strip():
        parts.append(to_html(blocks(section.text)))
    if section.pictures:
        figures = (_figure(picture, section.heading) for picture in section.pictures)
        parts += ['<div class="pictures">', *figures, "</div>"]
    return "\n".join([*parts, "</section>"])


def _figure(picture: Picture, heading: str) -> str:
    width, height = picture.image.size
    caption = html.escape(one_line(picture.caption))
    small = ' class="small"' if width <= SMALL else ""
    # What the heading says already need not be seen twice.
    told = f"<figcaption>{caption}</figcaption>" if picture.caption not in ("", heading) else ""
    return (f'<figure{small}><img src="data:image/png;base64,{b64encode(picture.png()).decode()}" '
            f'width="{width}" height="{height}" alt="{caption}">{told}</figure>')


def _file(name: str, content: bytes) -> str:
    kind = KINDS.get(name.rpartition(".")[2], "text/plain")
    return (f'<li><a download="{html.escape(name)}" href="data:{kind};base64,'
            f'{b64encode(content).decode()}">{html.escape(name)}</a> '
            f"({max(1, round(len(content) / 1024)):,} KiB)</li>")
