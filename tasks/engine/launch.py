"""Starting the process of a stage, listening to it, ending it."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smoltulu.artifacts.files import remove_tree, write_atomically
from smoltulu.artifacts.readable import log_text
from smoltulu.artifacts.store import Log
from smoltulu.schemas.budget import smaller_batch
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.engine import pulse
from smoltulu.tasks.engine.child import ERROR_FILE, OUT_OF_MEMORY_FILE
from smoltulu.tasks.engine.ends import cause_of, forget_ends, read_ends
from smoltulu.tasks.engine.messages import PIPE_VARIABLE, listen, pipe
from smoltulu.tasks.engine.ranks import RANK_VARIABLES
from smoltulu.tasks.engine.warm import OWN_VARIABLES, WarmProcess, server_for
from smoltulu.tasks.job import Job
from smoltulu.tasks.limits import NVIDIA_GPUS, num_cores, num_visible_cores
from smoltulu.tasks.process import WITHOUT_VARIABLE
from smoltulu.tasks.progress import Progress
from smoltulu.tasks.stage import STOPPED, Diverged

_TRAINING_ADVICE = (
    ", and no smaller one gives the same effective batch; set compute.activation_checkpointing, lower max_length, or "
    "take a machine with more memory. The checkpoints are kept"
)
_EVALUATION_ADVICE = "; take a machine with more memory. What is finished is kept"
#: File of `work`: compute as asked for, and with the batch that fits into memory.
_FITS_FILE = "fits.json"
_LOG_TAIL_LINES, _LOG_TAIL_CHARACTERS = 25, 2_000
DISK_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space (`smoltulu gc` shows what may go)",
    errno.EDQUOT: "the quota is used up; free some space (`smoltulu gc` shows what may go)",
    errno.EROFS: "the store is read-only; name a writable one in compute.store",
    errno.EACCES: "the store may not be written; name a writable one in compute.store",
    errno.EPERM: "the store may not be written; name a writable one in compute.store",
    errno.EIO: "the disk could not be read or written; look at its health",
    errno.ESTALE: "the file system was gone for a moment; see that it is mounted",
    errno.EINTR: "the call was interrupted",
}
#: Seconds that a stage gets to write a checkpoint when it is asked to stop.
_STOP_SECONDS = 8.0

#: Seconds that a stage gets for its last step and checkpoint when its time is over: nobody waits for it.
_LAST_STEP_SECONDS = 900.0
StageProcess = subprocess.Popen[bytes] | WarmProcess
#: Processes of stages, each with the GPUs that it may use (CUDA_VISIBLE_DEVICES).
_running: dict[StageProcess, str] = {}
_running_lock = threading.Lock()


class StageFailed(RuntimeError):
    """A stage's process ended without a result; the text holds the end of its log."""


def run_child(job: Job, work: Path, output: Path, log: Log, cells: Sequence[Mapping[str, Any]] = ()) -> None:
    """Run a stage in a process of its own; its result is in `work`, what it made in `output`.

    `cells`: run it once for each of these instead, with what they give of config, inputs, folder and work of its own.

    One that runs out of memory is started again with smaller batches, which changes no result (a training has the same
    effective batch), and goes on from its last checkpoint. What fits is remembered in `work`: a later attempt begins
    with it, unless compute is another by then.
    """
    setting = job.stage.halved_setting(job.compute)
    compute = _that_fits(job, work)
    if setting is not None and compute != job.compute:
        log.info("%s: begins with %s %d, which fitted into memory before", job.node, setting, getattr(compute, setting))
    deadline = None if compute.max_hours is None else time.monotonic() + 3600 * compute.max_hours
    while (message := _run_once(job, compute, work, output, log, deadline, cells)) is not None:
        if setting is None:
            raise ValueError(f"{job.node}: out of memory. It said: {message}")
        size: int = getattr(compute, setting)
        if job.stage.is_training:
            tried = (_said(work / OUT_OF_MEMORY_FILE) or {}).get("num_tokens", size)
            smaller = min(size, tried) // 2 or None
            if setting == "per_device_train_batch_size":
                smaller = smaller_batch(size, job.config.effective_batch_size, compute.num_processes)  # type: ignore[attr-defined]
            same, advice = ", same effective batch", job.stage.memory_advice or _TRAINING_ADVICE
        else:
            smaller, same, advice = size // 2 or None, "", job.stage.memory_advice or _EVALUATION_ADVICE
        if smaller is None:
            raise ValueError(f"{job.node}: out of memory with {setting} {size}{advice}. It said: {message}")
        log.warning("%s: out of memory with %s %d: goes on with %d%s", job.node, setting, size, smaller, same)
        compute = compute.model_copy(update={setting: smaller})
        fits = {"asked": job.compute.model_dump(mode="json"), "fits": compute.model_dump(mode="json")}
        write_atomically(work / _FITS_FILE, json.dumps(fits))
        remove_tree(output)
        output.mkdir()


def _that_fits(job: Job, work: Path) -> ComputeSettings:
    """The job's compute, with the batch that an earlier attempt with the same compute came to."""
    try:
        found = json.loads((work / _FITS_FILE).read_text())
        if found["asked"] == job.compute.model_dump(mode="json"):
            return ComputeSettings.model_validate(found["fits"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return job.compute


def _run_once(
    job: Job,
    compute: ComputeSettings,
    work: Path,
    output: Path,
    log: Log,
    deadline: float | None,
    cells: Sequence[Mapping[str, Any]],
) -> str | None:
    """Run the stage; what was said where it ran out of memory, else None. Other ends without a result are raised."""
    for name in (ERROR_FILE, OUT_OF_MEMORY_FILE):
        (work / name).unlink(missing_ok=True)
    forget_ends(work)
    pulse.forget(work)
    num_ranks = job.stage.num_ranks(compute)
    description = {
        "stage": job.stage.name,
        "config": job.config.model_dump(mode="json"),
        "inputs": job.inputs.model_dump(mode="json"),
        "externals": dict(job.spec.externals),
        "compute": compute.model_dump(mode="json"),
        "folder": str(output),
        "work": str(work),
        "parent_pid": os.getpid(),
        "num_ranks": num_ranks,
        "cells": list(cells),
    }
    job_file = work / "job.json"
    tail: deque[str] = deque(maxlen=_LOG_TAIL_LINES)
    progress = Progress(job.node, log)

    def on_output(line: bytes) -> None:
        text = log_text(line.decode(errors="replace").rstrip())
        log_file.write(f"{text}\n".encode())
        log_file.flush()
        tail.append(text[:_LOG_TAIL_CHARACTERS])

    def on_message(message: dict) -> None:
        if message["kind"] == "progress":
            progress(message["step"], message["num_steps"], **message["metrics"])
        else:
            level, text = message["level"], log_text(message["text"])
            log.log(logging.getLevelName(level), "%s: %s", job.node, text)
            log_file.write(f"{level}: {text}\n".encode(errors="replace"))

    with (work / "log.txt").open("ab") as log_file, pipe() as (messages, path):
        # This thread starts the child and waits for it: the child dies with the thread that started it.
        with _running_lock:
            environment = _child_environment(compute, num_ranks, job.stage.num_devices(compute)) | {PIPE_VARIABLE: path}
            process = _start(description, job_file, environment, is_warm=compute.launcher == "warm")
            _running[process] = environment.get("CUDA_VISIBLE_DEVICES", "")
        limit = _TimeLimit(process, deadline)
        try:
            listen(process, messages, on_message, on_output)
            code = process.wait()
        finally:
            limit.end()
            if process.poll() is None:
                process.kill()
                process.wait()
            with _running_lock:
                del _running[process]
    if code > 0 and code != STOPPED:
        if (said := _said(work / ERROR_FILE)) is not None:
            raise (Diverged if said.get("diverged") else ValueError)(f"{job.node}: {said['message']}")
        if (said := _said(work / OUT_OF_MEMORY_FILE)) is not None:
            return str(said["message"])
    if limit.is_over and code in (STOPPED, -signal.SIGTERM, -signal.SIGKILL):
        raise StageFailed(
            f"{job.node}: was stopped, as compute.max_hours ({compute.max_hours:g}) is over. Run again to go on from "
            "its last checkpoint"
        )
    if code != 0:
        if code in (-signal.SIGTERM, STOPPED):
            raise StageFailed(f"{job.node}: was stopped. Run again to go on from its last checkpoint")
        reason = f"its process was killed by signal {-code}" if code < 0 else f"its process ended with status {code}"
        hint, shown, lines = " (often: out of memory)" if code == -signal.SIGKILL else "", "its end", list(tail)
        if (cause := cause_of(read_ends(work))) is not None:
            reason, hint = f"rank {cause.rank} {log_text(cause.message)}", ""
            if cause.trace:
                shown, lines = f"where rank {cause.rank} was", log_text(cause.trace).splitlines()[-_LOG_TAIL_LINES:]
        if any(os.strerror(errno.ENOSPC) in line for line in (reason, *lines)):
            hint = f" ({DISK_ADVICE[errno.ENOSPC]})"
        raise StageFailed(
            f"{job.node}: {reason}{hint}. Run again to go on from the last checkpoint. "
            f"Whole log: {work / 'log.txt'}; {shown}:\n" + "\n".join(lines)
        )
    return None


def _start(description: dict[str, Any], job_file: Path, environment: dict[str, str], is_warm: bool) -> StageProcess:
    """Start the process of a stage: a new one, or a fork of one that has imported everything."""
    if is_warm:
        server = server_for(environment)
        job_file.write_text(json.dumps(description | {"parent_pid": server.pid}))
        own = {name: environment[name] for name in OWN_VARIABLES if name in environment}
        return server.start(job_file, own)
    job_file.write_text(json.dumps(description))
    return subprocess.Popen(
        [sys.executable, "-m", "smoltulu.tasks.engine.child", str(job_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment,
    )


class _TimeLimit:
    """Asks a stage to stop when its time is over, as a cancellation does; ends it where it does not."""

    def __init__(self, process: StageProcess, deadline: float | None) -> None:
        self.is_over = False
        self._process, self._ended = process, threading.Event()
        if deadline is not None:
            threading.Thread(target=self._wait, args=(deadline,), name="max-hours", daemon=True).start()

    def end(self) -> None:
        """The stage has ended: its time counts no longer."""
        self._ended.set()

    def _wait(self, deadline: float) -> None:
        if self._ended.wait(max(0.0, deadline - time.monotonic())):
            return
        self.is_over = True
        self._process.terminate()
        if not self._ended.wait(_LAST_STEP_SECONDS):
            self._process.kill()


def _said(file: Path) -> dict[str, Any] | None:
    """What a stage wrote about its end: `message`, `diverged` where it did, `num_tokens` of its micro-batch."""
    if not file.exists():
        return None
    said: dict[str, Any] = json.loads(file.read_text())
    return said | {"message": log_text(said["message"])}


def stop_children(seconds: float = _STOP_SECONDS) -> None:
    """End every stage process that this process started: called when a flow is cancelled or fails.

    A training writes a checkpoint first, if it can within so many seconds; what still runs then is killed.
    """
    with _running_lock:
        processes = list(_running)
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _child_environment(compute: ComputeSettings, num_ranks: int, num_gpus: int = 0) -> dict[str, str]:
    """The parent's environment, telemetry off. HF_TOKEN stays: stages read gated data with it, and never print it.

    One process sees one GPU, several as many: of those that are visible here the ones with the fewest stages on them.
    """
    extra = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
        # Python would take the folder that it works in for modules: a user's `tasks.py` or `datasets/`.
        "PYTHONSAFEPATH": "1",
        # Spinning barriers cost ten times the work where stages share the cores of a CPU machine.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        # glibc gives large buffers back after every step and faults them in again: a quarter of a small model's time.
        "MALLOC_MMAP_MAX_": os.environ.get("MALLOC_MMAP_MAX_", "0"),
        "MALLOC_TRIM_THRESHOLD_": os.environ.get("MALLOC_TRIM_THRESHOLD_", str(8 << 30)),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": os.environ.get("TRANSFORMERS_VERBOSITY", "error"),
    }
    if "wandb" not in compute.report_to:
        extra[WITHOUT_VARIABLE] = "wandb"  # TRL would import it: a second of every start
    if compute.num_threads:
        extra["OMP_NUM_THREADS"] = str(compute.num_threads)
    elif num_ranks == 1 and "OMP_NUM_THREADS" not in os.environ and num_cores() < num_visible_cores():
        # In a container with the time of 4 of 64 cores, torch would begin 64 threads.
        extra["OMP_NUM_THREADS"] = str(num_cores())
    if compute.device != "cpu":
        gpus, num_gpus = _visible_gpus(), max(num_gpus, num_ranks)
        if num_gpus == 1 or len(gpus) >= num_gpus:  # else the stage says how many there are
            extra["CUDA_VISIBLE_DEVICES"] = _least_used(gpus, num_gpus)
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # Every packed batch has another length, and caches grow by a token: blocks of fixed sizes would not fit again.
        extra["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # Of a launcher that the flow itself was started by: a stage would take itself for one of its ranks.
    own = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return {**own, **extra}


def _visible_gpus() -> list[str]:
    """Names of GPUs as CUDA_VISIBLE_DEVICES takes them; an empty one where that says that there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return visible.split(",")
    return [str(number) for number in range(len(list(NVIDIA_GPUS.iterdir())) if NVIDIA_GPUS.is_dir() else 1)]


def _least_used(gpus: Sequence[str], number: int) -> str:
    """So many of the GPUs, in their order. Under the lock."""
    taken = Counter(gpu for of_stage in _running.values() for gpu in of_stage.split(","))
    chosen = sorted(gpus, key=lambda gpu: taken[gpu])[:number]
    return ",".join(gpu for gpu in gpus if gpu in chosen)
