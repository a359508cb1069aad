"""The pipeline as a user runs it: a real server, a worker, `prefect deployment run`; small sizes, every stage real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from smoltulu.artifacts.checkpoints import newest_checkpoint
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.machine import machine, prefect_api
from smoltulu.flows.recipe import load_recipe
from tests.small_tiny import SMALL_TINY

SMALL: dict[str, Any] = {
    **SMALL_TINY,
    # Seconds sooner a stage. Kills and resumes, here and in the other files, are of processes of their own.
    "compute.launcher": "warm",
    "sft.max_steps": 6,
    "reward_model.max_steps": 3,
    "dpo.max_steps": 3,
    "rlvr.num_episodes": 64,
    "rlvr.effective_batch_size": 32,
    "rlvr.num_minibatches": 1,
    "compute.stages.rlvr.per_device_train_batch_size": 32,
    "evaluation.sampled.num_prompts": 20,
    "evaluation.sampled.num_samples_per_prompt": 2,
    "evaluation.sampled.max_new_tokens": 16,
}


@dataclass(frozen=True)
class Place:
    """A server with a worker, and a store, of this test's own."""

    home: Path
    url: str
    store: Path

    def command(self, deployment: str, parameters: dict[str, Any]) -> list[str]:
        given = [text for name, value in parameters.items() for text in ("-p", f"{name}={json.dumps(value)}")]
        return [sys.executable, "-m", "prefect", "deployment", "run", deployment, "--watch", *given]

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        return kept | {"PREFECT_API_URL": self.url, "PREFECT_HOME": str(self.home / "prefect"), "COLUMNS": "200"}

    def run(self, deployment: str = "smoltulu/tiny", **parameters: Any) -> tuple[int, str]:
        """Exit code and output of `prefect deployment run --watch`."""
        done = subprocess.run(
            self.command(deployment, parameters),
            cwd=machine.PROJECT,
            env=self.environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=1500,
            check=False,
        )
        return done.returncode, done.stdout

    def summary(self) -> dict[str, Any]:
        """summary.json of the newest run."""
        reports = self.store.parent / "reports"
        return json.loads((reports / (reports / "latest").read_text() / "summary.json").read_text())

    def outcomes(self) -> dict[str, str]:
        return {stage["node"]: stage["outcome"] for stage in self.summary()["stages"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("home")
    store = tmp_path_factory.mktemp("artifacts") / "store"
    before = os.environ.get("SMOLTULU_STORE")
    os.environ["SMOLTULU_STORE"] = str(store)  # the worker hands its environment on to the flows
    try:
        port = prefect_api.free_port()
        running = machine.up(home, port)
        yield Place(home, running.url, store)
    finally:
        if before is None:
            del os.environ["SMOLTULU_STORE"]
        else:
            os.environ["SMOLTULU_STORE"] = before
        machine.down(home)


def test_every_stage_runs_then_every_stage_is_cached(place: Place) -> None:
    code, out = place.run(overrides=SMALL)
    assert code == 0, out[-4000:]
    outcomes = place.outcomes()
    assert list(outcomes) == list(Graph(load_recipe("tiny", SMALL)).nodes)
    assert set(outcomes.values()) == {"Completed"}
    assert "sft: step" in out and "stayed local" in out
    summary = place.summary()
    assert {score["subject"] for score in summary["scores"]} == {"base_model", "sft", "reward_model", "dpo", "rlvr"}
    published = Path(summary["published"])
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md"} <= {
        path.name for path in published.iterdir()
    }
    assert Path(summary["report_path"]).read_text(encoding="utf-8").startswith("<!")

    code, out = place.run(overrides=SMALL)
    assert code == 0 and set(place.outcomes().values()) == {"Cached"}
    assert f"{len(outcomes)} of {len(outcomes)} stages cached" in out


def test_machinery_runs_nothing_again_and_a_learning_rate_only_what_depends_on_it(place: Place) -> None:
    code, out = place.run(overrides={**SMALL, "compute.per_device_train_batch_size": 8})
    assert code == 0 and set(place.outcomes().values()) == {"Cached"}, out[-3000:]
    code, out = place.run(overrides={**SMALL, "dpo.learning_rate": 3e-5}, until="dpo")
    assert code == 0, out[-3000:]
    remade = {name for name, outcome in place.outcomes().items() if outcome != "Cached"}
    assert remade == {"dpo", "evaluation-dpo", "evaluation-dpo-implicit-reward"}


def test_sigkill_during_dpo_then_the_same_command_resumes_it(place: Place) -> None:
    longer = {
        **SMALL,
        "dpo.max_steps": 60,
        "dpo.seed": 7,
        "compute.stages.dpo.save_steps": 2,
        "compute.launcher": "process",
    }
    graph = Graph(load_recipe("tiny", longer))
    work = place.store / "dpo" / graph.key("dpo") / "work"
    running = subprocess.Popen(
        place.command("smoltulu/tiny", {"overrides": longer, "until": "dpo"}),
        cwd=machine.PROJECT,
        env=place.environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 600
    while newest_checkpoint(work / "checkpoints") is None:
        assert time.monotonic() < deadline and running.poll() is None, "DPO wrote no checkpoint"
        time.sleep(0.05)
    job = json.loads((work / "job.json").read_text())
    flow = psutil.Process(job["parent_pid"])
    trainers = [
        child for child in flow.children(recursive=True) if "smoltulu.tasks.engine.child" in " ".join(child.cmdline())
    ]
    assert trainers
    flow.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(trainers, timeout=10)
    assert alive == [], "a training process outlived its flow"
    out, _ = running.communicate(timeout=600)
    assert running.returncode != 0, out[-2000:]

    code, out = place.run(overrides=longer, until="dpo")
    assert code == 0, out[-4000:]
    outcomes = place.outcomes()
    assert outcomes["dpo"] == "Resumed" and "resumes at step" in out
    assert {outcomes[name] for name in outcomes if name.startswith(("contamination", "dataset", "world"))} == {"Cached"}
    assert outcomes["sft"] == outcomes["reward-model"] == outcomes["base-model"] == "Cached"


def test_bad_input_is_one_clear_message_and_not_zero(place: Place, tmp_path: Path) -> None:
    for parameters, message in (
        ({"recipe": "tinny"}, "no recipe is called 'tinny' (did you mean 'tiny'?)"),
        (
            {"overrides": {"data.sft.sources": [{"path": str(tmp_path), "format": "messages"}]}},
            "the folder is empty",
        ),
    ):
        before = set(place.store.rglob("manifest.json"))
        code, out = place.run(**parameters)
        assert code == 1, parameters
        assert message in " ".join(out.split()), out[-2500:]
        assert set(place.store.rglob("manifest.json")) == before


def test_nightly_tells_what_is_new_and_then_that_nothing_is(place: Place) -> None:
    """Two DPO models: the second is judged against the first, by the deployment; then nothing is measured again."""
    other = {**SMALL, "dpo.learning_rate": 3e-5}
    for overrides in (SMALL, other):
        code, out = place.run(overrides=overrides, until="dpo")
        assert code == 0, out[-4000:]
    code, out = place.run("smoltulu-eval/nightly", recipe="tiny", overrides=SMALL)
    assert code == 0, out[-4000:]
    assert "nothing to compare with yet" in out and "identical samples" in out  # the latter: one task, measured again
    made = set(place.store.glob("evaluation/*/gen-*"))
    code, out = place.run("smoltulu-eval/nightly", recipe="tiny", overrides=other)
    assert code == 0, out[-4000:]
    assert "new: dpo" in out and "dpo verified_sampled against last" in out and "nothing new" not in out
    began = time.monotonic()
    code, out = place.run("smoltulu-eval/nightly", recipe="tiny", overrides=other)
    seconds = time.monotonic() - began
    assert code == 0 and "nothing new" in out, out[-4000:]
    with prefect_api.client(place.url) as server:
        lines = server._client.post("/logs/filter", json={"sort": "TIMESTAMP_DESC", "limit": 200}).json()
    told = next(line for line in lines if "nothing new" in line["message"])
    of_run = [datetime.fromisoformat(line["timestamp"]) for line in lines if line["flow_run_id"] == told["flow_run_id"]]
    after = (datetime.fromisoformat(told["timestamp"]) - min(of_run)).total_seconds()
    print(f"nightly: nothing new {after:.1f} s after the first line, {seconds:.1f} s in all")
    assert set(place.store.glob("evaluation/*/gen-*")) == made
    with prefect_api.client(place.url) as server:
        names = [f"smoltulu.evaluation.{name}" for name in ("night", "loss")]
        deadline = time.monotonic() + 60  # the server writes events down a moment after they were sent
        while True:
            found = server._client.post("/events/filter", json={"filter": {"event": {"name": names}}}).json()["events"]
            if len(found) >= 3 or time.monotonic() > deadline:
                break
            time.sleep(0.5)
    assert [event["event"] for event in found] == names[:1] * 3
    assert {event["resource"]["prefect.resource.id"] for event in found} == {"smoltulu.recipe.tiny"}
    code, out = place.run("smoltulu-eval/nightly", recipe="tiny", overrides={"sft.seed": 99})
    assert code == 0 and "nothing to evaluate" in out
