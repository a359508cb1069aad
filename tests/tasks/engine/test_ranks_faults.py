"""One of two ranks fails: all end soon, the failure is its own, and nothing that was whole is lost.

The faults are real ones, planted into a rank of a real training (planted/sitecustomize.py).
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from smoltulu.artifacts.checkpoints import newest_checkpoint
from smoltulu.artifacts.store import Store
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.engine import launch, pulse
from smoltulu.tasks.engine.ends import (
    End,
    cause_of,
    hanging,
    is_lost_peer,
    is_waiting,
    main_thread,
    read_ends,
    waits_long,
    write_end,
)
from smoltulu.tasks.engine.launch import StageFailed
from smoltulu.tasks.engine.runner import run_stage
from smoltulu.tasks.job import Job
from smoltulu.tasks.stage import Diverged
from tests import ROOT
from tests.tasks.engine.test_runner import sft_job, write_sft_world

LOG = logging.getLogger("test")
#: Seconds from a fault to the end of all; a rank that does not end by itself is killed after 40.
BOUND = 60.0
#: Ranks of processes of their own import everything anew.
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def sft_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sft_world(tmp_path_factory.mktemp("sft"))


@dataclasses.dataclass
class Planted:
    """A fault of rank 1 before its step 4; a checkpoint every second step."""

    world: Path
    folder: Path
    file: Path

    def job(self, launcher: str, **compute: Any) -> Job:
        job = sft_job(self.world)
        changes = {"launcher": launcher, "num_processes": 2, "per_device_train_batch_size": 2, "save_steps": 2}
        changes |= {"logging_steps": 1, "report_to": (), "rank_timeout_minutes": 0.1}
        made = job.compute.model_copy(update=changes | compute)
        return dataclasses.replace(job, compute=made, config=job.config.model_copy(update={"max_steps": 8}))

    def run(self, fault: str, launcher: str, rank: int = 1, step: int = 4, **compute: Any) -> BaseException | None:
        """What the stage failed of. None: it did not."""
        self.file.write_text(json.dumps({"fault": fault, "rank": rank, "step": step}))
        try:
            run_stage(self.job(launcher, **compute), Store(self.folder), LOG)
        except (StageFailed, ValueError) as error:
            assert not self.left, "a process outlived its stage"
            return error
        return None

    @property
    def left(self) -> list[psutil.Process]:
        """Processes of stages: a server of warm ones stays, without any."""
        children = psutil.Process().children()
        servers = [one for one in children if "smoltulu.tasks.engine.warm" in one.cmdline()]
        alone = [one for one in children if "smoltulu.tasks.engine.child" in one.cmdline()]
        return alone + [forked for server in servers for forked in server.children(recursive=True)]

    @property
    def seconds(self) -> float:
        """Since the fault."""
        return time.monotonic() - float(Path(f"{self.file}.at").read_text())

    @property
    def newest(self) -> int:
        (work,) = self.folder.glob("sft/*/work")
        newest = newest_checkpoint(work / "checkpoints", full=True)
        return newest[0] if newest else 0


@pytest.fixture
def planted(sft_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planted:
    # One name for all tests: another environment would be another server of warm processes.
    file = sft_world / "planted.json"
    monkeypatch.setenv("SMOLTULU_PLANTED", str(file))
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent / 'planted'}:{os.environ.get('PYTHONPATH', '')}")
    return Planted(sft_world, tmp_path, file)


#: What a run says of it.
TOLD = {
    "killed": r"sft: rank 1 was killed by signal 9 \(often: out of memory\)\. Run again to go on",
    "raises": r"(?s)sft: rank 1 failed: RuntimeError: the card fell off the bus\. .*where rank 1 was:.*on_step_begin",
    "asleep": r"(?s)sft: rank 1 hangs after step 3: others wait for it, .*sitecustomize.py., line \d+ in on_step_begin",
    "stopped": r"(?s)sft: rank 1 hangs after step 3: .*its process is stopped \(SIGSTOP\)",
}


@pytest.mark.parametrize(
    ("fault", "launcher"),
    [(fault, "warm") for fault in TOLD]
    + [pytest.param(fault, "process", marks=SLOW) for fault in ("killed", "asleep")],
)
def test_a_rank_that_fails_ends_all_and_is_named(planted: Planted, fault: str, launcher: str) -> None:
    error = planted.run(fault, launcher)
    assert planted.seconds < BOUND
    assert isinstance(error, StageFailed)
    with pytest.raises(StageFailed, match=TOLD[fault]):
        raise error
    assert planted.newest == 2


def test_nan_of_one_rank_is_told_by_all_with_its_rows(planted: Planted) -> None:
    error = planted.run("nan", "warm")
    assert planted.seconds < BOUND and isinstance(error, Diverged)
    with pytest.raises(
        Diverged, match=r"(?s)^sft: loss is nan at step 4; .* Its rows: row \d+ .*, row \d+ .*\. Of rank 1\. Look"
    ):
        raise error
    assert planted.newest == 2


def test_out_of_memory_of_one_rank_halves_the_batch_of_all(planted: Planted, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "test"):
        assert planted.run("memory", "warm") is None
    assert "out of memory with per_device_train_batch_size 2: goes on with 1, same effective batch" in caplog.text
    assert "resumes at step 2 of 8" in caplog.text


@pytest.mark.slow  # rank 0 waits half a minute for the part of the checkpoint that rank 1 could not write
def test_a_full_disk_of_one_rank_is_told_as_such(planted: Planted) -> None:
    error = planted.run("disk", "warm")
    with pytest.raises(
        StageFailed, match=r"rank 1 failed: OSError: .*No space left on device \(the disk is full; free"
    ):
        raise error  # type: ignore[misc]
    assert planted.seconds < BOUND and planted.newest == 2


def test_a_slow_rank_is_named_and_sigterm_to_one_stops_all_with_a_checkpoint(
    planted: Planted, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "test"):
        error = planted.run("terminated", "warm", step=5)
    assert isinstance(error, StageFailed) and "sft: was stopped. Run again to go on" in str(error)
    assert planted.newest in (5, 6)  # no checkpoint is due at 5: it was written as all agreed
    assert "stopped as asked at step" in caplog.text
    with caplog.at_level(logging.INFO, "test"):
        assert planted.run("slow", "warm", rank=0, step=planted.newest + 1, rank_timeout_minutes=30) is None
    assert "resumes at step" in caplog.text and re.search("rank 0 is slow at step [78]: ", caplog.text)


@pytest.mark.parametrize("launcher", ["warm", pytest.param("process", marks=SLOW)])
def test_sigterm_to_all_processes_stops_with_a_checkpoint(planted: Planted, launcher: str) -> None:
    """As a scheduler sends it: to every process of the stage, twice."""
    job = planted.job(launcher, save_steps=100_000, logging_steps=100, dataloader_num_workers=1)
    job = dataclasses.replace(job, config=job.config.model_copy(update={"max_steps": 100_000}))
    planted.file.write_text(json.dumps({"fault": "", "rank": 1, "step": 0}))
    failures: list[BaseException] = []

    def attempt() -> None:
        try:
            run_stage(job, Store(planted.folder), LOG)
        except StageFailed as error:
            failures.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    deadline = time.monotonic() + 120
    while not _steps(planted.folder) > 3:
        assert time.monotonic() < deadline and not failures, failures
        time.sleep(0.05)
    process = next(iter(launch._running))
    assert process.pid is not None
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(family) == 1 + 2 + 2  # each rank with a process that makes its batches
    for _ in range(2):
        for one in family:
            if one.is_running():
                one.send_signal(signal.SIGTERM)
    thread.join(60)
    assert len(failures) == 1 and "sft: was stopped. Run again to go on from its last checkpoint" in str(failures[0])
    assert planted.newest > 3
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def _steps(store: Path) -> int:
    return max((pulse.last_beat(file.parent, 1).step for file in store.glob("sft/*/work/step-1")), default=-1)


# ------------------------------------------------------------------------------------------------------------ by hand


def test_the_cause_is_the_first_that_no_lost_peer_explains(tmp_path: Path) -> None:
    lost = End(0, 1.0, "failed: RuntimeError: Connection closed by peer", is_of_peers=True)
    killed, later = End(1, 1.5, "was killed by signal 9"), End(2, 1.7, "failed: OSError")
    assert cause_of([lost, later, killed]) == killed
    assert cause_of([lost]) == lost and cause_of([]) is None
    for end in (lost, later, killed, dataclasses.replace(killed, message="says another")):
        write_end(tmp_path, end)
    (tmp_path / "end-3.json").write_text("{")
    assert sorted(read_ends(tmp_path), key=lambda end: end.rank) == [lost, killed, later]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[.../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:3"), True),
        (type("DistBackendError", (RuntimeError,), {})("NCCL error: remote process exited"), True),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_what_a_rank_says_whose_peer_is_gone(error: Exception, expected: bool) -> None:
    assert is_lost_peer(error) == expected


def stack(*firsts: str) -> str:
    """What faulthandler writes of a rank whose main thread is there, one time after another."""
    other = 'Thread 0x01 (most recent call first):\n  File "/usr/lib/python3/threading.py", line 3 in wait\n\n'
    main = 'Thread 0x02 (most recent call first):\n  File {}\n  File "child.py", line 9 in main\n'
    return "".join(f"Timeout (0:00:05)!\n{other}{main.format(first)}" for first in firsts)


def test_who_hangs_is_behind_and_waits_for_nobody() -> None:
    gathers = '"/site-packages/torch/distributed/distributed_c10d.py", line 4 in all_gather_into_tensor'
    backward = '"/site-packages/torch/autograd/graph.py", line 4 in _engine_run_backward'
    reads = '"/home/me/data.py", line 4 in read'
    waits, works, new = stack(gathers, backward), stack(reads, reads), stack(gathers)
    assert is_waiting(waits) and is_waiting(new) and not is_waiting(works) and not is_waiting("")
    assert main_thread(works).splitlines()[0].strip() == f"File {reads}"
    assert waits_long(waits) and not waits_long(new) and not waits_long(stack(reads, gathers)) and not waits_long("")
    all_three = (0, 1, 2)
    assert hanging({0: 3, 1: 3, 2: 3}, {0: waits, 1: works, 2: waits}, all_three) == [1]
    assert hanging({0: 3, 1: 3}, {0: waits, 1: ""}, all_three) == [1]  # it is stopped
    assert hanging({0: 3, 1: 4}, {0: waits, 1: works}, all_three) == [1]
    assert hanging({0: 4, 1: 3}, {0: waits, 1: works}, all_three) == [1]
    assert hanging({0: 4, 1: 4, 2: 3}, {0: waits, 1: works, 2: works}, all_three) == [2]  # the others went on
    assert hanging({0: 3, 1: 3}, {0: waits, 1: waits}, all_three) == [0, 1]
    # Nobody waits: both are busy, however long it takes. Or it is not known yet for how long.
    assert hanging({0: 3, 1: 3}, {0: works, 1: works}, all_three) == []
    assert hanging({0: 3, 1: 3}, {0: new, 1: works}, all_three) == []
    # One has done its share of the work and waits at the end; the other goes on. A third hangs, and is told.
    assert hanging({0: 9, 1: 3}, {0: waits, 1: ""}, [0]) == hanging({0: 9, 1: 3}, {0: waits, 1: new}, [0]) == []
    assert hanging({0: 9, 1: 3, 2: 5}, {0: waits, 1: "", 2: works}, [0, 2]) == [2]


def test_ranks_that_go_on_are_waited_for_and_what_they_said_last_is_read(tmp_path: Path) -> None:
    assert pulse.last_beat(tmp_path, 0) == (-1, float("-inf"))  # it has not begun
    own, began = pulse.Pulse(tmp_path, 0, 5.0), time.monotonic()
    try:
        step, due = pulse.last_beat(tmp_path, 0)
        assert step == -1 and due > began + 500  # models are loaded before the first step
        for number in (12, 3):  # a shorter number leaves nothing of a longer one
            own.beat(number)
        step, due = pulse.last_beat(tmp_path, 0)
        assert step == 3 and 4 < due - began < 10
    finally:
        faulthandler.cancel_dump_traceback_later()


def test_the_longest_time_for_a_rank_is_one_that_its_clock_takes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank_timeout_minutes"):
        ComputeSettings(rank_timeout_minutes=1e9)
    pulse.Pulse(tmp_path, 0, 60 * ComputeSettings(rank_timeout_minutes=20_000).rank_timeout_minutes).beat(1)
    faulthandler.cancel_dump_traceback_later()


_RANKS = """
import os, sys, time
from pathlib import Path
from smoltulu.tasks.engine.pulse import Pulse
from smoltulu.tasks.engine.ranks import spawn_ranks
from torch_distributed import meets
work, goes_on = Path(sys.argv[1]), sys.argv[2] == "goes on"
if "RANK" not in os.environ:
    import torch.distributed  # else it looks on only once the ranks have ended
    sys.exit(spawn_ranks(2, [sys.executable, *sys.argv], work))
own = Pulse(work, int(os.environ["RANK"]), 0.5)
own.beat(9)
if os.environ["RANK"] == "1":
    meets(5 if goes_on else 60)
for step in range(50 if goes_on else 0):
    own.beat(step)
    time.sleep(0.1)
time.sleep(0 if goes_on else 60)
"""


@pytest.mark.parametrize(("what", "status"), [("goes on", 0), ("hangs", 1)])
def test_a_rank_whose_share_is_done_waits_for_as_long_as_the_others_go_on(
    what: str, status: int, tmp_path: Path
) -> None:
    """Those of a stage that is no training each have their share, and may meet hours after the first is done."""
    folder = tmp_path / "torch" / "distributed"
    folder.mkdir(parents=True)
    (folder / "torch_distributed.py").write_text("import time\ndef meets(seconds):\n    time.sleep(seconds)\n")
    (tmp_path / "ranks.py").write_text(_RANKS)
    environment = os.environ | {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{ROOT}/src:{folder}"}
    command = [sys.executable, str(tmp_path / "ranks.py"), str(tmp_path), what]
    assert subprocess.run(command, env=environment, timeout=120, check=False).returncode == status
    assert [end.rank for end in read_ends(tmp_path)] == [0] * status


_GIVES_UP = """
import os, sys, time
from pathlib import Path
from smoltulu.tasks.engine.pulse import Pulse
from smoltulu.tasks.engine.ranks import spawn_ranks
work = Path(sys.argv[1])
if "RANK" not in os.environ:
    sys.exit(spawn_ranks(2, [sys.executable, *sys.argv], work))
own = Pulse(work, int(os.environ["RANK"]), 0.5)
own.beat(9)
time.sleep(2)
if os.environ["RANK"] == "1":
    os.abort()  # NCCL's watchdog
time.sleep(60)
"""


def test_a_rank_that_gave_up_waiting_is_not_the_cause(tmp_path: Path) -> None:
    """NCCL's watchdog aborts the rank that waits; the one that hangs is told, with its stack."""
    (tmp_path / "ranks.py").write_text(_GIVES_UP)
    environment = os.environ | {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{ROOT}/src"}
    command = [sys.executable, str(tmp_path / "ranks.py"), str(tmp_path)]
    assert subprocess.run(command, env=environment, timeout=120, check=False).returncode == 1
    assert {end.rank: end.is_of_peers for end in read_ends(tmp_path)} == {0: False, 1: True}
    cause = cause_of(read_ends(tmp_path))
    assert cause is not None and "went no further than step 9, and another rank gave up waiting" in cause.message
    assert "ranks.py" in cause.trace
