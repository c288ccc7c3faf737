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
    return f"<table>{''.join(lines)}</table>"


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
