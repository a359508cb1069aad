"""Starts and stops Prefect's server, the work pool, the deployments and a worker on this machine, in the background.

State is in `.smoltulu/` of the project (or `$SMOLTULU_HOME`): `prefect/` (Prefect's home with its SQLite file),
`logs/`, and one record per background process. Every process that is started here has the path of this folder in its
environment. This mark tells our processes from others that got a recycled process id. By it `down` also finds flow runs
and their children whose worker was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import psutil

from smoltulu.artifacts.files import write_atomically
from smoltulu.flows.machine import prefect_api
from smoltulu.flows.machine.places import PROJECT
from smoltulu.flows.machine.processes import environment_of, flow_run_of, lineage, processes_with, send, wait_gone
from smoltulu.recipes import CHECKOUT, PREFECT_TOML, PREFECT_YAML

MARK = "SMOLTULU_MACHINE"
SERVER_READY_SECONDS = 120  # measured 6 to 8 s on two cores with a new database; slow disks take much longer
WORKER_ONLINE_SECONDS = 60
PORT_SECONDS = 15  # a killed server's threads may hold its port a little longer than its process lives
STOP_SECONDS = 15  # between SIGTERM and SIGKILL

Say = Callable[[str], None]


class MachineError(RuntimeError):
    """A problem with this machine; the text says what to do."""


@dataclass(frozen=True)
class Record:
    """A background process of ours: its id, and its settings at the start."""

    pid: int
    port: int = 0
    name: str = ""
    limit: int = 0

    def processes(self) -> list[psutil.Process]:
        """The process, or an empty list if no process has this id."""
        with contextlib.suppress(psutil.Error):
            return [psutil.Process(self.pid)]
        return []


def read_record(home: Path, name: str) -> Record | None:
    """Record of the `server` or the `worker`, whether it still runs or not."""
    try:
        values = json.loads((home / f"{name}.json").read_text())
        # The previous version also wrote the start time.
        return Record(**{field: values[field] for field in Record.__dataclass_fields__ if field in values})
    except (OSError, ValueError, TypeError):
        return None


def running(home: Path, name: str) -> Record | None:
    """Record of the `server` or the `worker` of this home, if it runs: a live process with our mark and command."""
    record = read_record(home, name)
    with contextlib.suppress(psutil.Error):
        for process in record.processes() if record else []:
            if (environment_of(process) or {}).get(MARK) == str(home) and name in process.cmdline():
                return record
    return None


def prefect_yaml() -> str:
    """The file that `up` deploys. Installed, its entrypoints are modules: the user's folder has no files of ours."""
    text = PREFECT_YAML.read_text()
    if CHECKOUT is None:
        text = re.sub(
            r"entrypoint: (\S+)\.py:", lambda found: f"entrypoint: smoltulu.{found[1].replace('/', '.')}.", text
        )
    return text


def keep_pauses(text: str, pauses: Mapping[tuple[str, str], tuple[bool, set[str]]]) -> str:
    """`prefect.yaml` with the deployments and schedules paused that somebody paused: deploying would activate them."""
    import yaml

    listed = yaml.safe_load(text)
    for deployment in listed["deployments"]:
        function = prefect_api.function_of(deployment["entrypoint"])
        paused, slugs = pauses.get((function, deployment["name"]), (False, set()))
        if paused:
            deployment["paused"] = True
        for schedule in deployment.get("schedules", ()):
            if schedule.get("slug") in slugs:
                schedule["active"] = False
    return yaml.safe_dump(listed, sort_keys=False)


def _settings(table: dict[str, Any], prefix: str = "PREFECT") -> dict[str, str]:
    """Prefect's settings as environment variables: {"worker": {"query_seconds": 3}} is PREFECT_WORKER_QUERY_SECONDS."""
    flat: dict[str, str] = {}
    for name, value in table.items():
        path = f"{prefix}_{name.upper()}"
        flat |= _settings(value, path) if isinstance(value, dict) else {path: str(value)}
    return flat


# --- commands --------------------------------------------------------------------------------------------------------


def child_environment(home: Path, url: str) -> dict[str, str]:
    """Environment of every process that is started here: that of clients, our settings, our mark, our Prefect home."""
    return {
        **_settings(tomllib.loads(PREFECT_TOML.read_text())),
        **prefect_api.client_environment(url),
        MARK: str(home),
        "PREFECT_HOME": str(home / "prefect"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
        # Otherwise `python -m prefect` imports from the working folder: a user's `tasks.py` or `datasets/`.
        "PYTHONSAFEPATH": "1",
    }


def call_prefect(home: Path, url: str, *arguments: str) -> str:
    """Run a Prefect command and return its output. MachineError if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        cwd=PROJECT,
        env=child_environment(home, url) | {"COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise MachineError(f"`prefect {' '.join(arguments)}` failed:\n{last_lines(done.stdout)}")
    return done.stdout


def last_lines(text: str, count: int = 25) -> str:
    """End of a log, indented."""
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines()[-count:])


def log_end(path: Path) -> str:
    """End of a log file."""
    try:
        return last_lines(path.read_text(errors="replace"))
    except OSError:
        return "    (no log)"


# --- up --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """The URL of the API, and which of `server` and `worker` this call started."""

    url: str
    started: tuple[str, ...]


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Allow one `up` or `down` at a time."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MachineError(f"another `smoltulu up` or `down` is at work in {home}; wait for it") from None
        yield


def up(home: Path, port: int | None = None, limit: int | None = None, say: Say = print) -> Machine:
    """Start everything that does not run yet. On any failure, stop what this call started.

    port   port of the server; None: that of the running server, else 4200
    limit  flow runs at a time; None: that of the running worker, else 1 (one GPU takes one training)
    """
    with _alone(home):
        started: list[str] = []
        try:
            server = running(home, "server")
            if server and port not in (None, server.port):
                raise MachineError(
                    f"the server already runs on port {server.port}, not {port}: "
                    f"leave out --port, or run `smoltulu down` first"
                )
            if server:
                say(f"server    already runs on port {server.port} (process {server.pid})")
            else:
                port = _port_of_what_lives(home, port, say) or prefect_api.DEFAULT_PORT
                started.append("server")
                server = _start_server(home, port, say)
            url = prefect_api.url_of(server.port)

            if prefect_api.online_workers(url) is None:
                call_prefect(home, url, "work-pool", "create", prefect_api.POOL, "--type", "process")
                say(f"pool      {prefect_api.POOL} made")
            say("deploy    registering what prefect.yaml lists ...")
            listed = home / "prefect.yaml"
            listed.write_text(keep_pauses(prefect_yaml(), prefect_api.pauses(url)))
            call_prefect(home, url, "--no-prompt", "deploy", "--all", "--prefect-file", str(listed))
            say(f"deploy    {', '.join(name for name, _ in prefect_api.deployments(url))}")

            worker = running(home, "worker")
            if worker and limit not in (None, worker.limit):
                raise MachineError(
                    f"the worker already runs with limit {worker.limit}, not {limit}: run `smoltulu down` first"
                )
            with prefect_api.client(url) as client:
                prefect_api.close_task_runs(client)
            if worker:
                say(f"worker    already runs (process {worker.pid})")
            else:
                _stop(home, ("worker",), say)
                missed = prefect_api.cancel_missed(url, datetime.now(UTC) - timedelta(minutes=1))
                if missed:
                    say(f"missed    cancelled {missed} scheduled run{'s' if missed > 1 else ''} whose time passed")
                started.append("worker")
                _start_worker(home, url, limit or 1, say)
        except BaseException:
            if started:
                say("taking down what was started ...")
                _stop(home, tuple(started), say)
            raise
    return Machine(url, tuple(started))


def _port_of_what_lives(home: Path, port: int | None, say: Say) -> int | None:
    """The port on which a worker and its runs, whose server is gone, wait for it; else `port`.

    A living training is worth days. It goes on without its server, and reports to the next one on the same port.
    """
    worker = running(home, "worker")
    # Not from the server's record, which goes when a new one does not start.
    environments = [environment_of(process) or {} for process in (worker.processes() if worker else [])]
    known = urlsplit(environments[0].get("PREFECT_API_URL", "")).port if environments else None
    if known is None:
        # Without a worker nobody could see or stop a run.
        _stop(home, ("worker", "server"), say)
        return port
    num_runs = len({flow_run_of(process) for process in processes_with(MARK, str(home))} - {""})
    left = f"its worker and {num_runs} run{'s' if num_runs != 1 else ''}"
    if port not in (None, known):
        raise MachineError(
            f"the server is gone, and {left} wait for one on port {known}, not {port}: leave out --port, or run "
            "`smoltulu down` first"
        )
    say(f"server    is gone; {left} go on with a new one")
    deadline = time.monotonic() + PORT_SECONDS
    while not prefect_api.port_is_free(known) and time.monotonic() < deadline:
        time.sleep(0.2)
    return known


def _start(home: Path, name: str, url: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a command of Prefect in the background, in a session of its own so that Ctrl-C here does not reach it."""
    logs = home / "logs"
    logs.mkdir(exist_ok=True)
    path = logs / f"{name}.log"
    if path.exists():
        path.replace(logs / f"{name}.previous.log")
    with path.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=PROJECT,
            env=child_environment(home, url),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _start_server(home: Path, port: int, say: Say) -> Record:
    if not prefect_api.port_is_free(port):
        raise MachineError(
            f"port {port} is taken by {prefect_api.port_holder(port)}: stop it, or choose another port with "
            "`smoltulu up --port N`"
        )
    url, log = prefect_api.url_of(port), home / "logs" / "server.log"
    child = _start(home, "server", url, "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    record = Record(child.pid, port=port)
    write_atomically(home / "server.json", json.dumps(asdict(record)))
    say(f"server    starting on port {port} (process {child.pid}; a new database takes some seconds) ...")
    seconds = _wait("server", child, log, SERVER_READY_SECONDS, lambda: prefect_api.answers(url), say)
    if child.poll() is not None:
        raise MachineError(f"port {port} was taken while the server started; end of {log}:\n{log_end(log)}")
    say(f"server    ready after {seconds:.1f} s")
    return record


def _start_worker(home: Path, url: str, limit: int, say: Say) -> None:
    name, log = f"{prefect_api.POOL}-{uuid4().hex[:8]}", home / "logs" / "worker.log"
    child = _start(
        home, "worker", url, "smoltulu.flows.machine.worker", "worker", "start",
        "--pool", prefect_api.POOL, "--limit", str(limit), "--name", name,
    )  # fmt: skip
    write_atomically(home / "worker.json", json.dumps(asdict(Record(child.pid, name=name, limit=limit))))
    say(f"worker    starting (process {child.pid}, {limit} run{'s' if limit > 1 else ''} at a time) ...")
    seconds = _wait(
        "worker", child, log, WORKER_ONLINE_SECONDS, lambda: name in (prefect_api.online_workers(url) or []), say
    )
    say(f"worker    polls the pool after {seconds:.1f} s")


def _wait(
    name: str, child: subprocess.Popen[bytes], log: Path, limit: int, ready: Callable[[], bool], say: Say
) -> float:
    """Seconds until the server or the worker was ready. MachineError if it ended, or took longer than `limit`."""
    begin = told = time.monotonic()
    while not ready():
        if child.poll() is not None:
            raise MachineError(f"the {name} ended with code {child.returncode}; end of {log}:\n{log_end(log)}")
        if time.monotonic() - begin > limit:
            raise MachineError(f"the {name} was not ready after {limit} s; end of {log}:\n{log_end(log)}")
        if time.monotonic() > told + 10:
            told = time.monotonic()
            say(f"{name:<10}not ready yet after {told - begin:.0f} s; its log: {log}")
        time.sleep(0.3)
    return time.monotonic() - begin


# --- down ------------------------------------------------------------------------------------------------------------


def down(home: Path, names: tuple[str, ...] = ("worker", "server"), say: Say = print) -> bool:
    """Stop everything that `up` started in this home, and nothing else. Returns whether anything ran."""
    if not home.is_dir():
        return False
    with _alone(home):
        return _stop(home, names, say)


def _stop(home: Path, names: tuple[str, ...], say: Say) -> bool:
    """Stop runs first, so that they can report their end; then the worker, which hangs without its server."""
    anything = False
    server, worker = running(home, "server"), running(home, "worker")
    if "worker" in names:
        engines = [process for process in processes_with(MARK, str(home)) if flow_run_of(process)]
        runs = {flow_run_of(process) for process in engines}
        if runs:
            say(f"runs      stopping {len(runs)}; run again to go on: finished stages are kept, trainings resume")
            pids = {process.pid for process in engines}
            # Only the top process of a run: it ends its stages.
            send([process for process in engines if not pids & (lineage(process) - {process.pid})], signal.SIGTERM)
            wait_gone(engines, STOP_SECONDS)
        if worker:
            say(f"worker    stopping (process {worker.pid})")
            ended = worker.processes()
            send(ended, signal.SIGTERM)
            wait_gone(ended, STOP_SECONDS)
        marked = processes_with(MARK, str(home))
        left = [process for process in marked if server is None or server.pid not in lineage(process)]
        send(left, signal.SIGKILL)
        wait_gone(left, 5)
        if runs and server:
            _close_runs(prefect_api.url_of(server.port), runs)
        (home / "worker.json").unlink(missing_ok=True)
        anything |= bool(worker or engines)
    if "server" in names:
        if server:
            say(f"server    stopping (process {server.pid})")
            ended = server.processes()
            send(ended, signal.SIGTERM)
            send(wait_gone(ended, STOP_SECONDS), signal.SIGKILL)
            wait_gone(ended, 5)
            anything = True
        (home / "server.json").unlink(missing_ok=True)
    return anything


def _close_runs(url: str, runs: set[str]) -> None:
    """Set runs that could not report their end to Crashed; they would stay Running for ever."""
    from prefect.states import Crashed

    with contextlib.suppress(Exception), prefect_api.client(url) as server:
        for run in runs:
            state = server.read_flow_run(UUID(run)).state
            if state is not None and not state.is_final():
                server.set_flow_run_state(UUID(run), Crashed(message="stopped by `smoltulu down`"), force=True)
        prefect_api.close_task_runs(server)
