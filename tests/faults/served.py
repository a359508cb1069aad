"""Faults with a Prefect server: SIGKILL in a push to the Hub, in a night's evaluation, and of the server itself.

`python -m tests.faults.served pipeline|nightly OVERRIDES` is a flow's process without a worker, for the killer.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psutil

from smoltulu.artifacts.layout import HISTORY, RUNS
from smoltulu.flows.machine import machine, prefect_api
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.schemas.evaluation import EvaluationOutputs
from smoltulu.schemas.nightly import MeasuredModel
from smoltulu.schemas.run import RunRecord
from smoltulu.tasks.comparison.evaluations import measured
from smoltulu.tasks.engine.runner import reference_to
from smoltulu.tasks.evaluation.cell import evaluation_cell
from smoltulu.tasks.evaluation.samples import read_samples, write_samples
from smoltulu.tasks.nightly.history import History, Row
from tests.faults import commands
from tests.faults.kills import Result, finish
from tests.faults.sandbox import Run, Sandbox, limits
from tests.hub_double import HubDouble, Repository

if TYPE_CHECKING:
    from tests.faults.draw import Draw

#: Kinds of this file: they share a server, so that one is tried at a time, and none beside `worker.killed_worker`.
KINDS = ("SIGKILL in a push", "SIGKILL in a night", "SIGKILL of the Prefect server")
REPOSITORY = "me/tiny-fault"
#: What a push asks of the Hub, in its order.
REQUESTS = (
    *("/api/whoami-v2", "/api/validate-yaml", "/api/repos/create", "/api/models/.*/preupload/", "/objects/batch"),
    *("PUT /lfs/", "/lfs-verify", "/api/models/.*/commit/"),
)
_VERDICT = re.compile(r"(\S+ \S+) against last: ([\d.]+) -> ([\d.]+), (same|within noise|watch|loss|gain) \(p")
_NIGHTS: dict[Path, commands.Unbroken] = {}
_ONE_NIGHT = threading.Lock()
_ONE_START = threading.Lock()


def server(home: Path) -> dict[str, str]:
    """The environment of clients of a server that runs in `home`."""
    with _ONE_START:
        if machine.running(home, "server") is None:
            machine.up(home, prefect_api.free_port(), say=lambda text: None)
        running = machine.running(home, "server")
    assert running is not None
    url = prefect_api.url_of(running.port)
    known = machine.child_environment(home, url)
    kept = {name: value for name, value in known.items() if name.startswith("PREFECT_") or name.lower() == "no_proxy"}
    return {**kept, "COLUMNS": "250"}


# Push


def killed_push(
    sandbox: Sandbox, baseline: Sandbox, home: Path, moment: str, is_answered: bool, is_new: bool
) -> Result:
    """Kill the flow when it asks the Hub for something, before or after the Hub did it; then run it again.

    moment  pattern of a request's method and path
    is_new  the repository is made by this push; else it holds an earlier model
    """
    sandbox.copy_from(baseline)
    environment = server(home)
    running: list[Run] = []
    killed = threading.Event()

    def on_request(request: str, is_done: bool) -> None:
        if running and is_done == is_answered and re.search(moment, request) and not killed.is_set():
            killed.set()
            running[0].process.kill()
            running[0].process.wait()

    with HubDouble() as hub:
        if not is_new:
            hub.add("model", REPOSITORY, {"pytorch_model.bin": b"old", "notes.md": b"mine"}, private=True)
        hub.on_request = on_request
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0"}
        environment["HF_HOME"] = str(sandbox.home / "hf")
        command = _command("pipeline", {**sandbox.overrides, "publish.repository": REPOSITORY})
        running.append(commands.start(sandbox, command, **environment))
        code = running[0].wait()
        result = Result(
            num_kills=int(killed.is_set()), is_missed=not killed.is_set(), num_orphans=sandbox.num_orphans()
        )
        repository = hub.repositories.get(("model", REPOSITORY))
        result.problems += _half_made(repository, sandbox)
        again = commands.start(sandbox, command, **environment)
        code = again.wait()
        repository = hub.repositories.get(("model", REPOSITORY))
        if code or repository is None:
            result.problems.append(f"the next push failed: {again.text[-600:]}")
            return result
        result.problems += _half_made(repository, sandbox)
        if len(repository.commits) != 2 or not repository.private:
            result.problems.append(f"commits: {[commit.title for commit in repository.commits]}")
        there, wanted = repository.commits[-1].files, _published(sandbox)
        kept = {".gitattributes", "notes.md"}
        if {name: data for name, data in there.items() if name not in kept} != wanted:
            differing = [name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name)]
            result.problems.append(f"on the Hub differs: {differing}")
        result.problems += _holding(sandbox.home, hub.token)
    result.problems += sandbox.differences(baseline)
    return result


def _published(sandbox: Sandbox) -> dict[str, bytes]:
    folder = next(sandbox.folder("publish").glob("gen-*/model"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _half_made(repository: Repository | None, sandbox: Sandbox) -> list[str]:
    """Commits after the first that are not a whole publication, card included."""
    wanted = _published(sandbox)
    commits = [] if repository is None else repository.commits[1:]
    return [
        f"half a model on the Hub: {sorted(one.files)}" for one in commits if not wanted.items() <= one.files.items()
    ]


def _holding(folder: Path, secret: str) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors")
    return [f"{path} holds the token" for path in files if secret.encode() in path.read_bytes()]


# A night


def killed_night(sandbox: Sandbox, baseline: Sandbox, home: Path, moment: commands.Moment, part: str = "") -> Result:
    """Kill a night's evaluation, evaluate again: the drop since the last model is told, once the scores are there.

    part  of the store, whose file-system events count
    """
    whole = _unbroken_night(baseline, home)
    verdict = _VERDICT.findall(whole.text)
    _last_night(sandbox, baseline)
    before = {path: path.read_bytes() for path in sandbox.root.rglob("gen-*/**/*") if path.is_file()}
    command, environment = _command("nightly", _night(sandbox.overrides)), server(home)
    under = sandbox.root / part if part else sandbox.root
    counted = commands.Unbroken(whole.code, whole.text, whole.seconds)
    prefix = f"{baseline.home / 'night' / 'store' / part}".rstrip("/")
    for line in (baseline.home / "night" / "events.txt").read_text().splitlines():
        role, _, path = line.split("\t")
        counted.num_events[role] += path.startswith(f"{prefix}/")
    result, run = commands.interrupt(sandbox, command, under, moment, counted, **environment)
    again = commands.start(sandbox, command, **environment)
    code, told = again.wait(), _VERDICT.findall(again.text)
    was_told = _VERDICT.findall(run.text) == verdict
    # One that was killed after its verdict has told it; then there is nothing new since.
    is_nothing_new = was_told and code == 0 and not told and "nothing new: " in again.text
    if not verdict or not ((code, told) == (whole.code, verdict) or is_nothing_new):
        result.problems.append(f"another verdict: {told}, status {code}; unbroken: {verdict}; {again.text[-300:]}")
    result.problems += [f"lost: {path}" for path, data in before.items() if not _has(path, data)]
    for node in _evaluations(sandbox):
        mine, theirs = sandbox.manifest(node), Sandbox(baseline.home / "night", sandbox.overrides).manifest(node)
        if mine.digest != theirs.digest:
            result.problems.append(f"{node}: other scores")
    records = [RunRecord.model_validate_json(path.read_text()) for path in (sandbox.root / RUNS).glob("*.json")]
    ended = [record for record in records if record.state != "Running"]
    if len({record.flow_run_id for record in records}) != len(records) or not 1 <= len(ended) <= 2:
        result.problems.append(f"records: {[(record.run_name, record.state) for record in records]}")
    commands.no_trash(sandbox, result)
    return result


def _has(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _unbroken_night(baseline: Sandbox, home: Path) -> commands.Unbroken:
    """The same night, nothing happened to it."""
    with _ONE_NIGHT:
        if baseline.home not in _NIGHTS:
            sandbox = Sandbox(baseline.home / "night", baseline.overrides)
            shutil.rmtree(sandbox.home, ignore_errors=True)
            _last_night(sandbox, baseline)
            command = _command("nightly", _night(baseline.overrides))
            _NIGHTS[baseline.home] = commands.unbroken(sandbox, command, sandbox.root, **server(home))
    return _NIGHTS[baseline.home]


def _night(overrides: dict[str, Any]) -> dict[str, Any]:
    """A recipe of two models: the keys are the same."""
    others = ("reward_model", "dpo", "rlvr", "publish")
    return {name: value for name, value in overrides.items() if not name.startswith(others)} | dict.fromkeys(others)


def _evaluations(sandbox: Sandbox) -> list[str]:
    return [node for node in ("evaluation-base-model", "evaluation-sft") if node in sandbox.graph.nodes]


def _last_night(sandbox: Sandbox, baseline: Sandbox) -> None:
    """The baseline's store, and a night that told of other models whose answers were right: tonight's are a drop.

    Those models had the same keys and other weights, so that tonight's are measured, each task of them.
    """
    sandbox.copy_from(baseline)
    shutil.rmtree(sandbox.root / evaluation_cell.name)
    at = (datetime.now(UTC) - timedelta(days=1)).isoformat(timespec="seconds")
    rows, told = [Row("night", at, "last-night", verdict="well", num_items=0)], []
    for node in _evaluations(sandbox):
        found, output = sandbox.found(node), sandbox.folder(node) / "work" / "output"
        reference: ArtifactReference = reference_to(found, node, "Cached")  # type: ignore[arg-type]
        shutil.copytree(reference.path, output)
        samples = output / reference.outputs["samples_file"]
        lines = list(read_samples(samples))
        for row in lines[2:]:
            row["metrics" if "metrics" in row else "mean"] = (
                dict.fromkeys(row["metrics"], 1.0) if "metrics" in row else 1.0
            )
        write_samples(samples, lines)
        manifest = sandbox.manifest(node)
        outputs = _agreeing(output, EvaluationOutputs.model_validate(manifest.outputs))
        other = manifest.inputs["model"].model_copy(update={"digest": "0" * 64})
        changed = {"outputs": outputs.model_dump(mode="json"), "inputs": manifest.inputs | {"model": other}}
        manifest = manifest.model_copy(update=changed)
        made = sandbox.store.commit(
            sandbox.graph.spec(node),
            output,
            lambda files, digest, manifest=manifest: manifest.model_copy(update={"files": files, "digest": digest}),
        )
        told.append(
            MeasuredModel(
                stage="evaluation",
                key=manifest.key,
                generation=made.folder.name,
                digest=made.manifest.digest,
                model_digest=other.digest,
            )
        )
        of_it = {"node": node, "model": other.digest, "stage": "evaluation", "key": manifest.key}
        of_it |= {"generation": made.folder.name, "evaluation": made.manifest.digest}
        rows += [Row("score", at, "last-night", task=one.task, value=one.value, **of_it) for one in outputs.scores]
    History(sandbox.root, sandbox.graph.name).add(rows, told)


def _agreeing(output: Path, outputs: EvaluationOutputs) -> EvaluationOutputs:
    """With headline scores that are the means of their items."""
    means = {
        (one.score.task, one.score.metric): fmean(item.value for item in one.items.values())
        for one in measured(output, outputs).values()
        if one.items
    }
    scores = tuple(
        score.model_copy(update={"value": means.get((score.task, score.metric), score.value)})
        for score in outputs.scores
    )
    return outputs.model_copy(update={"scores": scores})


# The server


def killed_server(sandbox: Sandbox, baseline: Sandbox, home: Path, node: str, step: int, seconds: float) -> Result:
    """Kill the server while a training is at `step`; `smoltulu up` follows after a while, and the training went on."""
    sandbox.copy_from(baseline, without=node)
    url = server(home)["PREFECT_API_URL"]
    machine.up(home, say=lambda text: None)  # the worker too
    running = machine.running(home, "server")
    assert running is not None
    overrides = {**sandbox.overrides, "compute.store": str(sandbox.root)}
    said = machine.call_prefect(
        home, url, "deployment", "run", "smoltulu/tiny", "-p", f"overrides={json.dumps(overrides)}"
    )
    flow_run = UUID(re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", said)[0])  # type: ignore[index]
    deadline = time.monotonic() + limits.run
    while sandbox.last_step(node) < step or not sandbox.processes():
        assert time.monotonic() < deadline, "the flow run did not reach its training"
        time.sleep(0.01)
    flow = psutil.Process(json.loads((sandbox.folder(node) / "work" / "job.json").read_text())["parent_pid"])
    done = sandbox.last_step(node)
    os.kill(running.pid, signal.SIGKILL)
    result = Result(num_kills=1, limit=sandbox.save_steps(node))
    time.sleep(seconds)
    done = max(done, sandbox.last_step(node))
    machine.up(home, say=lambda text: None)
    while _state(url, flow_run) in ("Running", "Pending") and time.monotonic() < deadline:
        time.sleep(0.1)
    if (state := _state(url, flow_run)) != "Completed":
        result.problems.append(f"the run that lost its server is {state}")
    _, alive = psutil.wait_procs([flow], timeout=60)
    result.num_orphans = len(alive) + sandbox.num_orphans()
    if not result.problems and sandbox.manifest(node).resumed_from_steps:
        result.problems.append("the training was interrupted")
    return finish(sandbox, baseline, node, result, done)


def _state(url: str, flow_run: UUID) -> str:
    with prefect_api.client(url) as client:
        state = client.read_flow_run(flow_run).state
    return "" if state is None else str(state.name)


def _command(flow: str, overrides: dict[str, Any]) -> list[str]:
    return ["tests.faults.served", flow, json.dumps(overrides)]


def add(draw: Draw, num: int) -> None:
    """`num` of each kind; the server is that of the faults with the worker."""
    home = draw.home / "prefect"
    for _ in range(num):
        rng = draw._rng()
        what, is_answered, is_new = rng.choice(REQUESTS), rng.random() < 0.5, rng.random() < 0.6
        attempt = functools.partial(killed_push, home=home, moment=what, is_answered=is_answered, is_new=is_new)
        text = f"{'after' if is_answered else 'at'} {what}, {'a new' if is_new else 'an old'} repository"
        draw.add(KINDS[0], text, attempt)
        rng = draw._rng()
        moment, part = _moment_of_a_night(rng)
        attempt = functools.partial(killed_night, home=home, moment=moment, part=part)
        draw.add(KINDS[1], f"{moment}{f', in {part}' if part else ''}", attempt)
    for _ in range(num):
        rng = draw._rng()
        long = [node for node in draw.trainers if draw._num_steps(node) > 3]
        if not long:
            return
        node = rng.choice(long)
        step, seconds = rng.randint(1, draw._num_steps(node) - 2), rng.choice((0.0, rng.random() * 20))
        attempt = functools.partial(killed_server, home=home, node=node, step=step, seconds=seconds)
        draw.add(KINDS[2], f"{node}, step {step}, back after {seconds:.1f} s", attempt)


def _moment_of_a_night(rng: random.Random) -> tuple[commands.Moment, str]:
    part = rng.choice(("", "", RUNS, HISTORY))
    roles: tuple[str | None, ...] = ("parent",) if part else ("parent", "child", None)
    return commands.Moment.draw(rng, roles), part


if __name__ == "__main__":
    from smoltulu.flows.evaluation import nightly_evaluation
    from smoltulu.flows.pipeline import smoltulu

    {"pipeline": smoltulu, "nightly": nightly_evaluation}[sys.argv[1]]("tiny", json.loads(sys.argv[2]))
