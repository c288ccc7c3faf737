"""Prompts from text files, one pass to check them, then any of them by its index.

A file of prompts is read once from end to end; what stays in memory is the place of every prompt,
8 bytes each, however long the prompts are.  Formats:

    .txt            a prompt a line
    .tsv            at least four fields a line: image name, prompt, score (a float), ...
    .jsonl          a JSON object a line; the prompt is under a key
    .parquet .arrow .csv .json   a column of a table                              (these need
    folder          of such tables, or what ``datasets`` saved with save_to_disk   the package
    owner/name      the train split of a data set of the Hugging Face hub          datasets)

Line files are UTF-8.  Passed over: empty lines, and in a .tsv the lines that are no prompt's (other
fields, a header).  Refused with their line number: bytes that are not UTF-8, NUL characters, more
than ``MAX_BYTES`` a line, JSON without the prompt.
"""

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfd_fast.files.plain import parse_json

if TYPE_CHECKING:
    from mfd_fast.models.sana.text.tables import Table

MAX_BYTES = 1 << 18  # of a line; 300 tokens are some 2 KB
KEYS = ("prompt", "text", "caption")  # the first of these that is there, unless a key is given
BOM = b"\xef\xbb\xbf"
LINE_SUFFIXES = (".txt", ".tsv", ".jsonl")
DIGEST_BYTES = 16


class BadPromptError(ValueError):
    """Why a line or row cannot be a prompt, in a few words."""


class Prompts(Sequence[str]):
    """The prompts of a source by index: records to go through once, each of which can be read again
    by its place.

    Attributes:
        num_bad: places that were skipped because they are no prompt.
        digest: hexadecimal; two sources with the same prompts in the same order have the same.
    """

    def __init__(self, source: "LineFile | Table", places: array, num_bad: int, digest: str):
        self._source, self._places = source, places
        self.num_bad, self.digest = num_bad, digest

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        prompt = self._source.prompt(self._source.record(self._places[index]))
        assert prompt is not None, "a record is what it was when the source was opened"
        return prompt


def open_prompts(
    path: str | Path, *, key: str | None = None, skip_bad: bool = False, max_prompts: int = 0
) -> Prompts:
    """Check a file, folder or data set of prompts and give access to them.

    Args:
        path: see the module.
        key: key of the .jsonl, column of the table; the first of ``KEYS`` that is there if None.
        skip_bad: leave out what is no prompt, and count it, in place of refusing the file.
        max_prompts: stop after this many; 0: all.

    Raises:
        ValueError: names the file, the line, what is wrong and what to do.
        OSError: the file is missing or cannot be read.
        ImportError: names the package that this format needs.
    """
    source = _open_source(path, key)
    places, num_bad, digest = array("q"), 0, blake2b(digest_size=DIGEST_BYTES)
    for place, number, record in source.records():
        try:
            prompt = source.prompt(record)
        except BadPromptError as reason:
            if not skip_bad:
                raise ValueError(
                    f"{source.name}:{number}: {reason}; mend it, or leave out all such lines with "
                    "--skip-bad"
                ) from None
            num_bad += 1
            continue
        if prompt is None:
            continue
        places.append(place)
        encoded = prompt.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
        if len(places) == max_prompts:
            break
    if not places:
        raise ValueError(f"{path} holds no prompt ({num_bad} bad lines); {_expected(path)}")
    return Prompts(source, places, num_bad, digest.hexdigest())


def _expected(path: str | Path) -> str:
    if Path(path).suffix == ".tsv":
        return "a .tsv needs four tab-separated fields a line: image name, prompt, score, ..."
    return "expected at least one"


def _open_source(path: str | Path, key: str | None) -> "LineFile | Table":
    """The reader for what is at the path."""
    file = Path(path)
    if file.suffix in LINE_SUFFIXES and not file.is_dir():
        if key is not None and file.suffix != ".jsonl":
            raise ValueError(f"{file} has no keys to choose from, got {key!r}; leave the key out")
        parsers = {".txt": str, ".tsv": parse_tsv, ".jsonl": partial(parse_json_line, key=key)}
        return LineFile(file, parsers[file.suffix])
    from mfd_fast.models.sana.text.tables import KINDS, Table

    is_id = str(path).count("/") == 1 and not str(path).startswith((".", "/", "~"))
    if not file.exists() and (file.suffix in KINDS or not is_id):
        raise FileNotFoundError(f"{file} does not exist; expected a file or folder of prompts")
    if file.is_file() and file.suffix not in KINDS:
        raise ValueError(
            f"{file} must end in {[*LINE_SUFFIXES, *KINDS]} or be a folder; got {file.suffix!r}"
        )
    return Table(path, key)


def checked_prompt(text: str) -> str:
    """The prompt without white space around it, if every tokenizer can take it."""
    if "\0" in text:
        raise BadPromptError("a NUL character")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise BadPromptError("a lone UTF-16 surrogate, which is no character") from None
    if size > MAX_BYTES:
        raise BadPromptError(f"{size} bytes, more than the {MAX_BYTES} allowed")
    return text.strip()


def parse_tsv(line: str) -> str | None:
    """The second field of the official prompt file; None where a line is something else."""
    fields = line.split("\t")
    try:
        float(fields[2])
    except (IndexError, ValueError):
        return None
    return fields[1] if len(fields) >= 4 else None


def parse_json_line(line: str, key: str | None) -> str:
    """The string under ``key`` of a JSON object, or under the first of ``KEYS``."""
    try:
        row = parse_json(line)
    except ValueError as error:
        raise BadPromptError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadPromptError(f"expected a JSON object, got a {type(row).__name__}")
    key = choose_key(list(row), key)
    if not isinstance(row[key], str):
        raise BadPromptError(f"{key!r} must be a string, got a {type(row[key]).__name__}")
    return row[key]


def choose_key(found: list[str], key: str | None) -> str:
    """The wanted key, or the first of ``KEYS``; ``BadPromptError`` lists what there is."""
    wanted = KEYS if key is None else (key,)
    for name in wanted:
        if name in found:
            return name
    raise BadPromptError(
        f"no key {' or '.join(map(repr, wanted))}; there is {sorted(found)}: "
        "choose one with --prompt-key"
    )


class LineFile:
    """A text file with one record a line; the place of a prompt is the offset of its line.

    Memory does not depend on the file.  One thread at a time may read.
    """

    def __init__(self, path: Path, parse: Callable[[str], str | None]):
        self.name, self.parse = str(path), parse
        self._file = path.open("rb")
        self._state = self._fingerprint()

    def records(self) -> Iterator[tuple[int, int, bytes]]:
        number = 0
        with open(self.name, "rb") as lines:
            place = len(BOM) if lines.read(len(BOM)) == BOM else 0
            lines.seek(place)
            while line := lines.readline(MAX_BYTES + 1):
                number += 1
                yield place, number, line
                place += len(line)
                while line and not line.endswith(b"\n"):  # the rest of a line that is too long
                    line = lines.readline(MAX_BYTES)
                    place += len(line)

    def record(self, place: int) -> bytes:
        if self._fingerprint() != self._state:
            raise OSError(f"{self.name} changed while it was read; start again")
        self._file.seek(place)
        return self._file.readline(MAX_BYTES + 1)

    def prompt(self, record: bytes) -> str | None:
        if len(record) > MAX_BYTES:
            raise BadPromptError(f"a line of more than {MAX_BYTES} bytes")
        try:
            line = record.rstrip(b"\r\n").decode()
        except UnicodeDecodeError as error:
            raise BadPromptError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
        prompt = self.parse(line) if line.strip() else None
        return None if prompt is None else checked_prompt(prompt) or None

    def _fingerprint(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns
