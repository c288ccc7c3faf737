"""HTML pages of one file, from ``page.html``: no server, script or network."""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from mfd_fast.files.whole import write_text

NUMBER = re.compile(r"-|-?[\d,.]+(e[+-]\d+)?|nan|-?inf")


def write_page(path: str | Path, title: str, parts: Iterable[str]) -> None:
    """The template with a title and parts of HTML one below the other."""
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    write_text(path, template.substitute(title=escape(title), body="\n".join(parts)))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, marked: int = 0) -> str:
    """Numbers to the right, None as ``-``; the first ``marked`` rows stand out."""
    lines = [f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>"]
    for number, row in enumerate(rows):
        mark = " class=differs" if number < marked else ""
        lines.append(f"<tr{mark}>{''.join(map(_cell, row))}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def table_of(markdown: str) -> str:
    """A result table as the terminal shows it, with what stands below it."""
    text, _, note = markdown.partition("\n\n")
    head, _, *rows = ([x.strip() for x in line.strip("|").split("|")] for line in text.splitlines())
    return table(head, rows) + (f"<p class='note'>{escape(note)}</p>" if note else "")


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
    kind = ' class="n"' if NUMBER.fullmatch(text) else ""
    return f"<td{kind}>{escape(text)}</td>"


def figure(path: Path) -> str:
    """A PNG file in the page, with its name below."""
    data, name = base64.b64encode(path.read_bytes()).decode(), escape(path.name)
    return (
        f'<figure><img alt="{name}" src="data:image/png;base64,{data}">'
        f"<figcaption>{name}</figcaption></figure>"
    )
