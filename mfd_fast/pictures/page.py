"""HTML pages of one file, from ``page.html``: no server, script or network."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from mfd_fast.files.whole import write_text


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
    """A result table as the terminal shows it; its numbers stay as they are."""
    text, _, note = markdown.partition("\n\n")
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
    )
    lines = [f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>"]
    for name, *numbers in rows:
        cells = "".join(f'<td class="n">{escape(number)}</td>' for number in numbers)
        lines.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    below = f"<p class='note'>{escape(note)}</p>" if note else ""
    return f'<div class="wide"><table>{"".join(lines)}</table></div>{below}'


def _cell(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f'<td class="n">{value if isinstance(value, int) else f"{value:.4g}"}</td>'
    return f"<td>{escape('-' if value is None else str(value))}</td>"


def figure(path: Path) -> str:
    """A PNG file in the page, with its name below."""
    data, name = base64.b64encode(path.read_bytes()).decode(), escape(path.name)
    return (
        f'<figure><img alt="{name}" src="data:image/png;base64,{data}">'
        f"<figcaption>{name}</figcaption></figure>"
    )
