"""Grading in worker processes, for what can hang or grow: symbolic mathematics, language detection.

No text makes `Graders` raise. Who is at fault decides where a grading process ends before its verdict:

- the ground truth was read, and the answer then used up its time or memory, or crashed the process: **wrong**. A model
  must not learn that an answer nobody can grade costs nothing;
- the ground truth was not yet read: **could not grade**, as its row is at fault;
- someone else killed the process, or the machine was too busy to give it time: graded once more in a new one, and
  **could not grade** if that fails as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import LifoQueue
from typing import IO, Any, Self

from smoltulu.tasks.limits import num_cores
from smoltulu.tasks.verifiers.names import canonical_name
from smoltulu.tasks.verifiers.rules import grade_quickly, text_for_worker
from smoltulu.tasks.verifiers.verdict import Verdict, could_not_grade, wrong

Job = tuple[str, str, str]

_START_SECONDS = 60.0
#: The worker's own timers come first; this is for one that cannot even set them.
_PATIENCE_SECONDS = 8.0
#: Less time of the processor than this within the time on the clock: the machine was busy, not the answer long.
_BUSY_SECONDS = 0.5
_REMEMBERED = 10_000
_MAX_WORKERS = 8
_OUT_OF_TIME = (-signal.SIGPROF, -signal.SIGALRM)
_CRASHES = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGFPE, -signal.SIGILL)
_OUT_OF_MEMORY = 77
#: All that a worker needs to know of the environment; it reads texts of a model, and no secret is its business.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT")


class WorkerDied(Exception):
    """A worker ended by no fault of the answer."""


class Graders:
    """Worker processes that live as long as a training; they start when the first answer needs one.

    A context manager; safe to use from several threads. In a forked process it starts workers of its own.
    """

    def __init__(self, num_workers: int | None = None) -> None:
        # The ranks of a machine share its cores.
        num_ranks = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
        self.num_workers = num_workers or max(min(num_cores(), _MAX_WORKERS) // num_ranks, 1)
        if self.num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}; it must be at least 1")
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._owner = os.getpid()
        self._verdicts: OrderedDict[Job, Verdict] = OrderedDict()
        self._workers = [_Worker() for _ in range(self.num_workers)]
        self._idle: LifoQueue[_Worker] = LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. Later answers start new ones."""
        if self._owner == os.getpid():
            for worker in self._workers:
                worker.end()

    def grade(self, verifier: str, completion: str, ground_truth: str) -> Verdict:
        """One answer. Raises ValueError for an unknown verifier, and nothing else."""
        return self.grade_all([(verifier, completion, ground_truth)])[0]

    def grade_all(self, jobs: Iterable[Job]) -> list[Verdict]:
        """Verdicts of (verifier, completion, ground truth), in order. Equal answers to one truth are graded once.

        Raises:
            ValueError: unknown verifier.
        """
        with self._lock:
            if self._owner != os.getpid():  # forked: the pipes belong to the parent
                self._begin()
        verdicts: list[Verdict | None] = []
        waiting: dict[Job, list[int]] = {}
        for place, (name, completion, ground_truth) in enumerate(jobs):
            verifier = canonical_name(name)
            verdict = grade_quickly(verifier, completion, ground_truth)
            verdicts.append(verdict)
            if verdict is None:
                job = (verifier, text_for_worker(verifier, completion), ground_truth)
                waiting.setdefault(job, []).append(place)
        for job, verdict in zip(waiting, self._in_workers(list(waiting)), strict=True):
            for place in waiting[job]:
                verdicts[place] = verdict
        return [verdict for verdict in verdicts if verdict is not None]

    def _in_workers(self, jobs: Sequence[Job]) -> list[Verdict]:
        with self._lock:
            known = {job: self._verdicts[job] for job in jobs if job in self._verdicts}
        new = [job for job in jobs if job not in known]
        if len(new) == 1:
            graded = [self._in_worker(new[0])]
        elif new:
            with ThreadPoolExecutor(min(self.num_workers, len(new)), thread_name_prefix="grader") as threads:
                graded = list(threads.map(self._in_worker, new))
        else:
            graded = []
        known |= zip(new, graded, strict=True)
        with self._lock:
            for job, verdict in known.items():
                if verdict.outcome != "could_not_grade":
                    self._verdicts[job] = verdict
                    self._verdicts.move_to_end(job)
            while len(self._verdicts) > _REMEMBERED:
                self._verdicts.popitem(last=False)
        return [known[job] for job in jobs]

    def _in_worker(self, job: Job) -> Verdict:
        worker = self._idle.get()
        try:
            for _ in range(2):
                try:
                    return worker.grade(job)
                except (WorkerDied, OSError) as error:
                    worker.end()
                    reason = str(error)
                except BaseException:
                    worker.end()  # an alarm, Ctrl-C: its late verdict would be taken for that of the next answer
                    raise
            return could_not_grade(reason)
        finally:
            self._idle.put(worker)


class _Worker:
    """One worker process and its pipes; started, and started again, when a job comes."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def grade(self, job: Job) -> Verdict:
        """Raises WorkerDied where the process ends, or does not start, by no fault of the job."""
        process = self._started()
        assert process.stdin is not None
        verifier, text, ground_truth = job
        request = {"verifier": verifier, "text": text, "ground_truth": ground_truth}
        process.stdin.write(
            json.dumps(request).encode() + b"\n"
        )  # ASCII: lone surrogates, NUL and line ends are escaped
        process.stdin.flush()
        truth: dict[str, Any] | None = None
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            message = self._read(process, deadline)
            if "truth" in message:
                truth = message
            elif "died" in message:
                return _verdict_of_death(message, truth)
            else:
                return Verdict(message["outcome"], message["reason"])

    def end(self) -> None:
        process, self._process, self._unread = self._process, None, b""
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what could not be written any more
                pipe.close()
        process.kill()  # its child is killed by the kernel, or ends as stdin ended
        process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            if self._process.poll() is None and not self._has_unread(self._process):
                return self._process
            self.end()  # killed meanwhile, or its child was
        self._process = subprocess.Popen(
            [sys.executable, "-m", "smoltulu.tasks.verifiers.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | {"PYTHONSAFEPATH": "1"},
        )
        if "ready" not in self._read(self._process, time.monotonic() + _START_SECONDS):
            raise WorkerDied("a grading process did not start")
        return self._process

    def _has_unread(self, process: subprocess.Popen[bytes]) -> bool:
        assert process.stdout is not None
        return bool(self._unread or select.select([process.stdout], [], [], 0)[0])

    def _read(self, process: subprocess.Popen[bytes], deadline: float) -> dict[str, Any]:
        """One line of the worker."""
        stdout: IO[bytes] | None = process.stdout
        assert stdout is not None
        while b"\n" not in self._unread:
            if not select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise WorkerDied("a grading process did not answer")
            if not (data := os.read(stdout.fileno(), 1 << 16)):
                raise WorkerDied("a grading process was killed")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


def _verdict_of_death(message: dict[str, Any], truth: dict[str, Any] | None) -> Verdict:
    """See the module's text. Raises WorkerDied where neither answer nor truth is at fault."""
    code = message["died"]
    if code not in (*_OUT_OF_TIME, *_CRASHES, _OUT_OF_MEMORY):
        raise WorkerDied(f"a grading process ended with {code}")
    what = "memory" if code == _OUT_OF_MEMORY else "time" if code in _OUT_OF_TIME else "stack"
    if truth is None:
        return could_not_grade(f"reading the ground truth takes too much {what}")
    if code == -signal.SIGALRM and message["cpu"] - truth["cpu"] < _BUSY_SECONDS:
        raise WorkerDied("the machine is too busy to grade")
    return wrong(f"grading the answer takes too much {what}")
