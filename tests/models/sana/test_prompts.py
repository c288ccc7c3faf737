"""Prompt files: every format, what is refused and where, and memory that no file can fill."""

import json
import sys
import tracemalloc
from collections import Counter

import pytest

from mfd_fast.models.order import shuffled
from mfd_fast.models.sana.text.prompts import MAX_BYTES, open_prompts

PROMPTS = ["a red fox", "Ünïcode, 漢字 and 🦊", "tabs? no", "the last"]
OFFICIAL = [
    "image\tprompt\tscore\tsource",  # a header: its score is no number
    "a.png\ta red fox\t0.5\tx",
    "b.png\tÜnïcode, 漢字 and 🦊\t-1e3\tx\tmore",
    "only two\tfields",
    "c.png\tthree fields\t1.0",
    "",
    "d.png\ttabs? no\tnan\t",
    "e.png\tthe last\t7\ty",
]


def write(path, *lines, end=b"\n"):
    encoded = [line if isinstance(line, bytes) else line.encode() for line in lines]
    path.write_bytes(end.join(encoded))
    return path


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("suffix", [".txt", ".tsv", ".jsonl"])
def test_line_formats_give_the_same_prompts(tmp_path, suffix, end):
    lines = {
        ".txt": ["", "  a red fox ", *PROMPTS[1:], "   "],
        ".tsv": OFFICIAL,
        ".jsonl": [json.dumps({"id": 1, "caption": "no", "prompt": p}) for p in PROMPTS],
    }[suffix]
    prompts = open_prompts(write(tmp_path / f"p{suffix}", *lines, end=end))
    assert list(prompts) == PROMPTS and len(prompts) == 4 and prompts.num_bad == 0
    assert prompts[-1] == "the last" and prompts[1:3] == PROMPTS[1:3]
    assert prompts.digest == open_prompts(write(tmp_path / "same.txt", *PROMPTS)).digest
    assert prompts.digest != open_prompts(write(tmp_path / "other.txt", *PROMPTS[1:])).digest
    with pytest.raises(IndexError):
        prompts[4]


def test_a_byte_order_mark_is_no_part_of_the_prompt(tmp_path):
    path = write(tmp_path / "p.txt", b"\xef\xbb\xbfone", "two")
    assert list(open_prompts(path)) == ["one", "two"]


def test_max_prompts_stops_before_a_bad_line(tmp_path):
    path = write(tmp_path / "p.txt", "one", "two", b"\xff")
    assert list(open_prompts(path, max_prompts=2)) == ["one", "two"]


@pytest.mark.parametrize(
    ("suffix", "bad", "reason"),
    [
        (".txt", b"caf\xe9 is latin-1", "not UTF-8"),
        (".txt", "nul \0 inside", "a NUL character"),
        (".txt", "x" * (MAX_BYTES + 1), f"a line of more than {MAX_BYTES} bytes"),
        (".txt", "x" * 1_000_000, f"a line of more than {MAX_BYTES} bytes"),
        (".tsv", "a\tnul \0\t1\tb", "a NUL character"),
        (".jsonl", '{"prompt": "nul \\u0000"}', "a NUL character"),
        (".jsonl", '{"prompt": "half \\ud83e"}', "a lone UTF-16 surrogate"),
        (".jsonl", '{"prompt": 3}', "'prompt' must be a string, got a int"),
        (".jsonl", '["a list"]', "expected a JSON object, got a list"),
        (".jsonl", '{"prompt": "cut', "not JSON"),
        (".jsonl", "[" * 100_000, "not JSON"),
        (".jsonl", '{"a": 1, "b": "x"}', r"no key 'prompt' or 'text' or 'caption'; there is "
         r"\['a', 'b'\]: choose one with --prompt-key"),
    ],
)  # fmt: skip
def test_bad_lines_are_refused_by_number_or_skipped_and_counted(tmp_path, suffix, bad, reason):
    good = {
        ".txt": "{}", ".tsv": "n\t{}\t1\t2", ".jsonl": '{{"prompt": "{}"}}',
    }[suffix]  # fmt: skip
    path = write(tmp_path / f"p{suffix}", good.format("one"), "", bad, bad, good.format("two"))
    with pytest.raises(ValueError, match=rf"p{suffix}:3: {reason}.*--skip-bad"):
        open_prompts(path)
    prompts = open_prompts(path, skip_bad=True)
    assert list(prompts) == ["one", "two"] and prompts.num_bad == 2


def test_a_chosen_key(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"prompt": "no", "long": "yes"}')
    assert list(open_prompts(path, key="long")) == ["yes"]
    with pytest.raises(ValueError, match=r"no key 'short'; there is \['long', 'prompt'\]"):
        open_prompts(path, key="short")
    with pytest.raises(ValueError, match="no keys to choose from"):
        open_prompts(write(tmp_path / "p.txt", "a"), key="long")


def test_what_is_no_prompt_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .*got '.doc'"):
        open_prompts(write(tmp_path / "p.doc", "a"))
    with pytest.raises(FileNotFoundError, match=r"p\.txt"):
        open_prompts(tmp_path / "p.txt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_prompts(tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="holds no prompt"):
        open_prompts(write(tmp_path / "empty.txt", "", " "))
    with pytest.raises(ValueError, match="four tab-separated fields"):
        open_prompts(write(tmp_path / "p.tsv", "a red fox", "a cat"))
    path = write(tmp_path / "changes.txt", "one", "two")
    prompts = open_prompts(path)
    write(path, "something", "else")
    with pytest.raises(OSError, match="changed while it was read"):
        prompts[0]


def test_a_million_lines_take_8_bytes_each(tmp_path):
    """Memory is the index: what the lines hold does not count, nor does one line of 100 MB."""
    path, count = tmp_path / "p.txt", 1_000_000
    with path.open("wb") as file:
        for start in range(0, count, 1000):
            file.write(b"".join(b"prompt number %d\n" % n for n in range(start, start + 1000)))
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b"\nprompt number 1000000\n")
    few = open_prompts(path, max_prompts=1000)
    assert few[999] == "prompt number 999"
    tracemalloc.start()
    prompts = open_prompts(path, skip_bad=True)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(prompts) == count + 1 and prompts.num_bad == 1
    assert [prompts[n] for n in (count, 0, 123_456)] == [
        f"prompt number {n}" for n in (count, 0, 123_456)
    ]
    index = 8 * count
    # An array grows by an eighth; beside it there are a few lines of at most MAX_BYTES.
    assert held < 9 / 8 * index + 2 * MAX_BYTES
    assert peak < 2 * 9 / 8 * index + 4 * MAX_BYTES  # growing may copy it


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 65, 1000])
def test_every_epoch_is_another_permutation(count):
    epochs = [[shuffled(e * count + i, count, seed=3) for i in range(count)] for e in range(4)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count >= 64:  # 64! orders: two alike by chance are out of the question
        assert len(set(map(tuple, epochs))) == 4
        assert epochs[0] != [shuffled(i, count, seed=4) for i in range(count)]


def test_the_order_is_uniform():
    """Which index comes first: chi-square over epochs, against its 1 - 1e-6 quantile."""
    scipy = pytest.importorskip("scipy.stats")
    count, epochs = 11, 2200
    first = Counter(shuffled(e * count, count, seed=0) for e in range(epochs))
    expected = epochs / count
    statistic = sum((first[i] - expected) ** 2 / expected for i in range(count))
    assert statistic < scipy.chi2.ppf(1 - 1e-6, count - 1)


class TestTables:
    """Tables and data sets, read by the library."""

    @pytest.fixture
    def datasets(self, monkeypatch, tmp_path):
        library = pytest.importorskip("datasets")
        monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        return library

    def of(self, datasets, prompts, **columns):
        return datasets.Dataset.from_dict(
            {"id": list(range(len(prompts))), "prompt": prompts} | columns
        )

    @pytest.mark.parametrize("kind", ["parquet", "csv", "json"])
    def test_a_table(self, datasets, tmp_path, kind):
        path = tmp_path / f"p.{kind}"
        prompts = [*PROMPTS[:2], None, " ", *PROMPTS[2:]]
        getattr(self.of(datasets, prompts, caption=list("abcdef")), f"to_{kind}")(path)
        assert list(open_prompts(path)) == PROMPTS
        assert list(open_prompts(path, key="caption")) == list("abcdef")
        with pytest.raises(ValueError, match="'id' must hold strings, got int64"):
            open_prompts(path, key="id")
        with pytest.raises(ValueError, match=r"no key 'x'; there is \['caption', 'id', 'prompt'\]"):
            open_prompts(path, key="x")

    def test_a_folder_of_parquet(self, datasets, tmp_path):
        for number in (1, 0):
            part = self.of(datasets, PROMPTS[2 * number : 2 * number + 2])
            part.to_parquet(tmp_path / "set" / f"part-{number}.parquet")
        assert list(open_prompts(tmp_path / "set")) == PROMPTS

    def test_a_saved_data_set(self, datasets, tmp_path):
        self.of(datasets, PROMPTS).save_to_disk(tmp_path / "one", num_shards=2)
        assert list(open_prompts(tmp_path / "one")) == PROMPTS
        splits = {name: self.of(datasets, [name]) for name in ("test", "train")}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "all")
        assert list(open_prompts(tmp_path / "all")) == ["train"]
        splits["dev"] = splits.pop("train")
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "none")
        with pytest.raises(ValueError, match=r"has the splits \['test', 'dev'\]"):
            open_prompts(tmp_path / "none")
        (tmp_path / "one/data-00001-of-00002.arrow").write_text("no arrow")
        with pytest.raises(ValueError, match="one cannot be read as a table"):
            open_prompts(tmp_path / "one")

    def test_bad_rows(self, datasets, tmp_path):
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        bad = arrow.array([b"one", b"caf\xe9", b"nul \0"]).cast(arrow.binary()).view(arrow.string())
        path = tmp_path / "p.parquet"
        parquet.write_table(arrow.table({"prompt": bad}), path)
        with pytest.raises(ValueError, match=r"p.parquet:2: not UTF-8.*--skip-bad"):
            open_prompts(path)
        prompts = open_prompts(path, skip_bad=True)
        assert list(prompts) == ["one"] and prompts.num_bad == 2

    def test_no_tables(self, datasets, tmp_path):
        with pytest.raises(ValueError, match="holds neither tables"):
            open_prompts(tmp_path)

    @pytest.mark.parametrize("broken", ["000", "001", "002"])
    @pytest.mark.parametrize("cut", [80, -5])
    def test_the_broken_file_is_named(self, datasets, broken, cut, tmp_path):
        for n in range(3):
            self.of(datasets, ["a", "b"]).to_parquet(tmp_path / f"{n:03d}.parquet")
        file = tmp_path / f"{broken}.parquet"
        content = file.read_bytes()
        file.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=rf"{file} cannot be read as a table"):
            open_prompts(tmp_path)
        file.write_bytes(content[:4] + bytes(60) + content[64:])  # the footer is whole
        with pytest.raises(ValueError, match=rf"{file} cannot be read as a table"):
            open_prompts(tmp_path)


@pytest.mark.parametrize("path", ["p.parquet", "owner/a-set"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.parquet").touch()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        open_prompts(path)
