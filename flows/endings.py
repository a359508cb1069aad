"""How a run ends that is interrupted: what Prefect, the record and the report say is what happened."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable
from typing import Any
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.futures import PrefectFuture
from prefect.states import Cancelled, Crashed, State

from smoltulu.flows.machine.prefect_api import close_task_runs
from smoltulu.tasks.engine.launch import stop_children

#: The server is asked while the stages stop; a server that does not answer must not delay the end.
_ANSWER_SECONDS = 5.0
#: Time for the tasks to report that their stages were stopped.
_REPORT_SECONDS = 5.0


def close_earlier_attempts() -> None:
    """End the task runs of attempts that were killed: of this run, and of runs that have ended since."""
    with contextlib.suppress(Exception), get_client(sync_client=True) as server:
        if num_closed := close_task_runs(server, runtime.flow_run.id):
            get_run_logger().info("%d task runs of killed attempts set to Crashed", num_closed)


class Interruption:
    """The interruption of a run, if there is one: its stages end in the same state as the run."""

    def __init__(self) -> None:
        self._begun, self._known = threading.Event(), threading.Event()
        self._state = "Crashed"

    def stop(self, error: BaseException, tasks: Iterable[PrefectFuture[Any]] = ()) -> str:
        """Stop every stage of this process. Returns the state: Cancelled, Crashed, or Failed for an error of ours."""
        self._begun.set()
        asking = threading.Thread(target=self._ask, args=(error, runtime.flow_run.id), daemon=True)
        asking.start()
        stop_children()
        state = self._answer()
        deadline = time.monotonic() + _REPORT_SECONDS
        for future in tasks:
            future.wait(timeout=max(0.0, deadline - time.monotonic()))
        return state

    def state_of_stage(self, error: Exception) -> State[Any] | None:
        """The state of a stage that the interruption stopped; None where the stage failed by itself."""
        if not self._begun.is_set():
            return None
        made = {"Cancelled": Cancelled, "Crashed": Crashed}.get(self._answer())
        return made and made(message=str(error))

    def _answer(self) -> str:
        self._known.wait(_ANSWER_SECONDS)
        return self._state

    def _ask(self, error: BaseException, flow_run_id: str) -> None:
        with contextlib.suppress(Exception):
            if isinstance(error, Exception):
                self._state = "Failed"
            else:
                # Cancelled, or ended by `smoltulu down`, Ctrl-C or a worker that is gone: only the server knows.
                with get_client(sync_client=True, httpx_settings={"timeout": _ANSWER_SECONDS}) as server:
                    state = server.read_flow_run(UUID(flow_run_id)).state
                if state is not None and state.type in (StateType.CANCELLING, StateType.CANCELLED):
                    self._state = "Cancelled"
        self._known.set()


#: Interruptions of runs that go on in this process, by the run's id. Not in the module of a flow: what a task refers to
#: there is sent with it to other machines, and an event cannot be.
_of_runs: dict[str, Interruption] = {}


def begin_interruptible(flow_run_id: str) -> Interruption:
    """The interruption of a run that begins; its tasks in this process find it by `interruption_of`."""
    made = _of_runs[flow_run_id] = Interruption()
    return made


def end_interruptible(flow_run_id: str) -> None:
    """A run has ended."""
    _of_runs.pop(flow_run_id, None)


def interruption_of(flow_run_id: str) -> Interruption | None:
    """That of a run; None in tasks on other machines and in other processes."""
    return _of_runs.get(flow_run_id)
