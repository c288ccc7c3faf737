"""Prompts from Parquet and Arrow tables: read through a memory map, never held.

Parquet is compressed and has no row at a known place, so its column of prompts is first copied to
a temporary Arrow file, in steps of a few rows: a few bytes may stand for a million equal ones.
"""

import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mfd_fast.files.plain import read_json
from mfd_fast.models.sana.text.prompts import (
    BadPromptError,
    PromptSource,
    checked_prompt,
    choose_key,
)

ROWS = 16  # read at a time when a column is copied
COPY_BYTES = 1 << 22  # written at a time
MAX_EXPANSION = 256  # bytes of text and places for one of Parquet
SMALL = 1 << 26  # bytes that any Parquet file may come to
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
        chunks = []
        for file in files:
            with _naming(file, "Arrow"):
                chunks += _read_column(arrow, file, column)
        self._rows = arrow.chunked_array(chunks)

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
        with _naming(files[0], "Parquet"), _open_parquet(arrow, files[0]) as first:
            column = check_column(name, first.schema_arrow, column)
        schema = arrow.schema([(column, arrow.large_string())])
        with arrow.ipc.new_stream(self._copy.name, schema) as out:
            for file in files:
                with _naming(file, "Parquet"):
                    _copy_column(arrow, file, column, schema, out)
        super().__init__(name, [Path(self._copy.name)], column)


def _open_parquet(arrow: Any, file: Path) -> Any:
    """The file; a list or text in its footer has at most as many parts as the file has bytes."""
    size = max(1, file.stat().st_size)
    return arrow.parquet.ParquetFile(
        file, thrift_string_size_limit=size, thrift_container_size_limit=size
    )


def _copy_column(arrow: Any, file: Path, column: str, schema: Any, out: Any) -> None:
    left = max(SMALL, MAX_EXPANSION * file.stat().st_size)
    with _open_parquet(arrow, file) as parquet:
        check_column(str(file), parquet.schema_arrow, column)
        rows, held = [], 0
        for batch in parquet.iter_batches(batch_size=ROWS, columns=[column]):
            rows.append(batch.cast(schema))
            held += rows[-1].nbytes
            left -= rows[-1].nbytes
            if left < 0:
                raise ValueError(
                    f"{file} stands for more than {MAX_EXPANSION} bytes of text for each of its "
                    "own; leave out the repeated prompts, or give them as .txt"
                )
            if held > COPY_BYTES:
                out.write_table(arrow.Table.from_batches(rows).combine_chunks())
                rows, held = [], 0
        if rows:
            out.write_table(arrow.Table.from_batches(rows).combine_chunks())


def _read_column(arrow: Any, file: Path, column: str | None) -> list[Any]:
    """The chunks of one column of an Arrow stream, in the memory map; no other column is read."""
    source = arrow.memory_map(str(file))
    for message in arrow.ipc.MessageReader.open_stream(source):
        if message.type == "record batch" and _is_compressed(message.metadata.to_pybytes()):
            raise ValueError(f"{file} is compressed; write it with datasets' save_to_disk")
    source.seek(0)
    schema = arrow.ipc.open_stream(source).schema
    place = schema.get_field_index(check_column(str(file), schema, column))
    source.seek(0)
    options = arrow.ipc.IpcReadOptions(included_fields=[place])
    chunks = arrow.ipc.open_stream(source, options=options).read_all().column(0).chunks
    for chunk in chunks:
        chunk.validate()
    return chunks


def _is_compressed(metadata: bytes) -> bool:
    """Whether a record batch's flatbuffer has the table ``compression``.

    Source: Arrow's Message.fbs (field 2, the header) and RecordBatch in it (field 3).
    """

    def field(table: int, number: int) -> int:
        """Where the field of a table lies; 0 if it has none."""
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        entry = 4 + 2 * number
        has_entry = entry < struct.unpack_from("<H", metadata, vtable)[0]
        offset = struct.unpack_from("<H", metadata, vtable + entry)[0] if has_entry else 0
        return table + offset if offset else 0

    def follow(place: int) -> int:
        return place + struct.unpack_from("<I", metadata, place)[0]

    return field(follow(field(follow(0), 2)), 3) != 0


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
        splits = _entry(folder / "dataset_dict.json", "splits")
        if SPLIT not in splits and len(splits) != 1:
            raise ValueError(
                f"{folder} has the splits {splits}; give the folder of one of them, "
                f"{folder / splits[0]} say"
            )
        folder = folder / (SPLIT if SPLIT in splits else splits[0])
    if not (folder / "state.json").is_file():
        return []
    try:
        names = [str(file["filename"]) for file in _entry(folder / "state.json", "_data_files")]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'state.json'} is broken ({error!r}); copy it again") from None
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {missing} of its files; copy it again")
    return [folder / name for name in names]


def _entry(path: Path, key: str) -> list[Any]:
    """A list that is not empty, under the key of a JSON object."""
    try:
        found = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again") from None
    if not isinstance(found, dict) or not isinstance(found.get(key), list) or not found[key]:
        raise ValueError(f"{path} must have a list under {key!r}; copy it again")
    return found[key]


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
