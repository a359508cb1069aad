"""A grading process, started by `pool.py`: `python -m smoltulu.tasks.verifiers.worker`.

It imports what is slow to import once, then forks a child that grades, one job a line of JSON on stdin. The child sets
timers of the kernel before each job; nobody catches their signals, so they end the child in the midst of anything. Then
the next child is forked, in milliseconds. When stdin ends, as the parent is gone, both end.

Lines on stdout: {"ready"}; for a job {"truth"} once its ground truth was read, then {"outcome", "reason"} or {"died"}.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

from smoltulu.tasks.verifiers.slow import SLOW, prepare
from smoltulu.tasks.verifiers.verdict import Verdict

#: Time for one answer: of the processor, and on the clock.
CPU_SECONDS, WALL_SECONDS = 1.0, 1.8
#: Address space of a child. sympy and its tables take a quarter of it.
MEMORY_BYTES = 2 << 30
#: Status of a child that could get no more memory.
OUT_OF_MEMORY = 77

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Fork children until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes stdin
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    prepare()
    _write(answers, {"ready": os.getpid()})
    while True:
        child = os.fork()
        if child == 0:
            _serve(answers)
        _, status, usage = os.wait4(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return
        _write(answers, {"died": code, "cpu": usage.ru_utime + usage.ru_stime})


def _serve(answers: int) -> None:
    """Grade until stdin ends. Leaves by `os._exit`: what the parent holds is not the child's to close."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for timer in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(timer, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        while line := _read_line():
            _write(answers, _graded(json.loads(line), answers))
        os._exit(0)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except BaseException:
        os._exit(1)


def _graded(job: dict[str, Any], answers: int) -> dict[str, Any]:
    begun = sum(os.times()[:2])
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    verdict: Verdict = SLOW[job["verifier"]](
        job["text"], job["ground_truth"], lambda: _write(answers, {"truth": True, "cpu": begun})
    )
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return {"outcome": verdict.outcome, "reason": verdict.reason}


def _read_line() -> bytes:
    """One line of stdin without its end; nothing where stdin ended. Never more: what follows is for the next child."""
    pieces = []
    while piece := os.read(0, 1 << 16):
        pieces.append(piece)
        if piece.endswith(b"\n"):
            return b"".join(pieces)
    return b""


def _write(descriptor: int, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the parent is gone
        os._exit(0)
