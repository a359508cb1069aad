"""A rank's sign of life: the last step it did, when the next is due, and where it is while it does none.

It says where it is twice in `compute.rank_timeout_minutes`: one that waits both times has waited for long. The stack is
written by a thread of faulthandler, which needs neither the interpreter nor the main thread: a rank that waits in a
collective, in C, is seen as well. A process that is stopped writes nothing, and is told by that.
"""

from __future__ import annotations

import faulthandler
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

from smoltulu.tasks.process import RANK_START_S

_STEP_FILE, _STACK_FILE = "step-{}", "stack-{}.txt"
#: A timer is not set again sooner than this: a report may come a thousand times a second.
_SET_EVERY_S = 0.5


class Pulse:
    """Of this process."""

    def __init__(self, work: Path, rank: int, seconds: float) -> None:
        self._seconds = seconds
        # Open as long as the process lives: the thread knows numbers of descriptors only.
        self._step = os.open(work / _STEP_FILE.format(rank), os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self._stack = os.open(work / _STACK_FILE.format(rank), os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self._note(-1, seconds + RANK_START_S)
        self._set(seconds + RANK_START_S)
        self._set_at = -math.inf  # the first step ends the longer time of the start, however soon it comes

    def beat(self, step: int) -> None:
        """`step` is done."""
        self._note(step, self._seconds)
        if time.monotonic() - self._set_at > _SET_EVERY_S:
            self._set(self._seconds)

    def _note(self, step: int, seconds: float) -> None:
        os.pwrite(self._step, b"%20d %20.3f" % (step, time.monotonic() + seconds), 0)

    def _set(self, seconds: float) -> None:
        faulthandler.cancel_dump_traceback_later()
        os.ftruncate(self._stack, 0)
        os.lseek(self._stack, 0, os.SEEK_SET)
        faulthandler.dump_traceback_later(seconds / 2, repeat=True, file=self._stack)
        self._set_at = time.monotonic()


class Beat(NamedTuple):
    """The last step that a rank did, -1 before the first, and when the next is due (monotonic seconds)."""

    step: int = -1
    due: float = -math.inf


def last_beat(work: Path, rank: int) -> Beat:
    """Of a rank that has not said anything yet, all is due."""
    try:
        step, due = (work / _STEP_FILE.format(rank)).read_bytes().split()
        return Beat(int(step), float(due))
    except (OSError, ValueError):
        return Beat()


def stack_of(work: Path, rank: int) -> str:
    """Where a rank is that has done no step for too long; "" of one that has, or that is stopped."""
    try:
        return (work / _STACK_FILE.format(rank)).read_text(errors="replace")
    except OSError:
        return ""


def forget(work: Path) -> None:
    for pattern in (_STEP_FILE, _STACK_FILE):
        for file in work.glob(pattern.format("*")):
            file.unlink()
