"""What `smoltulu launch` prints: Slurm scripts by what bash and sbatch read, Kubernetes manifests by their schema."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from smoltulu.artifacts.checkpoints import newest_checkpoint
from smoltulu.flows.cli.main import app
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.launching import kubernetes, slurm
from smoltulu.flows.launching.jobs import ClusterJob
from smoltulu.flows.launching.render import recipe_text
from smoltulu.flows.launching.settings import LaunchSettings
from smoltulu.flows.local import run_graph
from smoltulu.flows.recipe import load_recipe
from smoltulu.schemas.recipe import Recipe
from smoltulu.tasks.engine.stores import open_store
from tests import ROOT
from tests.small_tiny import SMALL_TINY

#: Options of `sbatch` 22.05 that are rendered, by its man page, and what they take.
SBATCH = {
    "parsable": None,
    "requeue": None,
    "chdir": r"/.*",
    "open-mode": "append|truncate",
    "signal": r"(B:)?(USR1|TERM)@\d+",
    "kill-on-invalid-dep": "yes|no",
    "output": r"/.*/%j\.log",
    "time": r"\d+-\d\d:\d\d:\d\d",
    "partition": ".+",
    "account": ".+",
    "constraint": ".+",
    "job-name": ".+",
    "nodes": "1",
    "ntasks": "1",
    "cpus-per-task": r"[1-9]\d*",
    "gpus-per-node": r"[1-9]\d*",
    "mem": r"[1-9]\d*M",
    "dependency": r"afterok(:\d+)+",
}
JOBS = [
    ClusterJob("rows", 0, 8, None, True, False, ["dataset-sft", "contamination-sft"]),
    ClusterJob("sft", 8, 64, 500.0, True, True, ["sft"], {"rows"}),
    ClusterJob("evaluation-sft", 1, 8, None, False, False, ["evaluation-sft"], {"rows", "sft"}),
]
#: What a shell or YAML would read as something else.
NASTY = ["$(touch pwned)", "`touch pwned`", "a'b", 'a"b', "a\\b", "a b", "%j", "no", "1e3", "~", "null", "é🙂", "-x"]
NASTY += ["#", "{x}", "!"]
NASTY_PATHS = ["/tmp/" + "/".join(NASTY), "/tmp/a\nb", "/tmp/$HOME/x"]


def submitted(folder: Path, script: str) -> list[list[str]]:
    """Arguments of every `sbatch` that a script calls, with a command of that name that writes them down."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    sbatch = bin_folder / "sbatch"
    sbatch.write_text(
        f"#!{sys.executable} -S\nimport json, sys\nfile = open({str(folder / 'calls')!r}, 'a+')\n"
        "file.write(json.dumps(sys.argv[1:]) + '\\n')\nfile.seek(0)\nprintable = f'{len(file.readlines())};cluster'\n"
        "print(printable)\n"
    )
    sbatch.chmod(0o755)
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash"], input=script, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def rendered(into: Path, options: LaunchSettings | None = None, recipe: str = "name: x\n", **changes: Any) -> str:
    given = {"name": "small", "folder": str(into / "launch"), "project": str(into), "python": sys.executable}
    return slurm.render(JOBS, options or LaunchSettings(), recipe=recipe, **(given | changes))


def options_of(call: list[str]) -> tuple[dict[str, str | None], list[str]]:
    options: dict[str, str | None] = {}
    while call and call[0].startswith("--"):
        name, equals, value = call[0][2:].partition("=")
        options[name] = value if equals else None
        call = call[1:]
    return options, call


def test_launch_slurm_submits_every_job_with_its_resources_after_those_it_waits_for(tmp_path: Path) -> None:
    told = LaunchSettings(hours=30.5, partition="gpu", account="me", options=("--constraint=h100",))
    calls = submitted(tmp_path, rendered(tmp_path, told, notes=("one\nsentence",)))
    found = [options_of(call) for call in calls]
    for options, _ in found:
        for name, value in options.items():
            assert name in SBATCH, f"sbatch has no option --{name}"
            pattern = SBATCH[name]
            assert value is None if pattern is None else value is not None and re.fullmatch(pattern, value)
    rows, sft, evaluation = found
    folder = str(tmp_path / "launch")
    assert rows[1] == [f"{folder}/job.sh", "dataset-sft", "contamination-sft"] and "gpus-per-node" not in rows[0]
    assert (sft[0]["gpus-per-node"], sft[0]["cpus-per-task"], sft[0]["mem"]) == ("8", "64", "476837M")
    assert sft[0]["dependency"] == "afterok:1" and evaluation[0]["dependency"] == "afterok:1:2"
    assert (sft[0]["time"], sft[0]["signal"], sft[0]["partition"]) == ("1-06:30:00", "B:USR1@300", "gpu")
    assert sft[0]["constraint"] == "h100" and sft[0]["job-name"] == "small-sft"
    assert (tmp_path / "launch" / "recipe.yaml").read_text() == "name: x\n"
    assert subprocess.run(["bash", "-n", f"{folder}/job.sh"], check=False).returncode == 0


@pytest.mark.parametrize("path", NASTY_PATHS)
def test_launch_slurm_quotes_names_that_a_shell_would_read_otherwise(path: str, tmp_path: Path) -> None:
    recipe = yaml.safe_dump({"name": "x", "texts": [*NASTY, "END_OF", "$(touch pwned)\nEND\n"]}, allow_unicode=True)
    folder = str(tmp_path) + path.removeprefix("/tmp")
    script = rendered(tmp_path, LaunchSettings(partition=path), recipe, folder=folder, project=path, python=path)
    for call in submitted(tmp_path, script):
        options, words = options_of(call)
        assert options["partition"] == path and options["chdir"] == path and words[0] == f"{folder}/job.sh"
        assert options["output"] == folder.replace("%", "%%") + "/%j.log"
    assert (Path(folder) / "recipe.yaml").read_text() == recipe
    job = (Path(folder) / "job.sh").read_text()
    assert f"cd {shlex.quote(path)} || exit 1" in job and not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("hours", "time_limit"), [(1 / 120, "0-00:01:00"), (1, "0-01:00:00"), (24.01, "1-00:01:00"), (100, "4-04:00:00")]
)
def test_launch_slurm_time_by_hand(hours: float, time_limit: str) -> None:
    assert slurm.slurm_time(hours) == time_limit


@pytest.mark.parametrize("option", ["constraint=h100", "-C h100", "--", "--a\nb", ""])
def test_launch_slurm_refuses_what_is_no_option(option: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a long option of sbatch"):
        rendered(tmp_path, LaunchSettings(options=(option,)))


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--time=00:10:00", "--hours sets it, and is held against the time between two checkpoints"),
        ("--tim=00:10:00", "--hours sets it"),  # sbatch takes that for --time
        ("--signal=USR2@10", "writes its checkpoint and is queued again"),
        ("--no-requeue", "queued again"),
        ("--array=0-3", "every job is one run of its stages"),
        ("--mem=1G", "compute.host_memory_gb"),
    ],
)
def test_launch_slurm_refuses_options_that_the_jobs_need_as_they_are(option: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        rendered(tmp_path, LaunchSettings(options=(option,)))


def test_launch_slurm_passes_other_options_on(tmp_path: Path) -> None:
    others = ("--time-min=1", "--mem-bind=local", "--nodelist=a", "--qos=high", "--exclusive", "--gres=gpu:h100:1")
    assert all(option in rendered(tmp_path, LaunchSettings(options=others)) for option in others)


# ------------------------------------------------------------------------------------------------ preemption, for real

JOB_ID = "42"


def _small_recipe(folder: Path) -> Recipe:
    """A world in which SFT takes long enough to be stopped in it."""
    return load_recipe(
        "tiny",
        {
            **{field: value for field, value in SMALL_TINY.items() if not field.startswith(("dpo.", "rlvr."))},
            **dict.fromkeys(("reward_model", "dpo", "rlvr", "pass_rates", "publish", "verifier_audit", "evaluation")),
            "contamination": None,
            "data.verified_eval": None,
            "data.preference_eval": None,
            "compute": {"store": str(folder / "store"), "device": "cpu", "num_threads": 1, "save_steps": 100_000,
                        "logging_steps": 1, "min_free_disk_gb": 0},
            "sft.max_steps": 40,
        },
    )  # fmt: skip


class BatchJob:
    """The batch script as Slurm runs it, with a `scontrol` that writes down what it is asked for."""

    def __init__(self, folder: Path, recipe: str) -> None:
        self.folder = folder
        submitted(folder, slurm.render(
            [ClusterJob("sft", 0, 1, None, False, True, ["sft"])], LaunchSettings(grace_seconds=60), name="small",
            recipe=recipe, folder=str(folder / "launch"), project=str(ROOT), python=sys.executable,
        ))  # fmt: skip
        scontrol = folder / "bin" / "scontrol"
        scontrol.write_text(f'#!/bin/sh\necho "$@" >>{folder}/scontrol\n')
        scontrol.chmod(0o755)

    def start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": JOB_ID,
                                    "PYTHONPATH": f"{ROOT}/src:{ROOT}"}  # fmt: skip
        log = (self.folder / "log").open("ab")
        command = ["bash", str(self.folder / "launch" / "job.sh"), "sft"]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    @property
    def asked(self) -> list[str]:
        file = self.folder / "scontrol"
        return file.read_text().splitlines() if file.exists() else []

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def work(self) -> Path | None:
        return next(iter((self.folder / "store" / "sft").glob("*/work")), None)

    def until_it_trains(self, process: subprocess.Popen[bytes], num_steps: int) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            work = self.work()
            history = work / "logs" / "history.jsonl" if work else None
            if history is not None and history.exists() and len(history.read_text().splitlines()) > num_steps:
                return
            time.sleep(0.1)
        raise AssertionError(self.log[-3000:])


def test_launch_job_whose_stage_ends_while_the_signal_is_passed_on_is_queued_again(tmp_path: Path) -> None:
    runner = tmp_path / "runner"
    runner.write_text("#!/usr/bin/env bash\ntrap 'exit 143' TERM\ntouch ready\nwhile :; do sleep 0.01; done\n")
    runner.chmod(0o755)
    submitted(tmp_path, rendered(tmp_path, python=str(runner)))
    (tmp_path / "bin" / "scontrol").write_text('#!/bin/sh\necho "$@" >asked\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    # A shell that is put aside just after it has passed the signal on.
    (tmp_path / "slow").write_text('kill() { builtin kill "$@"; local status=$?; sleep 0.5; return $status; }\n')
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": JOB_ID,
                                "BASH_ENV": str(tmp_path / "slow")}  # fmt: skip
    process = subprocess.Popen(["bash", str(tmp_path / "launch" / "job.sh"), "sft"], env=environment)
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0 and (tmp_path / "asked").read_text() == f"requeue {JOB_ID}\n"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> BatchJob:
    """A job whose SFT was stopped by Slurm's signal."""
    folder = tmp_path_factory.mktemp("preempted")
    recipe = _small_recipe(folder)
    here = recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"launcher": "inline"})})
    run_graph(Graph(here), open_store(here.compute), logging.getLogger("test"), ["preflight-sft"])
    job = BatchJob(folder, recipe_text(recipe, folder / "store", {}))
    process = job.start()
    job.until_it_trains(process, 5)
    process.send_signal(signal.SIGUSR1)  # B: the batch shell alone
    assert process.wait(60) == 0, job.log[-3000:]
    return job


@pytest.mark.slow
def test_launch_preempted_job_writes_its_checkpoint_and_is_queued_again(stopped: BatchJob) -> None:
    assert stopped.asked == [f"requeue {JOB_ID}"]
    work = stopped.work()
    assert work is not None
    newest = newest_checkpoint(work / "checkpoints", full=True)
    assert newest is not None and newest[0] > 5, "no checkpoint was due by save_steps"
    assert "sft: was stopped. Run again to go on from its last checkpoint" in stopped.log


@pytest.mark.slow
def test_launch_job_goes_on_from_there_and_a_cancelled_one_is_not_queued(stopped: BatchJob) -> None:
    before = stopped.asked
    process = stopped.start()
    deadline = time.monotonic() + 60
    while "resumes at step" not in stopped.log and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # scancel
    assert process.wait(60) == 143 and stopped.asked == before
    assert stopped.start().wait(200) == 0, stopped.log[-3000:]
    assert stopped.asked == before and list((stopped.folder / "store" / "sft").glob("*/gen-0001/manifest.json"))


# -------------------------------------------------------------------------------------------------------- Kubernetes

SCHEMA = json.loads((Path(__file__).parent / "job_schema.json").read_text())
VALID = jsonschema.Draft202012Validator(SCHEMA)
POD = LaunchSettings(image="registry.example.org/smoltulu:1", claim="rows", hours=2, grace_seconds=120)


def test_launch_kubernetes_manifests_are_valid_and_say_what_each_stage_needs() -> None:
    text = kubernetes.render(JOBS, POD, name="small", recipe="name: x\n", notes=("a\nnote",))
    config, rows, sft, evaluation = made = list(yaml.safe_load_all(text))
    for manifest in made:
        VALID.validate(manifest)
    assert config["data"] == {"recipe.yaml": "name: x\n"}
    assert [one["spec"]["suspend"] for one in (rows, sft, evaluation)] == [False, True, True]
    pod = sft["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "memory": "500000000000"}
    assert container["resources"]["requests"]["cpu"] == "64"
    assert "nvidia.com/gpu" not in json.dumps(rows)
    assert container["args"][-2:] == ["--nodes", "sft"] and pod["activeDeadlineSeconds"] == 7200
    assert pod["terminationGracePeriodSeconds"] == 120 and container["args"][1] == "105"
    ignored = sft["spec"]["podFailurePolicy"]["rules"]
    assert ignored[0]["onPodConditions"][0]["type"] == "DisruptionTarget" and ignored[1]["onExitCodes"]["values"] == [
        143
    ]
    names = [one["metadata"]["name"] for one in made]
    head = [line for line in text.splitlines() if line.startswith("#   kubectl")]
    assert len(head) == 2 and f"job/{names[1]} job/{names[2]} && kubectl patch job/{names[3]}" in head[1]


def test_launch_kubernetes_schema_would_see_a_misspelt_field() -> None:
    (_, job) = list(yaml.safe_load_all(kubernetes.render(JOBS[:1], POD, name="small", recipe="name: x\n")))
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    assert not VALID.is_valid(job)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=120), st.text(min_size=1, max_size=120), st.text(max_size=8))
def test_launch_kubernetes_takes_any_name(recipe: str, node: str, digest: str) -> None:
    name = kubernetes.object_name(recipe, node, digest)
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 63


def test_launch_kubernetes_names_tell_nodes_and_recipes_apart() -> None:
    same = [("r", "a_b", "1"), ("r", "a-b", "1"), ("r", "a-b", "2"), ("r" * 99, "a", "1"), ("r" * 99, "b", "1")]
    assert len({kubernetes.object_name(*one) for one in same}) == len(same)


@pytest.mark.parametrize("word", NASTY)
def test_launch_kubernetes_keeps_words_that_yaml_would_read_otherwise(word: str) -> None:
    recipe = yaml.safe_dump({"name": word}, allow_unicode=True)
    jobs = [ClusterJob("sft", 1, 8, None, True, True, [word])]
    options = LaunchSettings(image=word.replace(" ", "") + ":1", claim="c")
    config, job = yaml.safe_load_all(kubernetes.render(jobs, options, name=word, recipe=recipe))
    assert yaml.safe_load(config["data"]["recipe.yaml"]) == {"name": word}
    assert job["spec"]["template"]["spec"]["containers"][0]["args"][-1] == word
    VALID.validate(config)
    VALID.validate(job)


@pytest.mark.parametrize(
    ("changes", "store", "remote", "paths", "told"),
    [
        ({"image": None}, "/smoltulu/store", None, [], "--image: name the container image"),
        ({"claim": None}, "/smoltulu/store", None, [], r"pods share nothing: name a volume claim .*compute\.remote"),
        ({}, "/home/me/store", None, [], "/home/me/store, which is not below /smoltulu"),
        ({}, "/smoltulu/../etc", None, [], "not below /smoltulu"),
        ({}, "/smoltuluX/store", None, [], "not below /smoltulu"),
        ({"mount": "/"}, "/store", None, [], "an absolute path other than /"),
        ({"mount": "data"}, "/store", None, [], "an absolute path"),
        ({}, "/smoltulu/store", None, ["/home/me/rows.jsonl"], r"/home/me/rows\.jsonl is on this machine"),
        ({}, "/smoltulu/store", None, ["rows.jsonl"], "on this machine"),
        ({}, "/smoltulu/store", None, ["/smoltulu/rows.jsonl"], None),
        ({"claim": None}, "artifacts/store", "s3://bucket/store", [], None),
    ],
)
def test_launch_kubernetes_refuses_what_pods_could_not_share(
    changes: dict[str, Any], store: str, remote: str | None, paths: list[str], told: str | None
) -> None:
    options = POD.model_copy(update=changes)
    if told is None:
        kubernetes.check(options, store, remote, paths)
    else:
        with pytest.raises(ValueError, match=told):
            kubernetes.check(options, store, remote, paths)


def test_launch_kubernetes_refuses_a_recipe_too_large_for_a_config_map() -> None:
    with pytest.raises(ValueError, match=r"the recipe has 1,000,001 bytes, and a ConfigMap holds 1,000,000"):
        kubernetes.manifests(JOBS, POD, "small", "x" * 1_000_001)


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("SMOLTULU_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("SMOLTULU_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["launch", *arguments])


def test_launch_command_prints_a_script_and_writes_nothing(command: Any, tmp_path: Path) -> None:
    done = command("tiny", "--print", "slurm", "--until", "sft", "--hours", "2")
    assert done.exit_code == 0 and done.stdout.startswith("#!/usr/bin/env bash\n# Recipe tiny as 4 Slurm jobs"), done
    assert "not known for sft" in done.stderr and not list(tmp_path.iterdir())
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0
    # Not beside the store: that may be on a disk of this machine alone, with a shared one behind it.
    assert f"folder={tmp_path}/home/launch/tiny-" in done.stdout


EIGHT = ["-o", "compute.device=cuda", "-o", "compute.num_processes=8"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tiny", "--print", "pbs"], "--print pbs: jobs are printed for slurm or kubernetes"),
        (["tyni", "--print", "slurm"], "no recipe is called 'tyni'"),
        (["tiny", "--print", "slurm", "--until", "sfft"], "no stage is called 'sfft'"),
        (["tiny", "--print", "slurm", "--hours", "0.05"], "--hours 0.05 is 3 min 00 s"),
        (["tiny", "--print", "slurm", "--image", "i", "--claim", "c"], "--image, --claim: of Kubernetes, and jobs are"),
        (["tiny", "--print", "kubernetes", "--partition", "p"], "--partition: of Slurm"),
        (["tiny", "--print", "kubernetes"], "--image: name the container image"),
        (["tiny", "--print", "slurm", *EIGHT, "--devices-per-node", "4"], "sft runs on 8 GPUs"),
        (["tiny", "--print", "slurm", "--grace-seconds", "1"], "grace_seconds"),
    ],
)
def test_launch_command_refuses_by_one_message(arguments: list[str], told: str, command: Any) -> None:
    done = command(*arguments)
    assert done.exit_code == 1 and told in done.stderr and "Traceback" not in done.stderr and not done.stdout, done
