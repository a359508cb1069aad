"""Runs a sweep in this process, without Prefect: each cell in a thread that waits for a warm process."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import FrameType
from typing import Any

from smoltulu.artifacts.store import Log
from smoltulu.flows.sweeping.engine import Made, References, SweepRun, make_nodes
from smoltulu.flows.sweeping.grid import SweepCell
from smoltulu.tasks.engine.launch import StageFailed, stop_children

#: Seconds between two looks at whether a stage began while the others were being stopped.
_LOOK_EVERY_SECONDS = 0.5
_ENDINGS = (signal.SIGTERM, signal.SIGHUP)


class _Named(logging.LoggerAdapter):
    """Messages of a cell's stages, with the cell in front."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        return f"{(self.extra or {})['cell']}: {msg}", kwargs


def run_here(run: SweepRun, stage_log: logging.Logger, finish: Callable[[], str]) -> str:
    """Run what is missing; returns the state. `finish` writes the page after it, and returns its path.

    Ctrl-C, SIGTERM and SIGHUP end the stages that run (their checkpoints stay), then are raised. Finished cells are
    on record at once; those that were stopped are as if they had not begun.
    """
    stopping = threading.Event()

    def make(cell: SweepCell, nodes: tuple[str, ...], upstream: References) -> Made:
        is_shared = nodes[0] in cell.shared_nodes
        log: Log = stage_log if is_shared else _Named(stage_log, {"cell": cell.place.name})
        made: dict[str, Any] = {}
        for node in nodes:
            if stopping.is_set():
                raise StageFailed(f"{node}: was stopped before it began")
            one = make_nodes(cell, (node,), {**upstream, **made}, run.store, log)
            if one.diverged:
                return one
            made |= one.references
        return Made(made)

    futures: list[Future[Made]] = []
    state, page = "Failed", ""
    # What nohup has this process ignore stays ignored.
    heard = [number for number in _ENDINGS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _leave) for number in heard}
    pool = ThreadPoolExecutor(run.sweep.num_workers, thread_name_prefix="cell")

    def submit(cell: SweepCell, nodes: tuple[str, ...], upstream: References) -> Future[Made]:
        futures.append(pool.submit(make, cell, nodes, upstream))
        return futures[-1]

    try:
        state = run.run(submit)
        page = finish()
    except BaseException as error:
        state = "Failed" if isinstance(error, Exception) else "Cancelled"
        # A second Ctrl-C must not interrupt the clean-up: what runs ends within seconds.
        for number in (signal.SIGINT, *_ENDINGS):
            before.setdefault(number, signal.getsignal(number))
            signal.signal(number, signal.SIG_IGN)
        stopping.set()
        pool.shutdown(wait=False, cancel_futures=True)
        while wait(futures, timeout=_LOOK_EVERY_SECONDS).not_done:
            stop_children()
        raise
    finally:
        pool.shutdown()
        run.end(state, page)
        for number, handler in before.items():
            signal.signal(number, handler)
    return state


def _leave(number: int, frame: FrameType | None) -> None:
    """Turn a signal into an exit that runs `finally`."""
    raise SystemExit(128 + number)
