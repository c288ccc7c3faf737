"""Runs that are killed, damaged, starved and doubled, counted.

python -m scripts.reliability --preset digits          adds to bench/results/reliability_cpu.json
python -m scripts.reliability --render                 writes the table of docs/reliability.md

Every run is a real process of ``mfd-fast distill`` that trains and leaves out the evaluation.  A
full disk and a read-only folder are a small tmpfs, which only root may mount: without, those rows
say so.  Settings after ``--`` are added to the runs (a preset that needs a data file).
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from bench import results
from mfd_fast import cli
from mfd_fast.run import checkpoint
from mfd_fast.run import session as runner
from mfd_fast.run.checkpoint import DamagedCheckpointError, checkpoints_in, read
from mfd_fast.run.checkpoint_writer import Checkpointer
from mfd_fast.run.folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results/reliability_cpu.json"
PAGE = ROOT / "docs/reliability.md"
BEGIN, END = "<!-- table: python -m scripts.reliability --render -->", "<!-- end of table -->"
KILLS, CORRUPTIONS, NUM_TIMED = 25, 200, 20
SHORT = ["--train.updates", "30", "--train.batch-size", "8", "--train.log-every", "5",
         "--train.checkpoint-every", "3", "--distill.aux-updates", "2",
         "--distill.step-size", "0.2"]  # fmt: skip

Row = dict[str, Any]


def child(argv: list[str]) -> int:
    """The command line, training only."""
    runner._Session.evaluate = lambda self: self.run.flush()
    return cli.main(argv)


class Runs:
    """Starts runs of one preset in one folder and compares what they leave."""

    def __init__(self, name: str, settings: list[str], folder: Path):
        self.name, self.settings, self.folder = name, settings, folder
        started = time.monotonic()
        assert self.start(folder / "reference").wait() == 0
        self.seconds = time.monotonic() - started
        self.reference = self.end(folder / "reference")

    def command(self, out: Path, *more: str) -> list[str]:
        return ["distill", self.name, "--out", str(out), *SHORT, *self.settings, *more]

    def start(self, out: Path, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
        words = [*(launcher or (sys.executable,)), "-m", "scripts.reliability", "--child"]
        words += self.command(out, *more)
        log = (self.folder / "log.txt").open("a")
        return subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def resume(self, out: Path) -> bool:
        """Continue a run to its end; whether it ended as the reference."""
        return self.start(out, "--resume").wait() == 0 and self.is_reference(self.end(out))

    def end(self, out: Path) -> tuple[Any, list[Row]]:
        """Last checkpoint and logged rows, without what depends on the clock."""
        state = read(checkpoints_in(out / "checkpoints")[-1])
        state["progress"].pop("seconds")
        rows = RunFolder(out).history()
        for row in rows:
            row.pop("updates_per_s")
        return {key: state[key] for key in ("distiller", "progress", "rng")}, rows

    def is_reference(self, end: tuple[Any, list[Row]]) -> bool:
        """Bit for bit: weights, moments, averages, random states, counters, rows."""
        return same(end, self.reference)


def same(a: Any, b: Any) -> bool:
    """Whether two trees hold the same bits."""
    (mine, spec), (theirs, other) = tree_flatten(a), tree_flatten(b)
    return spec == other and all(
        torch.equal(x, y) if torch.is_tensor(x) else x == y
        for x, y in zip(mine, theirs, strict=True)
    )


def until(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 300) -> bool:
    """Wait for a condition; False if the process ended first."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            return False
        time.sleep(0.0005)
    return True


def is_writing(out: Path) -> bool:
    return any((out / "checkpoints").glob(checkpoint.WRITING + "*"))


def kills(runs: Runs) -> Row:
    """Kill -9 anywhere between the first row and the end, every other time during a write."""
    same_ends, in_write, out_of, out = 0, 0, 0, runs.folder / "killed"
    draw = random.Random(0)
    while out_of < KILLS:
        shutil.rmtree(out, ignore_errors=True)
        process = runs.start(out)
        until((out / "config.yaml").exists, process)
        time.sleep(draw.uniform(0.0, 0.6) * runs.seconds * draw.random())
        if out_of % 2:
            until(lambda: is_writing(out), process)
        process.kill()
        if process.wait() == 0:
            continue  # it had ended
        out_of += 1
        in_write += is_writing(out)
        same_ends += runs.resume(out)
        print(f"kill {out_of}: {same_ends} ended the same, {in_write} during a write", flush=True)
    return {"check": "kill -9 at a random instant", "passed": same_ends, "of": out_of,
            "note": f"{in_write} of them while a checkpoint was being written"}  # fmt: skip


def corruptions(runs: Runs) -> Row:
    """Flip a bit or cut a file anywhere; refused by the file's name."""
    good = checkpoints_in(runs.folder / "reference" / "checkpoints")[-1]
    broken = runs.folder / "corrupted" / good.name
    refused, draw = 0, random.Random(0)
    shutil.copytree(good, broken)
    for _ in range(CORRUPTIONS):
        source = draw.choice(sorted(good.iterdir()))
        data = bytearray(source.read_bytes())
        where = draw.randrange(len(data))
        if draw.random() < 0.5:
            data[where] ^= 1 << draw.randrange(8)
        else:
            del data[where:]
        (broken / source.name).write_bytes(data)
        try:
            read(broken)
        except DamagedCheckpointError as error:
            refused += source.name in str(error)
        shutil.copyfile(source, broken / source.name)
    read(broken)  # whole again, it is accepted
    return {"check": "one bit flipped or a file cut", "passed": refused, "of": CORRUPTIONS,
            "note": "refused by the file's name; none loaded"}  # fmt: skip


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[str], None]]:
    """A tmpfs of that many bytes; yields a function that mounts it again with other options."""
    folder.mkdir()

    def mount(*options: str) -> None:
        subprocess.run(["mount", *options, "-t", "tmpfs", "tmpfs", str(folder)], check=True)

    mount("-o", f"size={size}")
    try:
        yield lambda options: mount("-o", f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(runs: Runs) -> Row:
    """Room for two and a half checkpoints; then more room, and the run is continued."""
    one = sum(f.stat().st_size for f in checkpoints_in(runs.folder / "reference/checkpoints")[-1]
              .iterdir())  # fmt: skip
    with small_disk(runs.folder / "disk", int(2.5 * one)) as remount:
        out = runs.folder / "disk" / "run"
        code = runs.start(out).wait()
        kept = len(checkpoints_in(out / "checkpoints"))
        remount(f"size={10 * one}")
        passed = code == 0 and kept == 2 and runs.resume(out)
    told = (runs.folder / "log.txt").read_text().count("could not be written")
    return {"check": "disk full at a checkpoint", "passed": int(passed), "of": 1,
            "note": f"told {told} times; the run went on; two good checkpoints stayed"}  # fmt: skip


def read_only(runs: Runs) -> Row:
    with small_disk(runs.folder / "ro", 1 << 20) as remount:
        remount("ro")
        code = runs.start(runs.folder / "ro" / "run").wait()
    said = "choose a writable folder" in (runs.folder / "log.txt").read_text()
    return {"check": "read-only folder", "passed": int(code == 2 and said), "of": 1,
            "note": "exit code 2, one sentence"}  # fmt: skip


def two_runs(runs: Runs) -> Row:
    out = runs.folder / "shared"
    first = runs.start(out)
    until((out / "metrics.jsonl").exists, first)
    first.send_signal(signal.SIGSTOP)  # it shall not end before the others have tried
    codes = [runs.start(out, *more).wait() for more in ((), ("--resume",))]
    first.send_signal(signal.SIGCONT)
    unharmed = first.wait() == 0 and runs.is_reference(runs.end(out))
    passed = int(codes == [2, 2] and unharmed)
    return {"check": "second run into one folder", "passed": passed, "of": 1,
            "note": "refused with and without --resume; the first ends the same"}  # fmt: skip


def killed_rank(runs: Runs) -> Row:
    """Two ranks under torchrun; one is killed, torchrun starts them again."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                "2", "--max-restarts", "3")  # fmt: skip
    assert runs.start(runs.folder / "ranks", launcher=launcher).wait() == 0
    out = runs.folder / "killed-rank"
    process = runs.start(out, launcher=launcher)
    until(lambda: bool(checkpoints_in(out / "checkpoints")), process)
    os.kill(max(children_of(process.pid)), signal.SIGKILL)
    ended = process.wait() == 0
    passed = ended and same(runs.end(out), runs.end(runs.folder / "ranks"))
    return {"check": "a rank of two killed under torchrun", "passed": int(passed), "of": 1,
            "note": "started again from the last checkpoint; same end"}  # fmt: skip


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for task in tasks for word in task.read_text().split()]


def overhead(runs: Runs) -> Row:
    """Processor time of a checkpoint, copy and writer, over that of 100 updates of the preset's own
    size; processor time, so that other work on the machine does not enter.
    """
    copying: list[float] = []
    writing: list[float] = []
    save, write = Checkpointer.save, Checkpointer._write

    def timed_save(self, counts, state):
        started = time.thread_time()
        save(self, counts, state)
        copying.append(time.thread_time() - started)

    def timed_write(self, *args):
        started = time.thread_time()
        write(self, *args)
        writing.append(time.thread_time() - started)

    Checkpointer.save, Checkpointer._write = timed_save, timed_write
    started = time.thread_time()
    try:
        per_update = (train_timed(runs) - started - sum(copying)) / NUM_TIMED
    finally:
        Checkpointer.save, Checkpointer._write = save, write
    each = statistics.median(copying) + statistics.median(writing)
    cost = each / (100 * per_update)
    return {"check": "cost of a checkpoint every 100 updates", "passed": int(cost < 0.02), "of": 1,
            "percent": round(100 * cost, 3), "checkpoint_ms": round(1e3 * each, 2),
            "update_ms": round(1e3 * per_update, 2),
            "note": f"{100 * cost:.2f} % of the processor time, limit 2 %"}  # fmt: skip


def train_timed(runs: Runs) -> float:
    """Train with a checkpoint every other student update; this thread's processor time after it."""
    argv = ["distill", runs.name, "--out", str(runs.folder / "cost"), *runs.settings,
            "--train.updates", str(NUM_TIMED), "--train.checkpoint-every", "2"]  # fmt: skip
    assert child(argv) == 0
    return time.thread_time()


CHECKS = (overhead, corruptions, two_runs, killed_rank, full_disk, read_only, kills)
NEED_ROOT = (full_disk, read_only)


def study(name: str, settings: list[str], only: list[str]) -> list[Row]:
    """The checks of one preset, all of them or those named in ``only``."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(name, settings, Path(folder))
        for check in CHECKS:
            is_possible = os.geteuid() == 0 or check not in NEED_ROOT
            if is_possible and (not only or check.__name__ in only):
                rows.append({"preset": name, **check(runs)})
                print(rows[-1], flush=True)
    return rows


def render(text: str) -> str:
    """The page with its table made from the committed results."""
    lines = ["| preset | what was done | passed | |", "|---|---|---:|---|"]
    document = json.loads(RESULTS.read_text())
    for row in document["rows"]:
        lines.append(
            f"| {row['preset']} | {row['check']} | {row['passed']} of {row['of']} | {row['note']} |"
        )
    facts = f"{document['device']}, {document['threads']} thread, torch {document['torch']}"
    table = "\n".join([*lines, "", f"Taken on {facts}, commit {document['commit']}."])
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset")
    parser.add_argument("--only", nargs="+", default=[], choices=[c.__name__ for c in CHECKS])
    parser.add_argument("--render", action="store_true")
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    if args.preset:
        old = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
        rows = study(args.preset, args.settings, args.only)
        new = {(row["preset"], row["check"]): row for row in rows}
        kept = {(row["preset"], row["check"]): row for row in old}
        rows = list((kept | new).values())
        results.write(RESULTS, results.header("reliability", "cpu", {"settings": SHORT}), rows)
    if args.render:
        PAGE.write_text(render(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
