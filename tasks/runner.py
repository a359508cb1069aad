"""Everything around a stage function, the same for all stages: look up, lock, run in a child, check, commit."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from artifacts.store import Found, Store
from schemas.artifact import ArtifactReference, FileRecord, InputRecord, Manifest, Spec
from schemas.compute import ComputeSettings
from tasks.child import MESSAGE_PREFIX
from tasks.stage import Stage, StageContext

_PROGRESS_SECONDS = 3.0
_LOG_TAIL_LINES = 25
_RECORDED_PACKAGES = (
    "torch", "transformers", "trl", "datasets", "accelerate", "tokenizers", "lm_eval", "huggingface_hub", "prefect",
    "numpy", "pydantic",
)  # fmt: skip

_running: set[subprocess.Popen] = set()
_running_lock = threading.Lock()


class StageFailed(RuntimeError):
    """A stage's process ended without a result; the text holds the end of its log."""


@dataclass(frozen=True)
class Job:
    """One stage that is wanted: identity (spec) and everything needed to make it.

    inputs         resolved inputs model (folders and files of upstream artifacts)
    input_records  binding -> upstream artifact, for the manifest and the stale check
    refresh        make it again even if it is there
    """

    node: str
    stage: Stage
    config: BaseModel
    compute: ComputeSettings
    spec: Spec
    inputs: BaseModel
    input_records: Mapping[str, InputRecord] = field(default_factory=dict)
    refresh: bool = False


def run_stage(job: Job, store: Store, log: logging.Logger | logging.LoggerAdapter) -> ArtifactReference:
    """Return the artifact of a job, made now or found.

    Raises ValueError for what the user must mend (bad data, bad model, disk full), StageFailed for a crash.
    """
    digests = {name: record.digest for name, record in job.input_records.items()}
    found = store.find(job.spec, digests)
    if isinstance(found, Found) and not job.refresh:
        return reference_to(found, job.stage.name, job.node, "Cached")
    asked_at = time.time()
    with store.producer(
        job.spec, lambda whom: log.info("%s: waiting for %s, which makes it", job.node, whom)
    ) as folder:
        found = store.find(job.spec, digests)
        # Another producer may have made it while we waited; a refresh is content with what was made since it was asked.
        if isinstance(found, Found) and (not job.refresh or _finished(found) >= asked_at):
            return reference_to(found, job.stage.name, job.node, "Cached")
        if not isinstance(found, Found):
            log.info("%s: runs (%s)", job.node, found.reason)
        _require_disk(store.root, job.compute.min_free_disk_gb)
        work = folder / "work"
        (work / "checkpoints").mkdir(parents=True, exist_ok=True)
        output = folder / "work" / "output"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        started = datetime.now(UTC)
        result = _run_function(job, work, output, log)
        outputs = job.stage.outputs.model_validate(result["outputs"])

        def draft(files: dict[str, FileRecord], digest: str) -> Manifest:
            finished = datetime.now(UTC)
            return Manifest(
                key=folder.name,
                spec=job.spec,
                digest=digest,
                inputs=dict(job.input_records),
                outputs=outputs.model_dump(mode="json"),
                metrics=result["metrics"],
                files=files,
                environment=environment(),
                compute=job.compute.model_dump(mode="json"),
                node=job.node,
                started_at=started.isoformat(timespec="seconds"),
                finished_at=finished.isoformat(timespec="seconds"),
                duration_seconds=(finished - started).total_seconds(),
                resumed_from_steps=tuple(result["resumed_from_steps"]),
            )

        made = store.commit(job.spec, output, draft)
        return reference_to(
            made, job.stage.name, job.node, "Resumed" if made.manifest.resumed_from_steps else "Completed"
        )


def _run_function(job: Job, work: Path, output: Path, log: logging.Logger | logging.LoggerAdapter) -> dict:
    """Run the stage function in a process of its own (or here, `launcher: inline`); its result as plain JSON values."""
    for name in ("result.json", "error.json"):
        (work / name).unlink(missing_ok=True)
    if job.compute.launcher == "inline":
        context = StageContext(output, work, job.compute, _Progress(job.node, log))
        outputs, metrics = job.stage.function(job.config, job.inputs, context)
        result: dict[str, Any] = {"outputs": outputs.model_dump(mode="json"), "metrics": metrics}
    else:
        _run_child(job, work, output, log)
        result = json.loads((work / "result.json").read_text())
    resumes = work / "resumed.jsonl"
    result["resumed_from_steps"] = [int(line) for line in resumes.read_text().split()] if resumes.exists() else []
    return result


def _run_child(job: Job, work: Path, output: Path, log: logging.Logger | logging.LoggerAdapter) -> None:
    description = {
        "stage": job.stage.name,
        "config": job.config.model_dump(mode="json"),
        "inputs": job.inputs.model_dump(mode="json"),
        "compute": job.compute.model_dump(mode="json"),
        "folder": str(output),
        "work": str(work),
        "parent_pid": os.getpid(),
    }
    job_file = work / "job.json"
    job_file.write_text(json.dumps(description))
    command = [sys.executable, "-m", "tasks.child", str(job_file)]
    if job.compute.num_processes > 1 and job.stage.name in ("sft", "reward_model", "dpo", "rlvr"):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.compute.num_processes}"]
        command = [sys.executable, *launcher, "-m", "tasks.child", str(job_file)]
    tail: deque[str] = deque(maxlen=_LOG_TAIL_LINES)
    progress = _Progress(job.node, log)
    with (work / "log.txt").open("a") as log_file:
        # This thread starts the child and waits for it: the child dies with the thread that started it.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env=_child_environment(job.compute),
            cwd=Path(__file__).resolve().parent.parent,
        )
        with _running_lock:
            _running.add(process)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                log_file.write(line)
                log_file.flush()
                if line.startswith(MESSAGE_PREFIX):
                    _relay(json.loads(line[len(MESSAGE_PREFIX) :]), progress, job.node, log)
                else:
                    tail.append(line.rstrip())
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            with _running_lock:
                _running.discard(process)
    if code == 2 and (work / "error.json").exists():
        raise ValueError(f"{job.node}: {json.loads((work / 'error.json').read_text())['message']}")
    if code != 0:
        reason = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        hint = " (often: out of memory)" if code == -9 else ""
        raise StageFailed(
            f"{job.node}: its process {reason}{hint}. Run again to go on from the last checkpoint. "
            f"Whole log: {work / 'log.txt'}; its end:\n" + "\n".join(tail)
        )


def stop_children() -> None:
    """End every stage process that this process started: called when a flow is cancelled or fails."""
    with _running_lock:
        for process in _running:
            process.terminate()


def _relay(message: dict, progress: _Progress, node: str, log: logging.Logger | logging.LoggerAdapter) -> None:
    if message["kind"] == "progress":
        progress(message["step"], message["num_steps"], **message["metrics"])
    else:
        log.log(logging.getLevelName(message["level"]), "%s: %s", node, message["text"])


class _Progress:
    """Progress lines at most every few seconds: step N of M, metrics, time left."""

    def __init__(self, node: str, log: logging.Logger | logging.LoggerAdapter) -> None:
        self.node, self.log = node, log
        self.first: tuple[int, float] | None = None
        self.last_shown = -float("inf")

    def __call__(self, step: int, num_steps: int, **metrics: float) -> None:
        now = time.monotonic()
        if self.first is None or step < self.first[0]:
            self.first = (step, now)
        if now - self.last_shown < _PROGRESS_SECONDS and step != num_steps:
            return
        self.last_shown = now
        parts = [f"step {step:,} of {num_steps:,}"]
        parts += [f"{name.replace('_', ' ')} {_short(value)}" for name, value in metrics.items()]
        done = step - self.first[0]
        if done > 0 and step < num_steps:
            parts.append(f"{duration((now - self.first[1]) / done * (num_steps - step))} left")
        self.log.info("%s: %s", self.node, " · ".join(parts))


def _short(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1e-2 else f"{value:.3f}".rstrip("0").rstrip(".")


def duration(seconds: float) -> str:
    """A duration for people: 45 s, 3 min 20 s, 5 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _child_environment(compute: ComputeSettings) -> dict[str, str]:
    """The parent's environment, telemetry off. HF_TOKEN stays: stages read gated data with it, and never print it."""
    extra = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
        # Spinning barriers cost ten times the work where stages share the cores of a CPU machine.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        # glibc gives large buffers back after every step and faults them in again: a quarter of a small model's time.
        "MALLOC_MMAP_MAX_": os.environ.get("MALLOC_MMAP_MAX_", "0"),
        "MALLOC_TRIM_THRESHOLD_": os.environ.get("MALLOC_TRIM_THRESHOLD_", str(8 << 30)),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": os.environ.get("TRANSFORMERS_VERBOSITY", "error"),
    }
    if compute.num_threads:
        extra["OMP_NUM_THREADS"] = str(compute.num_threads)
    return {**os.environ, **extra}


def _require_disk(root: Path, min_free_gb: float) -> None:
    root.mkdir(parents=True, exist_ok=True)
    free_gb = shutil.disk_usage(root).free / 1e9
    if free_gb < min_free_gb:
        raise ValueError(
            f"{free_gb:.1f} GB free under {root}, compute.min_free_disk_gb asks for {min_free_gb:g}; "
            "free some space, or lower it if you know that the stage needs less"
        )


def _finished(found: Found) -> float:
    return datetime.fromisoformat(found.manifest.finished_at).timestamp()


def reference_to(found: Found, stage: str, node: str, outcome: str) -> ArtifactReference:
    """What tasks pass on about an artifact of the store."""
    manifest = found.manifest
    return ArtifactReference(
        stage=stage,
        node=node,
        key=manifest.key,
        digest=manifest.digest,
        path=str(found.folder),
        outcome=outcome,
        outputs=manifest.outputs,
        metrics=manifest.metrics,
    )


@cache
def environment() -> dict[str, object]:
    """What a result was made with: packages, Python, machine, git commit. Recorded, not part of any key."""
    packages = {}
    for name in _RECORDED_PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "packages": packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
