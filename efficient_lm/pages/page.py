"""A page: its head, its sections, and what keeps it to itself."""

import base64
import hashlib
import html
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from efficient_lm.pages.palette import style_sheet

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("scales.js", "marks.js", "charts.js", "tables.js")


def escaped(text: object) -> str:
    """Text that may stand between tags and in quoted attributes, whatever it holds."""
    return html.escape(str(text), quote=True)


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page with a heading; `name` is its anchor. Parts are HTML."""
    inner = "\n".join(filter(None, parts))
    return f'<section id="{escaped(name)}">\n<h2>{escaped(title)}</h2>\n{inner}\n</section>'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text; its kind is `note`, or nothing."""
    return f'<p class="{escaped(kind)}">{escaped(text)}</p>' if kind else f"<p>{escaped(text)}</p>"


def heading_of(title: str) -> str:
    """Of a part of a section."""
    return f"<h3>{escaped(title)}</h3>"


def contents(sections: Sequence[tuple[str, str]]) -> str:
    """Links to sections, by name and title."""
    links = "".join(f'<li><a href="#{escaped(name)}">{escaped(title)}</a></li>' for name, title in sections)
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>'


def tiles(facts: Sequence[tuple[str, str, str]]) -> str:
    """Figures at a glance: what, how much, and a note."""
    shown = "".join(
        f"<div><dt>{escaped(what)}</dt><dd>{escaped(value)}<small>{escaped(note)}</small></dd></div>"
        for what, value, note in facts
    )
    return f'<dl class="tiles">{shown}</dl>'


def page(title: str, *parts: str) -> str:
    """A whole page. Its policy lets nothing run but its own script, and nothing be fetched."""
    style, script = _style(), _script()
    policy = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'"
    inner = "\n".join(filter(None, parts))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(title)}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{escaped(title)}</h1>
<noscript><p class="note">Charts are drawn by a script, which is switched off here; the tables are complete without it,
and pictures lie beside this page.</p></noscript>
{inner}
</main>
<script>{script}</script>
</body>
</html>
"""


@cache
def _style() -> str:
    return style_sheet() + (ASSETS / "page.css").read_text()


@cache
def _script() -> str:
    return "\n".join(["(() => {", '"use strict";', *((ASSETS / name).read_text() for name in SCRIPTS), "})();"])


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
