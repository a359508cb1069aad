"""The process of one stage: `python -m smoltulu.tasks.engine.child JOB.json`.

It dies with its parent and holds the key's `writer`. Progress and our own log records go through a pipe
(`tasks/engine/messages.py`); what it prints is the log of the libraries.

Exit status: 0 done, 2 the user's to fix (message in error.json), 3 out of memory (message in out_of_memory.json), 143
stopped as asked, 1 a failure, of which a rank leaves a word too (tasks/engine/ends.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import random
import sys
import time
import traceback
from pathlib import Path

from smoltulu.artifacts.files import write_atomically
from smoltulu.artifacts.layout import WRITER
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.engine import ends, pulse
from smoltulu.tasks.engine.messages import PIPE_VARIABLE, Sender, ToFlow
from smoltulu.tasks.engine.ranks import fork_ranks, spawn_ranks
from smoltulu.tasks.process import PARENT_VARIABLE, die_with_parent, is_out_of_memory, leave_out
from smoltulu.tasks.stage import STOPPED, Diverged, Report, Stage, StageContext, StageStopped, part_of

#: Files of `work` that say why a stage ended; any rank may write them.
ERROR_FILE = "error.json"
OUT_OF_MEMORY_FILE = "out_of_memory.json"


#: File of `work`: what the stage function returned. Written last: with it, all is there.
RESULT_FILE = "result.json"


def run(stage: Stage, job: dict, report: Report, is_main: bool) -> None:
    """Run a stage function and leave `result.json` beside the job."""
    began = time.monotonic()
    work = Path(job["work"])
    context = StageContext(
        folder=Path(job["folder"]),
        work=work,
        compute=ComputeSettings.model_validate(job["compute"]),
        report=report,
        externals=job["externals"],
    )
    config = stage.config.model_validate(job["config"])
    inputs = stage.inputs.model_validate(job["inputs"])
    outputs, metrics = stage.function(config, inputs, context)
    if is_main:
        result = {"outputs": stage.outputs.model_validate(outputs).model_dump(mode="json"), "metrics": metrics}
        write_atomically(work / RESULT_FILE, json.dumps({**result, "seconds": time.monotonic() - began}))


def run_cells(stage: Stage, job: dict, report: Report) -> None:
    """Run a stage once for every cell of a job that has no result yet; one that fails does not keep others from it.

    Raises:
        ValueError: what the user must fix in any of them.
        StageStopped, an error for want of memory that a smaller batch may mend: at once.
        Any other error: the first one, once all have had their turn.
    """
    cells = job["cells"]
    is_smallest = job["compute"]["per_device_eval_batch_size"] == 1
    failures = []
    crash: Exception | None = None
    for number, cell in enumerate(cells):
        if (Path(cell["work"]) / RESULT_FILE).exists():
            continue
        try:
            run(stage, {**job, **cell}, part_of(report, number, len(cells)), is_main=True)
        except ValueError as error:
            traceback.print_exc()
            failures.append(f"{cell['name']}: {error}")
        except Exception as error:
            if isinstance(error, StageStopped) or (is_out_of_memory(error) and not is_smallest):
                raise
            traceback.print_exc()
            logging.getLogger("smoltulu").error("%s: failed: %s: %s", cell["name"], type(error).__name__, error)
            crash = crash or error
    if crash is not None:
        raise crash
    if failures:
        raise ValueError("; ".join(failures))


def main(job_file: str, is_warm: bool = False) -> int:
    """Run the job. `is_warm`: this process is a fork that has imported everything (tasks/engine/warm.py)."""
    leave_out()
    job = json.loads(Path(job_file).read_text())
    work = Path(job["work"])
    die_with_parent(int(os.environ.pop(PARENT_VARIABLE, job["parent_pid"])))
    if job["num_ranks"] > 1 and "RANK" not in os.environ:
        if not is_warm:
            return spawn_ranks(job["num_ranks"], [sys.executable, "-m", "smoltulu.tasks.engine.child", job_file], work)
        if (status := fork_ranks(job["num_ranks"], work)) is not None:
            return status
    rank = int(os.environ.get("RANK", "0"))
    # Shared by all ranks and kept until exit; launchers do not pass descriptors on, so each process takes it itself.
    writers = [open(Path(one["work"]).parent / WRITER, "a+") for one in (job, *job.get("cells", ()))]  # noqa: SIM115
    for writer in writers:
        fcntl.flock(writer.fileno(), fcntl.LOCK_SH)
    sender = Sender(os.environ.get(PIPE_VARIABLE))
    logger = logging.getLogger("smoltulu")
    logger.setLevel(logging.INFO)
    logger.addHandler(ToFlow(sender))
    logger.propagate = False
    random.seed(0)

    report: Report = sender.progress
    if job["num_ranks"] > 1:
        report = _with_pulse(report, pulse.Pulse(work, rank, 60 * job["compute"]["rank_timeout_minutes"]), rank == 0)

    from smoltulu.tasks.stages import STAGES

    try:
        if job.get("cells"):
            run_cells(STAGES[job["stage"]], job, report)
        else:
            run(STAGES[job["stage"]], job, report, is_main=rank == 0)
    except StageStopped as stopped:
        if rank == 0:
            logger.info("%s", stopped)
        return STOPPED
    except ValueError as error:
        traceback.print_exc()
        write_atomically(
            work / ERROR_FILE, json.dumps({"message": str(error), "diverged": isinstance(error, Diverged)})
        )
        return 2
    except Exception as error:
        traceback.print_exc()
        said = str(error).strip().partition("\n")[0]
        if is_out_of_memory(error):
            message = {"message": said or type(error).__name__}
            if (num_tokens := getattr(error, "num_tokens", None)) is not None:
                message["num_tokens"] = num_tokens  # of the micro-batch, where it is cut by tokens
            write_atomically(work / OUT_OF_MEMORY_FILE, json.dumps(message))
            return 3
        if job["num_ranks"] > 1:
            text = f"failed: {type(error).__name__}: {said}"
            end = ends.End(rank, time.monotonic(), text, traceback.format_exc(), ends.is_lost_peer(error))
            with contextlib.suppress(OSError):  # the disk may be what failed; the log says it too
                ends.write_end(work, end)
        return 1
    return 0


def _with_pulse(report: Report, own: pulse.Pulse, is_main: bool) -> Report:
    """Progress as a sign of life of this rank; told by the main one."""

    def beat(step: int, num_steps: int, **metrics: float) -> None:
        own.beat(step)
        if is_main:
            report(step, num_steps, **metrics)

    return beat


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
