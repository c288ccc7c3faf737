"""Make the console blocks of docs/cost.md anew: what their commands print now.

    python -m scripts.fill_console

Of a command's output a block keeps the lines that begin with the same word as one that it shows.
"""

import contextlib
import io
import re
import shlex
from pathlib import Path

from mfd_fast import cli

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/cost.md"
BLOCK = re.compile(r"^```console\n\$ (.*?)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def filled(text: str) -> str:
    """The page with every block made anew; ``ValueError`` if a command fails."""
    return BLOCK.sub(lambda match: _block(match[1], match[2]), text)


def _block(command: str, shown: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = cli.main(shlex.split(command)[1:])
    if status:
        raise ValueError(f"{command!r} ended with status {status}")
    wanted = {line.split(" ")[0] for line in shown.splitlines()}
    lines = [line for line in printed.getvalue().splitlines() if line.split(" ")[0] in wanted]
    return "\n".join([f"```console\n$ {command}", *lines, "```"])


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
