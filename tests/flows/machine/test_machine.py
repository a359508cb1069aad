"""`smoltulu up`, `run`, `doctor` and `down` against a real Prefect server, in a home of their own on a free port."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import httpx
import psutil
import pytest
from prefect.workers import base

from smoltulu.flows.machine import doctor, machine, places, prefect_api, processes, worker
from smoltulu.flows.machine.worker import patient

PROBE = """
import sys, subprocess
from prefect import flow, get_run_logger
from smoltulu.flows.logs import shield_run_logs

@flow(name="probe", persist_result=False)
def probe(what: str = "finish"):
    shield_run_logs()
    get_run_logger().info("in [brackets] and [/tmp/x]")
    if what == "fail":
        raise ValueError("no such [/recipe]")
    if what == "sleep":
        subprocess.run([sys.executable, "-c", "import time; time.sleep(300)"])
"""
PROBE_YAML = """
name: probe
deployments:
  - {name: one, entrypoint: "probe.py:probe", work_pool: {name: smoltulu}}
  - {name: unserved, entrypoint: "probe.py:probe", work_pool: {name: unserved}}
"""


def _environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {**kept, "SMOLTULU_HOME": str(home), "HF_HUB_OFFLINE": "1", **more}


def _cli(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "smoltulu.flows.cli.main", *arguments],
        cwd=machine.PROJECT,
        env=_environment(home, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


def _until(true: Callable[[], object], seconds: float, step: float = 0.5) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(step)
    return True


def _clean(home: Path) -> None:
    """Whatever a failed test left behind."""
    left = processes.processes_with(machine.MARK, str(home))
    processes.send(left, signal.SIGKILL)
    processes.wait_gone(left, 10)


@dataclass(frozen=True)
class Box:
    home: Path
    url: str
    first: str

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return _cli(self.home, *arguments)

    def working(self) -> list[psutil.Process]:
        """Processes of flow runs: an engine and what it started."""
        return [p for p in processes.processes_with(machine.MARK, str(self.home)) if processes.flow_run_of(p)]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    home, probe = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("probe")
    port = prefect_api.free_port()
    url = prefect_api.url_of(port)
    try:
        up = _cli(home, "up", "--port", str(port))
        assert up.returncode == 0, up.stdout
        (probe / "probe.py").write_text(PROBE)
        (probe / "prefect.yaml").write_text(PROBE_YAML)
        machine.call_prefect(home, url, "work-pool", "create", "unserved", "--type", "process")
        subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
            cwd=probe,
            env=machine.child_environment(home, url),
            check=True,
            capture_output=True,
            timeout=300,
        )
        yield Box(home, url, up.stdout)
    finally:
        down = _cli(home, "down")
        left = processes.processes_with(machine.MARK, str(home))
        _clean(home)
    assert down.returncode == 0 and not left, (down.stdout, left)
    assert prefect_api.port_is_free(port)


def test_up_registers_what_prefect_yaml_lists_and_prints_what_to_do(box: Box) -> None:
    registered = {name for name, _ in prefect_api.deployments(box.url)}
    assert {"smoltulu/full", "smoltulu/tiny", "smoltulu-eval/nightly"} <= registered
    assert len(doctor.expected_deployments()) == len({name for name in registered if not name.startswith("probe/")})
    assert doctor.pollers(box.home, box.url, prefect_api.POOL)
    # Not the default port, so a plain `prefect` in the checkout needs to be told.
    assert f"export PREFECT_API_URL={box.url}" in box.first
    # The form has every field of a recipe, though no flow that is imported makes its schema.
    with prefect_api.client(box.url) as server:
        form = server.read_deployment_by_name("smoltulu/full").parameter_openapi_schema
    assert form is not None and "DPOSettings" in form["definitions"]


def test_the_nightly_deployment_gets_scheduled_runs(box: Box) -> None:
    """On SQLAlchemy 2.1 the scheduler fails in silence: deployments are there, their runs never come."""
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

    def scheduled() -> list[str]:
        with prefect_api.client(box.url) as server:
            nightly = DeploymentFilter(name=DeploymentFilterName(any_=["nightly"]))
            runs = server.read_flow_runs(deployment_filter=nightly)
        return [run.state_name or "" for run in runs if run.expected_start_time and run.expected_start_time.hour == 3]

    assert _until(lambda: "Scheduled" in scheduled(), 60, 1)


def test_scheduled_runs_that_were_missed_are_cancelled(box: Box) -> None:
    """After a week off, seven nightly evaluations would go before what the user starts."""
    now = datetime.now(UTC)
    machine.call_prefect(box.home, box.url, "deployment", "run", "probe/unserved", "--start-in", "in 1 hour")
    assert prefect_api.cancel_missed(box.url, now) == 0
    # As seen from 36 hours ahead, one or two nights have passed; what a user asked for is left alone.
    assert prefect_api.cancel_missed(box.url, now + timedelta(hours=36)) in (1, 2)
    assert prefect_api.cancel_missed(box.url, now + timedelta(hours=36)) == 0
    with prefect_api.client(box.url) as server:
        states = {run.state_name for run in server.read_flow_runs() if not run.auto_scheduled}
    assert states == {"Scheduled"}


def test_up_never_activates_what_somebody_paused(box: Box) -> None:
    """Of a deployment its schedule, and of another the whole: deploying sets both as the file says."""

    def paused() -> dict[str, tuple[bool, list[bool]]]:
        with prefect_api.client(box.url) as server:
            found = server.read_deployments()
        return {one.name: (one.paused, [not schedule.active for schedule in one.schedules]) for one in found}

    assert paused()["nightly"] == (False, [False])
    with prefect_api.client(box.url) as server:
        named = {one.name: one for one in server.read_deployments()}
        (schedule,) = named["nightly"].schedules
        server._client.patch(
            f"/deployments/{named['nightly'].id}/schedules/{schedule.id}", json={"active": False}
        ).raise_for_status()
        server._client.post(f"/deployments/{named['data'].id}/pause_deployment").raise_for_status()
    before = paused()
    assert before["nightly"] == (False, [True]) and before["data"][0]
    again = box.cli("up")
    assert again.returncode == 0, again.stdout
    assert paused() == before
    with prefect_api.client(box.url) as server:
        server._client.patch(f"/deployments/{named['nightly'].id}/schedules/{schedule.id}", json={"active": True})
    assert box.cli("up").returncode == 0 and paused()["nightly"] == (False, [False])


def test_up_again_changes_nothing(box: Box) -> None:
    before = [machine.running(box.home, name) for name in ("server", "worker")]
    again = box.cli("up")
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("already runs") == 2
    assert [machine.running(box.home, name) for name in ("server", "worker")] == before != [None, None]
    other = box.cli("up", "--port", str(prefect_api.free_port()))
    assert other.returncode == 1 and "smoltulu down" in other.stdout


def test_a_taken_port_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        up = _cli(tmp_path, "up", "--port", str(port))
    assert up.returncode == 1
    assert f"port {port} is taken by process {os.getpid()}" in up.stdout and "--port" in up.stdout
    assert not processes.processes_with(machine.MARK, str(tmp_path))
    assert not (tmp_path / "server.json").exists()


def test_a_server_that_cannot_start_shows_its_log_and_is_taken_down(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    url = f"sqlite+aiosqlite:///{tmp_path}/file/no-folder/prefect.db"
    try:
        up = _cli(tmp_path, "up", "--port", str(prefect_api.free_port()), PREFECT_SERVER_DATABASE_CONNECTION_URL=url)
        assert up.returncode == 1
        assert "server.log" in up.stdout and "unable to open database file" in up.stdout
        assert not processes.processes_with(machine.MARK, str(tmp_path))
    finally:
        _clean(tmp_path)


def test_run_waits_for_the_end_and_shows_the_log(box: Box) -> None:
    done = box.cli("run", "probe/one")
    assert done.returncode == 0, done.stdout
    assert "in [\u200bbrackets] and [\u200b/tmp/x]" in done.stdout
    failed = box.cli("run", "probe/one", "-p", "what=fail")
    assert failed.returncode == 1
    assert "no such [\u200b/recipe]" in failed.stdout and "finished in state 'Failed'" in failed.stdout


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('recipe={"extends": "tiny", "dpo": {"beta": -1}}', "dpo.beta: Input should be greater than 0; given: -1"),
        ("until=rlhf", "until: no stage is called 'rlhf'"),
    ],
)
def test_a_wrong_recipe_is_one_message_without_traceback(box: Box, given: str, message: str) -> None:
    done = box.cli("run", "smoltulu/tiny", "-p", given)
    assert done.returncode == 1
    assert done.stdout.count(message) == 1 and "Traceback" not in done.stdout, done.stdout
    assert len(done.stdout.splitlines()) < 45, done.stdout


def test_run_says_what_is_missing(box: Box, tmp_path: Path) -> None:
    typo = box.cli("run", "smoltulu/ful")
    assert typo.returncode == 1 and "did you mean 'smoltulu/full'?" in typo.stdout
    unserved = box.cli("run", "probe/unserved")
    assert unserved.returncode == 1 and "no worker polls the pool unserved" in unserved.stdout
    nobody = prefect_api.url_of(prefect_api.free_port())
    no_server = _cli(tmp_path, "run", "smoltulu/full", PREFECT_API_URL=nobody)
    assert no_server.returncode == 1 and f"no Prefect server answers at {nobody}" in no_server.stdout


def test_plain_prefect_in_the_checkout_fails_without_a_server(tmp_path: Path) -> None:
    """prefect.toml names the server, so Prefect does not start one of its own in which no worker waits. Its message is
    a traceback; the clear one is that of `smoltulu run`."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "deployment", "run", "smoltulu/full", "--watch"],
        cwd=machine.PROJECT,
        env=_environment(
            tmp_path, PREFECT_HOME=str(tmp_path), PREFECT_API_URL=prefect_api.url_of(prefect_api.free_port())
        ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "All connection attempts failed" in done.stdout + done.stderr


def test_a_power_cut_is_diagnosed_and_fixed(box: Box) -> None:
    def state() -> str:
        with prefect_api.client(box.url) as server:
            return str(server.read_flow_run(UUID(run)).state_name)

    machine.call_prefect(box.home, box.url, "deployment", "run", "probe/one", "-p", "what=sleep")
    assert _until(lambda: len(box.working()) == 2, 300)
    run = processes.flow_run_of(box.working()[0])
    assert state() == "Running"
    with prefect_api.client(box.url) as server:
        assert doctor.stuck_runs(server) == []

    worker = machine.running(box.home, "worker")
    assert worker is not None
    killed = [*worker.processes(), *box.working()]
    processes.send(killed, signal.SIGKILL)
    assert processes.wait_gone(killed, 10) == []

    found = {check.name: check for check in doctor.examine_prefect(box.home, box.url, fix=False)}
    assert found["worker"].status == "fail" and "no worker polls the pool smoltulu" in found["worker"].detail
    assert found["stuck runs"].status == "warn" and run in found["stuck runs"].detail
    assert found["deployments"].status == "ok"
    refused = box.cli("run", "probe/one")
    assert refused.returncode == 1 and "run `smoltulu up`" in refused.stdout

    assert state() == "Running"
    examined = box.cli("doctor", "--fix")
    assert examined.returncode == 1, examined.stdout  # the worker is still missing
    assert state() == "Crashed"
    up = box.cli("up")
    assert up.returncode == 0 and "polls the pool" in up.stdout, up.stdout


def test_a_worker_asks_on_where_prefects_own_gives_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Prefect's loop ends after 12 polls without an answer. That of `up`'s worker begins anew."""
    num_polls = 0

    async def poll() -> None:
        nonlocal num_polls
        num_polls += 1
        if num_polls == 30:
            raise KeyError("this test ends it")
        raise httpx.ConnectError("refused")

    given = {"workload": poll, "interval": 0.001, "backoff": 4}
    with pytest.raises(RuntimeError, match="error threshold"):
        asyncio.run(base.critical_service_loop(**given))
    assert num_polls == 12
    with pytest.raises(KeyError, match="this test ends it"):
        asyncio.run(patient(base.critical_service_loop)(**given))
    said = capsys.readouterr().out.rpartition("`smoltulu up` starts a new one")[0].splitlines()
    assert num_polls == 30 and "httpx.ConnectError: refused" in said
    # Where the folder of its `up` is gone, nobody waits for it.
    monkeypatch.setenv(machine.MARK, str(tmp_path / "gone"))
    num_polls = 0
    with pytest.raises(RuntimeError, match="error threshold"):
        asyncio.run(patient(base.critical_service_loop)(**given))


def test_the_patient_loop_stands_in_for_prefects(monkeypatch: pytest.MonkeyPatch) -> None:
    true_loop, called = base.critical_service_loop, []
    monkeypatch.setattr(base, "critical_service_loop", true_loop)
    monkeypatch.setattr(worker, "app", lambda: called.append(base.critical_service_loop))
    worker.main()
    assert [loop.__wrapped__ for loop in called] == [true_loop]


def test_the_worker_is_the_patient_one(box: Box) -> None:
    running = machine.running(box.home, "worker")
    assert running is not None and "smoltulu.flows.machine.worker" in running.processes()[0].cmdline()


def test_down_stops_runs_which_report_their_end_and_nothing_else(box: Box) -> None:
    """The worker alone, so that the server can be asked afterwards; the fixture takes down the rest."""
    machine.call_prefect(box.home, box.url, "deployment", "run", "probe/one", "-p", "what=sleep")
    assert _until(lambda: len(box.working()) == 2, 300)
    run = processes.flow_run_of(box.working()[0])
    said: list[str] = []
    assert machine.down(box.home, ("worker",), said.append)
    assert any("stopping 1" in line for line in said)
    assert box.working() == [] and machine.running(box.home, "worker") is None
    assert prefect_api.answers(box.url)
    with prefect_api.client(box.url) as server:
        assert server.read_flow_run(UUID(run)).state_name == "Crashed"


def test_records_of_other_processes_are_never_believed(tmp_path: Path) -> None:
    """After a restart of the machine the process id in a record belongs to somebody else."""
    with subprocess.Popen(["sleep", "60"]) as stranger:
        try:
            for name in ("server", "worker"):
                (tmp_path / f"{name}.json").write_text(f'{{"pid": {stranger.pid}, "port": 1}}')
                assert machine.running(tmp_path, name) is None
            assert machine.down(tmp_path, say=lambda text: None) is False
            assert stranger.poll() is None
            assert not list(tmp_path.glob("*.json"))
        finally:
            stranger.kill()


def test_down_finds_orphans_without_any_record(tmp_path: Path) -> None:
    """The worker was killed and its record is gone: what carries the home's mark is ours all the same."""
    ours = {**os.environ, machine.MARK: str(tmp_path)}
    others = {**os.environ, machine.MARK: str(tmp_path / "another")}
    with subprocess.Popen(["sleep", "60"], env=ours) as orphan, subprocess.Popen(["sleep", "60"], env=others) as other:
        try:
            assert _until(lambda: len(processes.processes_with(machine.MARK, str(tmp_path))) == 1, 5, 0.05)
            machine.down(tmp_path, say=lambda text: None)
            assert orphan.wait(5) == -signal.SIGKILL
            assert other.poll() is None
        finally:
            orphan.kill()
            other.kill()


def test_only_one_up_or_down_at_a_time(tmp_path: Path) -> None:
    with machine._alone(tmp_path), pytest.raises(machine.MachineError, match="another `smoltulu up` or `down`"):
        machine.down(tmp_path)


def test_a_record_is_believed_by_mark_and_command(tmp_path: Path) -> None:
    """Also after a recycled id went to another process of the same home, such as a flow run."""
    ours = {**os.environ, machine.MARK: str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "server"], env=ours) as server:
        try:
            for name in ("server", "worker"):
                (tmp_path / f"{name}.json").write_text(f'{{"pid": {server.pid}, "port": 1}}')
            assert machine.running(tmp_path, "server") == machine.Record(server.pid, port=1)
            assert machine.running(tmp_path, "worker") is None
            assert machine.running(tmp_path / "another", "server") is None
        finally:
            server.kill()
    # The record of an older version, which named a start time: such a process is found by its mark, and ended.
    (tmp_path / "server.json").write_text('{"pid": 1, "started": "boot/1", "port": 1}')
    assert machine.running(tmp_path, "server") is None


def test_a_process_that_only_waits_to_be_reaped_is_gone() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        process = psutil.Process(child.pid)
        # Between fork and exec it has none.
        assert processes.alive(process) and _until(lambda: bool(processes.environment_of(process)), 5, 0.02)
        child.kill()
        assert _until(lambda: not processes.alive(process), 5, 0.02) and process.is_running()
        assert processes.environment_of(process) is None and processes.wait_gone([process], 0) == []


def test_a_home_is_the_same_by_whatever_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`down` by another spelling of SMOLTULU_HOME found nothing, and removed the record of a server that ran."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("real", "link", "real/../link"):
        monkeypatch.setenv("SMOLTULU_HOME", str(tmp_path / name))
        assert places.default_home() == tmp_path / "real"


def test_state_of_another_user_or_above_the_home_folder_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "shared" / "a" / "b"
    here.mkdir(parents=True)
    (tmp_path / "shared" / ".smoltulu").mkdir()
    assert places.find_project(here) == tmp_path / "shared"
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    assert places.find_project(here) == here
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path / "shared"))
    assert places.find_project(here) == here
