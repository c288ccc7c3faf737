"""Prompts from Parquet and Arrow tables: read through a memory map, never held.

Parquet is compressed and has no row at a known place, so its column of prompts is first copied to
a temporary Arrow file.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mfd_fast.data.prompts import BadPromptError, PromptSource, checked_prompt, choose_key

ROWS = 1024  # read at a time when a column is copied
SPLIT = "train"


def open_table(path: str | Path, column: str | None) -> PromptSource:
    """The column of a .parquet file, of a folder, or of a data set of the hub."""
    folder = Path(path)
    if not folder.exists():
        return Table(str(path), _arrow_files_of_hub(str(path)), column)
    _pyarrow()
    if folder.is_dir():
        if files := _arrow_files(folder):
            return Table(str(folder), files, column)
        parquet = sorted(folder.rglob("*.parquet"))
    else:
        parquet = [folder]
    if not parquet:
        raise ValueError(
            f"{folder} holds neither .parquet files nor a data set that datasets saved with "
            "save_to_disk; give the folder that does"
        )
    return ParquetColumn(str(folder), parquet, column)


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError("tables of prompts need pyarrow: pip install pyarrow") from None
    return pyarrow


@contextmanager
def _naming(file: Path, kind: str) -> Iterator[None]:
    """What pyarrow says about a broken file becomes a ``ValueError`` that names it."""
    try:
        yield
    except (_pyarrow().ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system: no such file, the disk is full
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{file} is not a complete {kind} file ({reason}); copy it again"
        ) from None


class Table:
    """A column of strings in Arrow stream files; the place of a prompt is its row."""

    def __init__(self, name: str, files: list[Path], column: str | None):
        arrow = _pyarrow()
        self.name = name
        tables = []
        for file in files:
            with _naming(file, "Arrow"):
                tables.append(arrow.ipc.open_stream(arrow.memory_map(str(file))).read_all())
        column = check_column(name, tables[0].schema, column)
        self._rows = arrow.chunked_array(
            [chunk for table in tables for chunk in table.column(column).chunks]
        )

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


class ParquetColumn(Table):
    """The same for Parquet files, through a temporary file that goes when this does."""

    def __init__(self, name: str, files: list[Path], column: str | None):
        arrow = _pyarrow()
        self._copy = tempfile.NamedTemporaryFile(suffix=".arrow")  # noqa: SIM115
        with _naming(files[0], "Parquet"), arrow.parquet.ParquetFile(files[0]) as first:
            column = check_column(name, first.schema_arrow, column)
        schema = arrow.schema([(column, arrow.large_string())])
        with arrow.ipc.new_stream(self._copy.name, schema) as out:
            for file in files:
                with _naming(file, "Parquet"):
                    _copy_column(arrow, file, column, schema, out)
        super().__init__(name, [Path(self._copy.name)], column)


def _copy_column(arrow: Any, file: Path, column: str, schema: Any, out: Any) -> None:
    with arrow.parquet.ParquetFile(file) as parquet:
        check_column(str(file), parquet.schema_arrow, column)
        for batch in parquet.iter_batches(batch_size=ROWS, columns=[column]):
            out.write_batch(batch.cast(schema))


def check_column(name: str, schema: Any, column: str | None) -> str:
    """The column to read: one of strings."""
    try:
        column = choose_key(schema.names, column)
    except BadPromptError as reason:
        raise ValueError(f"{name}: {reason}") from None
    kind = str(schema.field(column).type)
    if "string" not in kind or "list" in kind or "struct" in kind:
        raise ValueError(f"{name}: the column {column!r} must hold strings, got {kind}")
    return column


def _arrow_files(folder: Path) -> list[Path]:
    """The files of a saved data set, in its order; empty if the folder is no such data set."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        if SPLIT not in splits and len(splits) != 1:
            raise ValueError(
                f"{folder} has the splits {splits}; give the folder of one of them, "
                f"{folder / splits[0]} say"
            )
        folder = folder / (SPLIT if SPLIT in splits else splits[0])
    if not (folder / "state.json").is_file():
        return []
    names = [
        file["filename"] for file in json.loads((folder / "state.json").read_text())["_data_files"]
    ]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {missing} of its files; copy it again")
    return [folder / name for name in names]


def _arrow_files_of_hub(dataset_id: str) -> list[Path]:
    """Download a data set, or find it in the cache."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            f"{dataset_id!r} is no file or folder here; to take it as a data set of the Hugging "
            "Face hub: pip install datasets"
        ) from None
    return [Path(file["filename"]) for file in load_dataset(dataset_id, split=SPLIT).cache_files]
