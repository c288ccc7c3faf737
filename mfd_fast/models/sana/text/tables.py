"""Prompts from tables and data sets, through Hugging Face ``datasets``: mapped, never held."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mfd_fast.models.sana.text.prompts import BadPromptError, checked_prompt, choose_key

KINDS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json"}
SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves
SPLIT = "train"


class Table:
    """A column of strings; the place of a prompt is its row.

    Args:
        path: a table, a folder of tables of one kind or one that save_to_disk wrote, or the id of a
            data set of the hub.
        column: the first of ``KEYS`` that is there if None.

    ``ValueError`` names the file that is broken or has no such column, ``ImportError`` the package.
    """

    def __init__(self, path: str | Path, column: str | None):
        try:
            import datasets  # noqa: F401
            from pyarrow import chunked_array
        except ImportError:
            raise ImportError(f"to read {path}, a table: pip install datasets") from None
        self.name = str(path)
        chunks = []
        for name, rows in _opened(Path(path)):
            with _naming(name):
                chunks += rows.data.column(_checked_column(name, rows, column)).chunks
        with _naming(self.name):
            self._rows = chunked_array(chunks)

    def records(self) -> Iterator[tuple[int, int, Any]]:
        return ((row, row + 1, self._rows[row]) for row in range(len(self._rows)))

    def record(self, place: int) -> Any:
        return self._rows[place]

    def prompt(self, record: Any) -> str | None:
        try:
            text = record.as_py()
        except UnicodeDecodeError as error:
            raise BadPromptError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
        return None if text is None else checked_prompt(text) or None


def _opened(path: Path) -> Iterator[tuple[str, Any]]:
    """Names and ``datasets.Dataset``s of what is at the path, in order."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    if not path.exists():
        with _naming(str(path), "check its name and the connection"):
            found = load_dataset(str(path), split=SPLIT)
        yield str(path), found
    elif any((path / name).is_file() for name in SAVED):
        with _naming(str(path)):
            found = load_from_disk(str(path))
        if isinstance(found, DatasetDict):
            if SPLIT not in found and len(found) != 1:
                raise ValueError(f"{path} has the splits {list(found)}; give the folder of one")
            found = found[SPLIT if SPLIT in found else next(iter(found))]
        yield str(path), found
    else:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [file for file in files if file.suffix in KINDS]
        if not files:
            raise ValueError(
                f"{path} holds neither tables ({', '.join(KINDS)}) nor a data set that datasets "
                "saved with save_to_disk; give the folder that does"
            )
        for file in files:
            with _naming(str(file)):
                found = load_dataset(KINDS[file.suffix], data_files=str(file), split=SPLIT)
            yield str(file), found


@contextmanager
def _naming(name: str, mend: str = "copy it again") -> Iterator[None]:
    """Whatever the libraries say about a broken file becomes a ``ValueError`` that names it."""
    try:
        yield
    except Exception as error:  # pyarrow, pandas and datasets have many kinds
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system: the disk is full
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{name} cannot be read as a table ({reason}); {mend}") from None


def _checked_column(name: str, rows: Any, column: str | None) -> str:
    """The column to read: one of strings."""
    try:
        column = choose_key(rows.column_names, column)
    except BadPromptError as reason:
        raise ValueError(f"{name}: {reason}") from None
    kind = getattr(rows.features[column], "dtype", rows.features[column])
    if "string" not in str(kind) or not hasattr(rows.features[column], "pa_type"):
        raise ValueError(f"{name}: the column {column!r} must hold strings, got {kind}")
    return column
