"""What a run tells about its health, and the sentences it says when something leaves its range.

Everything is summed on the device after every update and read together with the metrics: no wait is
added.  The ranges compare a run with itself; they are wide, because a warning that is often wrong
is not read.
"""

from typing import Any

import torch
from torch import Tensor

Row = dict[str, float]

LOSSES = ("aux_loss", "student_loss")
USUAL = ("distance", "aux_grad_norm", "student_grad_norm", "aux_loss_std", "student_loss_std")
USUAL_DECAY = 0.9  # of the averages over rows that "usual" means
ROWS_BEFORE_WARNINGS = 5  # what is usual has to be seen first

MAX_SATURATION = 0.05
MAX_AUX_LAG = 0.5
MAX_OF_USUAL = 10.0


class TooManySkippedUpdates(ValueError):  # noqa: N818
    """Too many updates in a row were not finite."""


def complaints(row: Row, usual: Row) -> dict[str, str]:
    """What is out of its range -> the sentence about it, from a row and the usual values."""
    said = {}
    if row.get("saturation", 0.0) > MAX_SATURATION:
        said["saturation"] = (
            f"{row['saturation']:.0%} of the samples' values are beyond distill.sample_bound: the "
            "student is leaving the data's range; go on with a lower distill.student_optim.lr, or "
            "start again with a lower distill.guidance"
        )
    if row.get("aux_lag", 0.0) > MAX_AUX_LAG:
        said["aux_lag"] = (
            f"after a student update the auxiliary's loss is {row['aux_lag']:.0%} above what it "
            "reaches within the cycle: it cannot follow the student; raise distill.aux_updates or "
            "distill.aux_optim.lr, or lower distill.student_optim.lr"
        )
    for key in USUAL:
        if key in usual and row.get(key, 0.0) > MAX_OF_USUAL * usual[key]:
            said[key] = _unusual(key, f"{row[key]:.3g}", f"usual is {usual[key]:.3g}")
    return said


def _unusual(key: str, now: str, usual: str) -> str:
    if key == "distance":
        return (
            f"the mean-flow distance is {now}, {usual}: teacher and auxiliary are drifting apart; "
            "lower distill.student_optim.lr, or go back to an earlier checkpoint with --resume PATH"
        )
    if key.endswith("_std"):
        return (
            f"{key.removesuffix('_std')} scatters by {now} between two rows, {usual}: lower the "
            "learning rates, or look for bad conditions in the data"
        )
    role = key.removesuffix("_grad_norm")
    return (
        f"the {role}'s gradient norm is {now}, {usual}: lower distill.{role}_optim.lr or "
        f"distill.{role}_optim.clip_norm"
    )


class Monitors:
    """Sums on the device between two rows, and what is usual, over the rows.

    Args:
        device: where the metrics are.
        aux_updates, student_updates: the cycle.
        sees_moves: a cycle's first auxiliary update learns from samples of the student that moved;
            lag needs that, and at least two auxiliary updates in a cycle.

    The columns added to a row: mean and standard deviation of both losses over all updates since
    the row before, and ``aux_lag``: the auxiliary's flow-matching loss on fresh samples right after
    the student moved, over that of the cycle's last auxiliary update, minus 1.
    """

    def __init__(
        self, device: torch.device, *, aux_updates: int, student_updates: int,
        sees_moves: bool = True,
    ):  # fmt: skip
        self.device, self.has_lag = device, sees_moves and aux_updates > 1
        self.cycle = aux_updates + student_updates
        self.aux_updates = aux_updates
        zero = torch.zeros((), dtype=torch.float64, device=device)
        names = [f"{loss}_{power}" for loss in LOSSES for power in ("n", "sum", "squares")]
        self.sums = {name: zero.clone() for name in [*names, "lag_first", "lag_last"]}
        self.usual: Row = {}
        self.rows_seen = 0
        self.raised: list[str] = []

    def observe(self, update: int, role: str, metrics: dict[str, Tensor]) -> None:
        """Take in the metrics of update number ``update`` (both roles counted from 0)."""
        loss, position = f"{role}_loss", update % self.cycle
        value = metrics[loss].double()
        self.sums[f"{loss}_n"] += 1
        self.sums[f"{loss}_sum"] += value
        self.sums[f"{loss}_squares"] += value * value
        if role == "aux" and position == 0:
            self.sums["lag_first"] += value
        if role == "aux" and position == self.aux_updates - 1:
            self.sums["lag_last"] += value

    def columns(self, sums: Row) -> Row:
        """The row's columns from the sums, read by the caller; starts new sums."""
        for tensor in self.sums.values():
            tensor.zero_()
        row = {}
        for loss in LOSSES:
            if n := sums[f"{loss}_n"]:
                mean = sums[f"{loss}_sum"] / n
                row[f"{loss}_mean"] = mean
                row[f"{loss}_std"] = max(sums[f"{loss}_squares"] / n - mean * mean, 0.0) ** 0.5
        if self.has_lag and sums["lag_last"] > 0:
            row["aux_lag"] = sums["lag_first"] / sums["lag_last"] - 1.0
        return row

    def warnings(self, row: Row) -> list[str]:
        """What this row is warned about, once for every time that it leaves its range."""
        out = complaints(row, self.usual) if self.rows_seen >= ROWS_BEFORE_WARNINGS else {}
        sentences = [sentence for name, sentence in out.items() if name not in self.raised]
        self.raised = list(out)
        self._follow(row)
        return sentences

    def _follow(self, row: Row) -> None:
        """Let what is usual follow the row, slowly; what is out of range or not finite teaches
        nothing.
        """
        self.rows_seen += 1
        for key in USUAL:
            if key in row and key not in self.raised and row[key] - row[key] == 0.0:
                before = self.usual.get(key, row[key])
                self.usual[key] = USUAL_DECAY * before + (1 - USUAL_DECAY) * row[key]

    def live_state(self) -> dict[str, Any]:
        """What a continued run needs to say the same."""
        return {
            "sums": dict(self.sums),
            "usual": dict(self.usual),
            "rows_seen": self.rows_seen,
            "raised": list(self.raised),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`live_state`, or a copy of it."""
        for name, value in state["sums"].items():
            self.sums[name].copy_(value)
        self.usual, self.rows_seen = dict(state["usual"]), state["rows_seen"]
        self.raised = list(state["raised"])


def check_skips(row: Row, limit: int) -> None:
    """``TooManySkippedUpdates`` if the last ``limit`` updates of a role were all skipped."""
    if row["skipped_in_a_row"] >= limit:
        raise TooManySkippedUpdates(
            f"the last {row['skipped_in_a_row']:.0f} updates of a role had gradients that are not "
            f"finite and were skipped (train.max_skipped_in_a_row {limit}); nothing is learned. "
            "Resume an earlier checkpoint with a lower learning rate (--resume PATH "
            "--distill.student-optim.lr LR, or aux-optim), or start again with a lower "
            "distill.guidance; an fp16 network starts with a distill.loss_scale"
        )
