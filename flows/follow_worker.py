"""Ends a flow run whose worker is gone: nobody could see or stop its training."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time

from smoltulu.tasks.engine.launch import stop_children

_LOOK_EVERY_SECONDS = 1.0
#: Time between SIGTERM and the forced end: the stage can write a checkpoint, Prefect can report the crash.
_GRACE_SECONDS = 20.0


def follow_worker() -> None:
    """End this process soon after its worker is gone. No effect on a flow that was started by hand."""
    if "PREFECT__FLOW_RUN_ID" not in os.environ:
        return
    worker = os.getppid()
    threading.Thread(target=_follow, args=(worker,), name="follow-worker", daemon=True).start()


def _follow(worker: int) -> None:
    while os.getppid() == worker:
        time.sleep(_LOOK_EVERY_SECONDS)
    stop_children()
    # Our output goes to the worker. When its pipe is broken, Rich, which Prefect prints with, ends the thread
    # (rich/console.py, on_broken_pipe), and this thread must go on.
    with contextlib.suppress(BaseException):
        logging.getLogger("smoltulu").error("the worker is gone: this run ends, and can be run again")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os._exit(1)
