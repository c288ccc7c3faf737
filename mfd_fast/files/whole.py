"""The one way files are written at the end of something: complete, or not there at all.

Checkpoints are written while training goes on and carry checksums; they have ``checkpoint.commit``.
"""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

WRITING, REMOVING = ".writing-", ".removing-"


@contextmanager
def staged(folder: str | Path, what: str = "") -> Iterator[Path]:
    """A hidden folder to write in; what is in it appears in ``folder`` when the block is done.

    Everything is synced before the first name appears.  After an exception nothing of it is left.

    Args:
        folder: made if it is missing, and removed again if nothing appears in a new one.
        what: the name of what is written, for the error.

    ``OSError`` says in a sentence what could not be written, and why (a full disk).
    """
    folder = Path(folder)
    hidden = None
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=WRITING, dir=folder))
        yield hidden
        for path in hidden.rglob("*"):
            sync(path)
        for path in sorted(hidden.iterdir()):
            if path.is_dir():  # which replaces none that has files
                shutil.rmtree(folder / path.name, ignore_errors=True)
            path.replace(folder / path.name)
        sync(folder)
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number in (None, errno.ENOENT):  # something to be read is missing or broken
            raise
        raise OSError(
            f"{folder / what} could not be written: {os.strerror(number)}; nothing of it is left: "
            "make room or choose another place"
        ) from error
    finally:
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)
        for path in made:
            if path.exists() and not any(path.iterdir()):
                path.rmdir()


@contextmanager
def written(path: str | Path) -> Iterator[Path]:
    """A path of the same name to write a file or folder at; it becomes ``path`` at the end.

    ``OSError`` as :func:`staged`; a folder takes the place of none.
    """
    path = Path(path)
    with staged(path.parent, path.name) as hidden:
        yield hidden / path.name


def clean(folder: Path) -> None:
    """Remove what killed processes left half-written or half-removed; nobody may write there."""
    for path in folder.glob(".*"):
        if path.name.startswith((WRITING, REMOVING)):
            shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Make contents, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _errno(error: Exception) -> int | None:
    """The system's number of an error, also where a library has put it into words."""
    found = re.search(r"(?:Errno|os error) (\d+)", str(error))
    return getattr(error, "errno", None) or (int(found[1]) if found else None)


def write_text(path: str | Path, text: str) -> None:
    """A small file by :func:`written`."""
    with written(path) as partial:
        partial.write_text(text, encoding="utf-8")


def first_line(error: Exception) -> str:
    """The message of an error without what torch adds below it."""
    return str(error).strip().split("\n")[0]
