"""Requests to a Prefect server, and its address and port."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import urllib.request
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import UUID

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

POOL = "smoltulu"
DEFAULT_PORT = 4200
FLOWS = ("smoltulu", "smoltulu-eval", "smoltulu-audit")


def url_of(port: int) -> str:
    """API address of a server of ours, which listens only on this machine."""
    return f"http://127.0.0.1:{port}/api"


def port_is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1 at `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_holder(port: int) -> str:
    """The process that listens on a port, as far as this user may see it."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f"process {connection.pid} ({command[:80]})"
    return "another process"


def answers(url: str, seconds: float = 2.0) -> bool:
    """Whether a Prefect API answers at `url`. No proxy is used: a local server is not behind one."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url.rstrip('/')}/health", timeout=seconds) as response:
            return bool(response.read().strip() == b"true")
    except (OSError, ValueError):
        return False


def client_environment(url: str) -> dict[str, str]:
    """Environment of commands that use a server: its address, no telemetry, no proxy for this machine."""
    local = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1,localhost"]))
    return {**os.environ, "PREFECT_API_URL": url, "DO_NOT_TRACK": "1", "NO_PROXY": local, "no_proxy": local}


def is_local(url: str) -> bool:
    """Whether an address is on this machine."""
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def client(url: str) -> SyncPrefectClient:
    """A client of the server at `url`, with the credentials of Prefect's settings."""
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY

    auth = PREFECT_API_AUTH_STRING.value()
    return SyncPrefectClient(
        api=url,
        api_key=PREFECT_API_KEY.value(),
        auth_string=auth.get_secret_value() if auth else None,
        # A proxy for the internet does not lead to this machine.
        httpx_settings={"trust_env": not is_local(url)},
    )


def online_workers(url: str, pool: str = POOL) -> list[str] | None:
    """Names of the workers that poll a pool; None if the server has no such pool."""
    from prefect.exceptions import ObjectNotFound

    with client(url) as server:
        try:
            server.read_work_pool(pool)
        except ObjectNotFound:
            return None
        workers = server.read_workers_for_work_pool(pool)
    return [worker.name for worker in workers if worker.status and worker.status.value == "ONLINE"]


def deployments(url: str) -> list[tuple[str, str | None]]:
    """Registered deployments, sorted: `flow/deployment` and the work pool."""
    with client(url) as server:
        flows = {flow.id: flow.name for flow in server.read_flows()}
        return sorted((f"{flows[d.flow_id]}/{d.name}", d.work_pool_name) for d in server.read_deployments())


def cancel_missed(url: str, before: datetime) -> int:
    """Cancel scheduled runs that should have begun before a time and did not; returns how many.

    Prefect would run all of them before any run that a user starts now.
    """
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import StateType
    from prefect.states import Cancelled

    late = filters.FlowRunFilter(
        state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        next_scheduled_start_time=filters.FlowRunFilterNextScheduledStartTime(before_=before),
    )
    with client(url) as server:
        missed = [run for run in server.read_flow_runs(flow_run_filter=late) if run.auto_scheduled]
        for run in missed:
            server.set_flow_run_state(run.id, Cancelled(message="its time passed while no worker was up"), force=True)
    return len(missed)


def close_task_runs(server: SyncPrefectClient, flow_run_id: UUID | str | None = None) -> int:
    """Set the unfinished task runs of killed and cancelled runs of ours to that state; returns how many.

    A process that is killed cannot report the end of its tasks: they would stay Running or Pending for ever.

    flow_run_id  a run that begins another attempt: those that it has are of an earlier one
    """
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import StateType
    from prefect.states import Cancelled, Crashed

    def of_type(one: str, *types: StateType) -> Any:
        kind, of = getattr(filters, f"{one}FilterState"), getattr(filters, f"{one}FilterStateType")
        return getattr(filters, f"{one}Filter")(state=kind(type=of(any_=list(types))))

    going = of_type("TaskRun", StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED)
    ours = filters.FlowFilter(name=filters.FlowFilterName(any_=list(FLOWS)))
    left = []
    # Completed and failed runs report their tasks themselves, a little later than their own end.
    for kind, made in ((StateType.CRASHED, Crashed), (StateType.CANCELLED, Cancelled)):
        ended = of_type("FlowRun", kind)
        left += [
            (run, made) for run in server.read_task_runs(flow_filter=ours, flow_run_filter=ended, task_run_filter=going)
        ]
    if flow_run_id is not None:
        this = filters.FlowRunFilter(id=filters.FlowRunFilterId(any_=[UUID(str(flow_run_id))]))
        left += [(run, Crashed) for run in server.read_task_runs(flow_run_filter=this, task_run_filter=going)]
    for run, made in left:
        server.set_task_run_state(run.id, made(message="its process was killed"), force=True)
    return len(left)


def function_of(entrypoint: str) -> str:
    """The flow's function. A checkout names it by its file, an installed package by its module: one deployment."""
    return re.split(r"[:.]", entrypoint)[-1]


def pauses(url: str) -> dict[tuple[str, str], tuple[bool, set[str]]]:
    """(function, name) -> whether somebody paused a registered deployment, and slugs of its paused schedules."""
    with client(url) as server:
        return {
            (function_of(deployment.entrypoint or ""), deployment.name): (
                deployment.paused,
                {schedule.slug or "" for schedule in deployment.schedules if not schedule.active},
            )
            for deployment in server.read_deployments()
        }
