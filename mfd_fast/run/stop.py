"""Stopping a run from outside: finish the update, write a checkpoint, say how to go on."""

import os
import signal
import stat
from types import FrameType, TracebackType

# Ctrl-C; kill and torchrun and SLURM at the end of a job; SLURM's notice before it (--signal=USR1);
# the terminal was closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Stopped(Exception):  # noqa: N818  (not an error)
    """A run that was stopped by a signal after a checkpoint; ``exit_code`` is 128 + signal."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum


class StopSignal:
    """Inside the block, the first signal only sets ``signum``; a second SIGINT interrupts.

    Outside the main thread nothing is installed: signals stay with whoever owns the process.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        try:
            for signum in SIGNALS:
                if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                    continue  # nohup
                self._before[signum] = signal.signal(signum, self._receive)
        except ValueError:  # not the main thread
            self._before = {}
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        name = signal.Signals(signum).name
        note = f"\nmfd-fast: {name}; finishing this update, then a checkpoint\n"
        try:
            os.write(2, note.encode())  # a stream may be in the middle of a write of its own
        except OSError:
            _leave_terminal()


def _leave_terminal() -> None:
    """Send what would go to a terminal that is gone nowhere: a failing print must not end a run."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):
            os.dup2(nowhere, stream)
    os.close(nowhere)
