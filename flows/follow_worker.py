"""A flow run must not outlive the worker that started it: nobody would know of its training, or could stop it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time

from smoltulu.tasks.engine.launch import stop_children

_LOOK_EVERY_SECONDS = 1.0
#: From the request to end until the end is forced: the stage may write a checkpoint, Prefect may report the crash.
_GRACE_SECONDS = 20.0


def follow_worker() -> None:
    """End this process soon after the worker that started it is gone; no effect for a flow that was started by hand."""
    if "PREFECT__FLOW_RUN_ID" not in os.environ:
        return
    worker = os.getppid()
    threading.Thread(target=_follow, args=(worker,), name="follow-worker", daemon=True).start()


def _follow(worker: int) -> None:
    while os.getppid() == worker:
        time.sleep(_LOOK_EVERY_SECONDS)
    stop_children()
    # What we print goes to the worker: with nobody at the other end Rich, which Prefect prints with, ends the thread
    # (rich/console.py, on_broken_pipe), and this one must live.
    with contextlib.suppress(BaseException):
        logging.getLogger("smoltulu").error("the worker is gone: this run ends, and can be run again")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os._exit(1)
