"""One distillation from config to run folder, and opening a finished one."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mfd_fast.backbones.float8 import use_float8
from mfd_fast.distill.distiller import Distiller
from mfd_fast.distill.phases import BetweenRows
from mfd_fast.distill.ranks import Ranks
from mfd_fast.files.whole import clean, staged
from mfd_fast.run.checkpoint import Counts, read
from mfd_fast.run.checkpoint_writer import Checkpointer
from mfd_fast.run.config import RunConfig, to_dict, with_absolute_paths, with_settings
from mfd_fast.run.console import BAR, device_of, plan_of, show, trained_of
from mfd_fast.run.environment import environment, peak_memory, peak_memory_counts
from mfd_fast.run.float8_error import float8_summary
from mfd_fast.run.folder import CHECKPOINTS, RESULTS, STUDENT, RunFolder
from mfd_fast.run.launch import launched_ranks, num_restarts, shard_networks
from mfd_fast.run.loop import Progress, train
from mfd_fast.run.maker import make_distiller
from mfd_fast.run.resume import (
    check_config,
    check_header,
    check_optimizers,
    header,
    locate,
    restore,
)
from mfd_fast.run.stop import Stopped, StopSignal
from mfd_fast.run.task import Task
from mfd_fast.run.trackers import check_tracker, make_tracker


def run_distillation(config: RunConfig, out: Path, *, resume: str | None = None) -> RunFolder:
    """Distil, save the student, print the result table, draw the pictures.

    Args:
        resume: None for a new run; ``""`` to continue the run in ``out`` from its newest good
            checkpoint, if it has one; or the path of a checkpoint in it.

    ``ValueError`` or ``OSError`` before anything is written if the folder, the teacher file or a
    setting is unusable; ``Stopped`` if a signal ended the training after a checkpoint.  Under
    torchrun every rank trains, and rank 0 alone evaluates, when the others are gone.
    """
    config = with_absolute_paths(config)
    with ExitStack() as folder:
        is_sharded = config.train.shard == "fsdp"
        with launched_ranks(config.train.device, is_sharded=is_sharded) as ranks:
            ranks.check_batch(config.train.batch_size, config.distill.micro_batches)
            # A node that was launched again has counted none.
            if resume is None and ranks.mean([float(num_restarts())])[0] > 0:
                resume = ""
            session = _Session(config, out, ranks)
            folder.callback(lambda: session.run.release())
            session.open(resume)
            session.train()
        if ranks.is_main:
            session.evaluate()
        return session.run


class _Session:
    """What one process does for a run."""

    def __init__(self, config: RunConfig, out: Path, ranks: Ranks):
        self.config, self.ranks = config, ranks
        torch.manual_seed(config.distill.seed)  # adapters start alike on every rank
        self.run = RunFolder(out)
        check_tracker(config.train.report_to)
        self.task = config.task()
        config = self.config = self.task.config  # a task may know more: guidance by its pipeline
        self.found = self.task.check()
        self.remarks = self.task.remarks(config.num_eval_samples)
        self.next_cond = self.task.conditions()
        self.distiller = distiller_of(self.task, config, ranks)
        check_optimizers(config.distill, self._largest())
        self.float8 = ""
        if config.train.float8:
            self.float8 = float8_summary(self.distiller, self.next_cond(0))
        self.progress = Progress(self.distiller)
        self.header = header(config, self.distiller.backbone, ranks, self.task.data())
        self.resumed: Path | None = None
        torch.manual_seed(config.distill.seed + ranks.rank)  # dropout does not

    def _largest(self) -> dict[str, Tensor]:
        """The largest parameter of every role that is trained."""
        distiller = self.distiller
        return {role: max(distiller.parameters_of(role), key=Tensor.numel)
                for role in distiller.roles}  # fmt: skip

    def open(self, resume: str | None) -> None:
        """Take the folder, and put the state of a checkpoint back if the run is resumed."""
        out = self.run.path
        if resume is None:
            if self.ranks.is_main:
                self.run = RunFolder.create(out, self.config)
            return
        if self.ranks.is_main:
            self.run = RunFolder.resume(out)
        self.resumed = self._continue(resume)
        if self.ranks.is_main:
            clean(out)
            clean(self.run / CHECKPOINTS)
            self.run.cut_history(self.distiller.num_updates["student"])
            self.run.write_config(self.config)

    def _continue(self, resume: str) -> Path | None:
        """The checkpoint that is continued, its state put back; None if the run starts."""
        folder = self.run / CHECKPOINTS
        path, remarks = locate(folder, resume) if self.ranks.is_main else (None, [])
        chosen = self.ranks.broadcast_text(str(path or ""))
        if not chosen:
            self.say(f"no checkpoint in {folder} yet: the run starts")
            return None
        state = read(Path(chosen))
        remarks += check_config(state["header"]["config"], self.config)
        remarks += check_header(state["header"], self.header)
        for remark in remarks:
            self.warn(remark)
        restore(state, self.distiller, self.progress, self.ranks)
        return Path(chosen)

    def train(self) -> None:
        """The training loop with its bar, log and checkpoints."""
        config, run, done = self.config.train, self.run, self.distiller.num_updates["student"]
        self.checkpointer = Checkpointer(
            run / CHECKPOINTS,
            config,
            header=self.header,
            ranks=self.ranks,
            warn=self.warn,
            resumed=self.resumed and Counts.of(self.resumed),
        )
        if self.ranks.is_main:
            backbone = self.distiller.backbone
            rows = {"device": device_of(backbone.device, self.ranks.world)}
            rows |= plan_of(self.config, run.path, backbone.device) | self.found | self.task.used
            rows |= {"trained": trained_of(backbone)}
            rows |= {"float8": self.float8} if self.float8 else {}
            show(rows, f"distilling {self.config.preset}")
            for remark in self.remarks:
                self.warn(remark)
        if self.resumed:
            self.say(f"continuing {self.resumed} after {done} of {config.updates} updates")
        with StopSignal() as stop, self._bar(done) as bar:
            try:
                train(
                    self.distiller,
                    self.next_cond,
                    config,
                    callbacks=self._callbacks(bar) if self.ranks.is_main else (),
                    progress=self.progress,
                    checkpointer=self.checkpointer,
                    stop=stop,
                    warn=self.warn,
                )
            except Stopped as stopped:
                raise Stopped(stopped.signum, self._how_to_resume(stopped)) from None

    def _bar(self, done: int) -> tqdm:
        return tqdm(
            total=self.config.train.updates,
            initial=done,
            dynamic_ncols=True,
            bar_format=BAR,
            disable=not self.ranks.is_main,
        )

    def _callbacks(self, bar: tqdm) -> list[Callable[[dict[str, Any]], None]]:
        config, every = self.config.train, self.config.train.preview_every
        tracker = make_tracker(self.config.train.report_to, self.run.path, to_dict(self.config))

        def log(row: dict[str, Any]) -> None:
            if problem := self.run.log(row):
                self.warn(problem)

        def preview(row: dict[str, Any]) -> None:
            if every and row["update"] % every < self.config.train.log_every:
                picture = self.run / f"preview-{row['update']:06d}.png"
                draw = partial(self.task.preview, self.distiller, picture)
                self.without_failing(draw, f"drawing {picture}")

        def track(row: dict[str, Any]) -> None:
            for send in tracker:
                self.without_failing(partial(send, row), f"train.report_to {config.report_to}")

        self.phases = BetweenRows(self.distiller)
        return [log, track, lambda row: _show(bar, row), self.phases, preview]

    def without_failing(self, show: Callable[[], Any], what: str) -> Any:
        """Do what only shows a run, and tell why it did not work: no run ends over it."""
        try:
            return show()
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            self.warn(f"{what} failed: {reason}; the run goes on without it")
            return None

    def evaluate(self) -> None:
        """Student, result table and pictures, from rank 0 alone.

        ``OSError`` says how to repeat this without training, where a checkpoint was written.
        """
        try:
            self._evaluate()
        except OSError as error:
            raise OSError(f"{error}; {self._next_command()}") from error

    def _evaluate(self) -> None:
        run, task, distiller = self.run, self.task, self.distiller
        if self.ranks.is_sharded:  # whole weights again, in this process alone, of a whole teacher
            self.task = task = with_settings(self.config, {"train.shard": "none"}).task()
            distiller = distiller_of(task, self.config, Ranks())
            distiller.load_state_dict(read(self.checkpointer.last_written)["distiller"])
        run.flush()
        with staged(run.path, STUDENT) as folder:
            task.save_student(distiller, folder / STUDENT)
        distiller.release_graphs()  # the table needs networks of its own
        rows = task.evaluate(run, self.config.num_eval_samples)
        run.write_json(
            RESULTS,
            {
                "environment": environment(distiller.backbone.device.type),
                "config": to_dict(self.config),
                "seconds": self.progress.seconds,
                "updates": distiller.num_updates,
                "skipped_updates": int(distiller.skipped),
                "peak_memory_gb": peak_memory(distiller.backbone.device) / 1e9,
                "peak_memory_counts": peak_memory_counts(distiller.backbone.device),
                "phases": self.phases.phases,
                "float8": self.float8,
                "table": rows,
                "table_text": (text := task.format_table(rows)),
            },
        )
        print(text)
        self._show_end(run)
        pictures = self.without_failing(partial(task.draw_pictures, run), "drawing pictures")
        for path in [*(pictures or []), run / STUDENT, run / RESULTS]:
            print(path)

    def _show_end(self, run: RunFolder) -> None:
        seconds, counts = self.progress.seconds, self.distiller.num_updates
        facts = {
            "training": f"{seconds:.1f} s, {sum(counts.values()) / seconds:.3g} updates/s",
            "updates": f"{counts['student']} student, {counts['aux']} auxiliary",
            "skipped": int(self.distiller.skipped),
            "report": f"mfd-fast report {run.path}",
        }
        show(facts, f"{self.config.preset}, done")

    def _how_to_resume(self, stop: Stopped) -> str:
        """Where a stopped run is, and how to go on."""
        return f"{stop}; {self._next_command()}"

    def _next_command(self) -> str:
        written = self.checkpointer.last_written
        kept = f"checkpoint {written}; continue" if written else "no checkpoint was written; start"
        return f"{kept} with: mfd-fast distill {self.config.preset} --out {self.run.path} --resume"

    def say(self, sentence: str) -> None:
        if self.ranks.is_main:
            print(sentence)

    def warn(self, sentence: str) -> None:
        if self.ranks.is_main:
            tqdm.write(f"mfd-fast: {sentence}", file=sys.stderr)


def distiller_of(task: Task, config: RunConfig, ranks: Ranks) -> Distiller:
    """The task's distiller, spread over the ranks if there are more."""
    backbone = task.backbone()
    if config.train.float8:
        use_float8(backbone)
    if ranks.is_sharded:
        shard_networks(backbone, task.device)
    return make_distiller(
        backbone,
        config.distill,
        capture=config.train.capture,
        schedule=task.schedule(),
        ranks=ranks,
    )


def _show(bar: tqdm, row: dict[str, Any]) -> None:
    key = "distance" if "distance" in row else "student_loss"
    value = [f"{key.replace('_', ' ')} {row[key]:.3f}"] if key in row else []
    bar.set_postfix_str(", ".join([*value, f"{row['updates_per_s']:.3g} updates/s"]), refresh=False)
    bar.update(row["update"] - bar.n)
