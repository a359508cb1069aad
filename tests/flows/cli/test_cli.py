"""The command line: quick to start, clear about bad input. What needs a server is in test_machine.py."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.errors import MarkupError
from typer.testing import CliRunner

from smoltulu.flows.cli import demo
from smoltulu.flows.cli.main import app
from smoltulu.flows.cli.output import console
from smoltulu.flows.cli.plan import plan_arguments
from smoltulu.flows.logs import PlainFormatter, _once, shield
from smoltulu.flows.machine import doctor, machine, places, prefect_api
from smoltulu.flows.recipe import parse_overrides
from smoltulu.schemas.run import RunScore, RunSummary, StageRun
from tests import ROOT

HEAVY = {"torch", "transformers", "trl", "datasets", "lm_eval", "prefect"}


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=machine.PROJECT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _imported(*arguments: str) -> set[str]:
    """Top-level packages that a Python command imports."""
    done = _python("-X", "importtime", *arguments)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def test_help_and_plan_import_nothing_heavy() -> None:
    assert {"smoltulu", "typer"} <= _imported("-m", "smoltulu.flows.cli.main", "--help")
    assert not HEAVY & _imported("-m", "smoltulu.flows.cli.main", "--help")
    assert not HEAVY & _imported("-m", "smoltulu.flows.cli.main", "plan", "tiny")
    assert not HEAVY & _imported("-c", "import smoltulu.flows")


def test_help_is_quicker_than_importing_prefect() -> None:
    def seconds(*arguments: str) -> float:
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            assert _python(*arguments).returncode == 0
            times.append(time.perf_counter() - begin)
        return min(times)

    assert seconds("-m", "smoltulu.flows.cli.main", "--help") < seconds("-c", "import prefect")


def test_plan_lists_every_stage(tmp_path: Path) -> None:
    done = _python("-m", "smoltulu.flows.cli.main", "plan", "tiny", SMOLTULU_STORE=str(tmp_path), COLUMNS="1000")
    assert done.returncode == 0, done.stderr
    for stage in ("world", "sft", "reward-model", "dpo", "rlvr", "publish"):
        assert f" {stage} " in done.stdout
    assert str(tmp_path) in done.stdout and "never made" in done.stdout


def test_plan_of_a_file_says_how_to_run_its_preflight(tmp_path: Path) -> None:
    """The recipe's name means nothing to a deployment where the recipe is a file."""
    (tmp_path / "my recipe.yaml").write_text("extends: tiny\nname: mine\n")
    given = [str(tmp_path / "my recipe.yaml"), "-o", "dpo.learning_rate=5e-7"]
    done = _python("-m", "smoltulu.flows.cli.main", "plan", *given, SMOLTULU_STORE=str(tmp_path), COLUMNS="1000")
    assert (
        f"-p 'recipe={tmp_path}/my recipe.yaml' -p 'overrides={{\"dpo.learning_rate\": 5e-07}}' -p until=preflight`"
        in done.stdout
    ), done.stdout + done.stderr


def test_hints_of_a_plan_are_commands_that_can_be_copied(tmp_path: Path) -> None:
    """In one line however narrow the output is, with the recipe and the overrides as they were given."""
    (tmp_path / "my recipe.yaml").write_text("extends: tiny\nname: mine\n")
    overrides = ["-o", "dpo.learning_rate=5e-7", "-o", f"description={'a long text ' * 20}"]
    command = [sys.executable, "-m", "smoltulu.flows.cli.main", "plan", "my recipe.yaml", *overrides]
    environment = {**os.environ, "SMOLTULU_STORE": str(tmp_path / "store"), "COLUMNS": "80"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("preflight not run yet")]
    words = shlex.split(line.split("`")[1])
    given = dict(words[at + 1].split("=", 1) for at, word in enumerate(words) if word == "-p")
    assert words[:4] == ["prefect", "deployment", "run", "smoltulu/full"]
    assert given["recipe"] == str(tmp_path / "my recipe.yaml") and given["until"] == "preflight"
    assert json.loads(given["overrides"]) == parse_overrides(overrides[1::2])
    # `adopt` is a command of ours, which is called in the same folder.
    assert shlex.split(plan_arguments("my recipe.yaml", overrides[1::2])) == ["my recipe.yaml", *overrides]


def test_init_says_how_to_run_a_file_whose_name_has_a_blank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, ["init", "my recipe.yaml"]).output
    assert "smoltulu plan 'my recipe.yaml'" in said and "-p 'recipe=my recipe.yaml'" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinny"], "did you mean 'tiny'"),
        (["tiny", "-o", "dpo.learnin_rate=1"], "did you mean 'learning_rate'"),
        (["tiny", "-o", "dpo.learning_rate"], "give a dotted field and a value"),
        (["tiny", "--until", "slection"], "until"),
        (["tiny", "--refresh", "sftt"], "did you mean 'sft'"),
        (["no/such/recipe.yaml"], "no/such/recipe.yaml"),
    ],
)
def test_bad_input_gets_one_message(arguments: list[str], message: str) -> None:
    done = _python("-m", "smoltulu.flows.cli.main", "plan", *arguments)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_override_values_are_read_as_numbers_lists_and_texts() -> None:
    given = ["dpo.learning_rate=5e-7", "sft.max_steps=3", "evaluation.sampled=null", "name=a=b", "x=[1, 2]", "y=true"]
    assert parse_overrides(given) == {
        "dpo.learning_rate": 5e-7,
        "sft.max_steps": 3,
        "evaluation.sampled": None,
        "name": "a=b",
        "x": [1, 2],
        "y": True,
    }


def test_down_without_anything_up(tmp_path: Path) -> None:
    done = _python("-m", "smoltulu.flows.cli.main", "down", SMOLTULU_HOME=str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (0, "nothing of ours runs\n")
    assert not (tmp_path / "none").exists()


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_without_a_server(tmp_path: Path) -> None:
    url = prefect_api.url_of(prefect_api.free_port())
    secret = "hf_" + "x" * 34
    begin = time.monotonic()
    done = _python(
        "-m",
        "smoltulu.flows.cli.main",
        "doctor",
        SMOLTULU_HOME=str(tmp_path),
        PREFECT_API_URL=url,
        HF_TOKEN=secret,
        HF_HUB_OFFLINE="1",
    )
    assert time.monotonic() - begin < 45  # about 1.5 s on an idle machine
    assert done.returncode == 1
    assert f"no Prefect server answers at {url}" in done.stdout and "smoltulu up" in done.stdout
    assert "HF_TOKEN is set" in done.stdout and "hf_x" not in done.stdout + done.stderr
    assert "server" in done.stderr
    assert "torch" not in _imported("-c", "from smoltulu.flows.machine import doctor; list(doctor._packages())")


def test_doctor_tries_store_home_and_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file where the store should be was "ok": the disk of its folder has room."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/store", "link"):
        monkeypatch.setenv("SMOLTULU_STORE", str(tmp_path / name))
        found = doctor._disk()
        assert found.status == "fail" and str(tmp_path / name.partition("/")[0]) in found.detail, name
        assert "no folder" in found.detail and "SMOLTULU_STORE" in found.advice
    monkeypatch.setenv("SMOLTULU_STORE", str(tmp_path / "store"))
    assert doctor._disk().status in ("ok", "warn")
    home, cache = doctor._writable(tmp_path / "file" / "home")
    assert (home.name, home.status, cache.name) == ("home", "fail", "cache")
    assert doctor._clock().status == "ok" and next(doctor._writable(tmp_path / "home")).status == "ok"
    assert not (tmp_path / "home").exists() and not (tmp_path / "store").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


@pytest.mark.parametrize(("number", "said"), [(errno.EROFS, "Read-only"), (errno.EACCES, "Permission denied")])
def test_doctor_sees_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    def refuse(**arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    assert said in (doctor._obstacle(tmp_path) or "")


def test_doctor_sees_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of NFS: `flock` fails without a lock server, and excludes nobody with the option local_lock."""

    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(doctor.fcntl, "flock", no_locks)
    assert "No locks available" in (doctor._obstacle(tmp_path) or "")
    monkeypatch.setattr(doctor.fcntl, "flock", lambda *arguments: None)
    assert "keeps no locks (flock)" in (doctor._obstacle(tmp_path) or "")
    monkeypatch.undo()
    assert doctor._obstacle(tmp_path) is None


def test_doctor_compares_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLTULU_STORE", str(tmp_path))
    now = time.time()
    monkeypatch.setattr(doctor.time, "time", lambda: now + 600)
    behind = doctor._clock()
    assert behind.status == "warn" and "600 s behind this machine's" in behind.detail
    assert doctor._cpu().detail.endswith("on another CPU the same recipe gives other scores")


def test_doctor_names_packages_that_are_not_as_required(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["fastapi==0.1", "sqlalchemy[asyncio]>=2.0,<2.1", "no-such-package>1"]
    monkeypatch.setattr(doctor, "requirements", lambda: wanted)
    (check,) = doctor._packages()
    assert check.status == "fail" and "without an error" in check.advice
    assert "fastapi==0.1 is required" in check.detail and "no-such-package>1 is required, it is missing" in check.detail
    assert "sqlalchemy" not in check.detail


def test_doctor_counts_no_worker_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server believes in a killed worker for 90 s."""
    monkeypatch.setattr(prefect_api, "online_workers", lambda url, pool: ["dead", "alive"])
    (tmp_path / "worker.json").write_text('{"pid": 1, "name": "dead"}')
    assert doctor.pollers(tmp_path, "http://127.0.0.1:1/api", "smoltulu") == ["alive"]


def test_doctor_judges_only_runs_with_a_process_of_their_own() -> None:
    from prefect.client.schemas.objects import FlowRun

    gone = subprocess.Popen(["true"])
    gone.wait()
    run = FlowRun.model_construct(infrastructure_pid=None)
    assert not doctor._process_is_gone(run)
    assert doctor._process_is_gone(run.model_copy(update={"infrastructure_pid": str(gone.pid)}))
    assert doctor._process_is_gone(run.model_copy(update={"infrastructure_pid": f"host:{gone.pid}"}))


def test_doctor_says_who_sits_on_the_port() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = doctor.no_server(prefect_api.url_of(port))
    assert f"port {port} is taken by process {os.getpid()}" in said


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_log_lines_survive_prefects_watch() -> None:
    """Without the shield one path in brackets ends `prefect deployment run --watch`: still so in Prefect 3.8.8."""
    from prefect.cli.flow_runs_watching import FlowRunFormatter
    from prefect.client.schemas.objects import Log

    def shown(message: str) -> str:
        out = io.StringIO()
        log = Log(name="x", level=20, message=message, timestamp="2026-01-01T00:00:00Z", flow_run_id=None)
        Console(file=out, width=200).print(FlowRunFormatter().format(log))
        return out.getvalue()

    message = "[sft] in [/tmp/x], [1/20], ['a'], [red]not red[/]"
    with pytest.raises(MarkupError):
        shown(message)
    assert shown(shield(message)).replace("\u200b", "").rstrip().endswith(message)


def _logged(error: Exception, *messages: str) -> list[str]:
    """What Prefect's log shows of messages that all carry one exception."""
    shown: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(handler.format(record))  # type: ignore[method-assign]
    handler.setFormatter(PlainFormatter(shielded=True))
    handler.addFilter(_once)
    logger = logging.Logger("a run")
    logger.addHandler(handler)
    try:
        raise error
    except Exception as caught:
        for message in messages:
            logger.exception(message, caught)
    return shown


def test_what_the_user_has_to_fix_is_logged_once_and_without_a_traceback() -> None:
    prefects = ("Encountered exception during execution: %r", "Engine execution exited with unexpected exception: %s")
    assert _logged(ValueError("recipe x has 2 problems:\n  a\n  b"), *prefects) == [
        "recipe x has 2 problems:\n  a\n  b"
    ]
    retried = "Task run failed with exception: %r - Retry 1/2 will start 10 second(s) from now"
    assert _logged(OSError("no answer"), retried) == ["no answer - Retry 1/2 will start 10 second(s) from now"]
    # What nobody expected keeps its traceback, each time.
    unexpected = _logged(KeyError("x"), *prefects)
    assert len(unexpected) == 2 and all("Traceback" in text for text in unexpected)
    state = "Finished in state Failed('Flow run encountered an exception: ValueError: recipe x')"
    record = logging.makeLogRecord({"msg": state, "args": ()})
    assert PlainFormatter(shielded=True).format(record) == "Finished in state Failed"


def _score(subject: str, value: float, kind: str = "language_model") -> RunScore:
    return RunScore.model_validate(
        {
            "node": f"evaluation-{subject}",
            "kind": kind,
            "subject": subject,
            "task": "arithmetic",
            "metric": "exact_match",
            "value": value,
            "stderr": 0.021,
            "num_samples": 500,
            "harness": "lm-eval 0.4.13",
            "task_version": "1",
            "template_digest": "0" * 64,
        }
    )


def test_the_demo_shows_scores_what_was_cached_and_where_things_lie() -> None:
    summary = RunSummary(
        run_name="tiny-demo",
        recipe="tiny",
        state="Completed",
        started_at="2026-01-01T00:00:00+00:00",
        finished_at="2026-01-01T00:06:00+00:00",
        stages=(
            StageRun(
                node="sft", stage="sft", outcome="Cached", path=f"{machine.PROJECT}/artifacts/store/sft/0123/gen-0001"
            ),
            StageRun(node="dpo", stage="dpo", outcome="Failed", seconds=1.25, error="out of [/memory]"),
        ),
        scores=(_score("base_model", 0.0), _score("sft", 0.5), _score("reward_model", 0.875, "reward_model")),
        published=f"{machine.PROJECT}/artifacts/store/publish/4567/gen-0001/model",
        pushed="stayed local: publish.repository is not set",
        report_path="artifacts/reports/tiny-demo/report.html",
    )
    out = io.StringIO()
    demo.show(summary, console(file=out))
    text = out.getvalue()
    assert "1 of 2 stages cached" in text
    assert "0.000 ± 0.021" in text and "0.500 ± 0.021" in text and "0.875 ± 0.021" in text
    assert " artifacts/store/sft/0123/gen-0001 " in text and "out of [/memory]" in text
    assert "model     artifacts/store/publish/4567/gen-0001/model" in text
    assert "stayed local" in text and "report    artifacts/reports/tiny-demo/report.html" in text


def test_errors_of_the_machine_end_with_code_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SMOLTULU_HOME", str(tmp_path))
    with machine._alone(tmp_path):
        result = CliRunner().invoke(app, ["up"])
    assert result.exit_code == 1
    assert f"another `smoltulu up` or `down` is at work in {tmp_path}" in result.output


def test_state_of_an_installed_package_lies_where_it_was_brought_up(tmp_path: Path) -> None:
    """Called from a folder below, the same server and store are found; elsewhere it begins anew."""
    below = tmp_path / "mine" / "experiments"
    below.mkdir(parents=True)
    assert places.find_project(below) == below
    (tmp_path / "mine" / ".smoltulu").mkdir()
    assert places.find_project(below) == places.find_project(tmp_path / "mine") == tmp_path / "mine"
    assert places.find_project(tmp_path) == tmp_path
    assert places.PROJECT == ROOT and places.store_root().is_relative_to(ROOT)


@pytest.mark.parametrize(
    ("given", "handed"),
    [
        (["-p", "recipe=mine.yaml"], ["-p", "recipe={here}/mine.yaml"]),
        (["--param=recipe=x/y"], ["--param=recipe={here}/x/y"]),
        (["-p", "recipe=tiny"], ["-p", "recipe=tiny"]),
        (["-p", "ladder=my.yaml"], ["-p", "ladder={here}/my.yaml"]),
        (["-p", "sweep=surface-tiny"], ["-p", "sweep=surface-tiny"]),
        (["-p", 'overrides={"a": "recipe=b/c"}'], ["-p", 'overrides={"a": "recipe=b/c"}']),
    ],
)
def test_run_hands_prefect_the_whole_path_of_a_recipe(
    given: list[str], handed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The flow runs in another folder than the one in which the command is called."""
    called: list[list[str]] = []
    monkeypatch.setattr(doctor, "reachable", lambda url: True)
    monkeypatch.setattr(doctor, "pollers", lambda home, url, pool: ["one"])
    monkeypatch.setattr(prefect_api, "deployments", lambda url: [("smoltulu/full", "smoltulu")])
    monkeypatch.setattr(os, "execve", lambda program, command, environment: called.append(command))
    monkeypatch.chdir(tmp_path)
    outcome = CliRunner().invoke(app, ["run", "smoltulu/full", *given])
    assert outcome.exit_code == 0, outcome.output
    assert called[0][-len(given) :] == [word.replace("{here}", str(tmp_path)) for word in handed]


def test_doctor_says_what_kernels_are_compiled_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton fails with a bare RuntimeError in the first training step where there is no compiler."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'A card, 80 GiB, 79 GiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    found = doctor._gpu()
    assert (found.status, found.detail) == ("warn", "A card, 80 GiB, 79 GiB free; no C compiler (gcc or clang)")
    monkeypatch.setenv("CC", "a-compiler")
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h (python3-dev)" in doctor._gpu().detail
    (tmp_path / "Python.h").touch()
    assert doctor._gpu() == doctor.Check("GPU", "ok", "A card, 80 GiB, 79 GiB free")
    tool.write_text("#!/bin/sh\necho 'A card, 80 GiB, 79 GiB'; echo 'Another, 80 GiB, 79 GiB'\n")
    assert "GPUs of one kind only" in doctor._gpu().advice


def test_doctor_says_what_other_users_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not below tmp_path, which pytest closes.
    with tempfile.TemporaryDirectory() as name:
        above = Path(name)
        above.chmod(0o711)
        monkeypatch.setattr(doctor, "store_root", lambda: above / "store")
        assert [(check.name, check.status) for check in doctor._folders(above / "home")] == [("access", "ok")]
        (above / "store").mkdir(mode=0o755)
        (above / "home").mkdir()
        (above / "home").chmod(0o777)
        found = {check.name: check for check in doctor._folders(above / "home")}
        assert found["store access"].status == "warn" and found["store access"].advice == f"chmod o-rwx {above}/store"
        assert found["state access"].status == "fail" and "can be written by every user" in found["state access"].detail
        assert found.keys() == {"store access", "state access"}
