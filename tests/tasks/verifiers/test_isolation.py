"""Grading processes: what they cost when they hang, grow or are killed, and that none outlives its parent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from smoltulu.tasks.verifiers import Graders, fault_of_truth, grade
from smoltulu.tasks.verifiers.worker import CPU_SECONDS, WALL_SECONDS

SLOW_ANSWER = r"\boxed{9^{9^{9^9}}}"
RIGHT = ("math", r"\boxed{1+x}", "x+1")


@pytest.fixture
def graders() -> Iterator[Graders]:
    with Graders(1) as graders:
        yield graders


@pytest.fixture(scope="module")
def warm() -> Iterator[Graders]:
    """For tests that leave the workers as they are."""
    with Graders(2) as graders:
        yield graders


def processes_of(graders: Graders) -> list[psutil.Process]:
    """The worker processes, and the children that grade."""
    found = [psutil.Process(worker._process.pid) for worker in graders._workers if worker._process is not None]
    return found + [child for process in found for child in process.children()]


def test_an_answer_that_hangs_is_wrong_and_costs_only_itself(warm: Graders) -> None:
    jobs = [RIGHT, ("math", SLOW_ANSWER, "x+1"), ("math", r"\boxed{2+x}", "x+1"), ("gsm8k", "18", "18")]
    verdicts = warm.grade_all(jobs)
    assert [verdict.outcome for verdict in verdicts] == ["right", "wrong", "wrong", "right"]
    assert verdicts[1].reason == "grading the answer takes too much time"
    assert CPU_SECONDS < WALL_SECONDS < 2


def test_a_ground_truth_that_hangs_is_not_the_answers_fault(warm: Graders) -> None:
    verdict = warm.grade("math", r"\boxed{x}", "9^{9^{9^9}}")
    assert (verdict.outcome, verdict.reason) == ("could_not_grade", "reading the ground truth takes too much time")
    assert warm.grade(*RIGHT).outcome == "right"


def test_after_a_hang_the_next_child_is_forked_not_started(warm: Graders) -> None:
    assert warm.grade(*RIGHT).outcome == "right"
    before = [worker._process.pid for worker in warm._workers if worker._process]
    warm.grade("math", SLOW_ANSWER, "x+1")
    assert warm.grade("math", r"\boxed{x+1+0}", "x+1").outcome == "right"
    assert [worker._process.pid for worker in warm._workers if worker._process] == before


@pytest.mark.parametrize("whom", [0, 1], ids=["the worker", "its child"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_idle_worker_costs_nothing(graders: Graders, whom: int, number: int) -> None:
    assert graders.grade(*RIGHT).outcome == "right"
    victim = processes_of(graders)[whom]
    victim.send_signal(number)
    time.sleep(0.1)
    assert graders.grade("math", r"\boxed{x-1+2}", "x+1").outcome == "right"


@pytest.mark.parametrize("whom", [0, 1], ids=["the worker", "its child"])
def test_a_worker_killed_at_work_costs_at_most_its_answer(whom: int) -> None:
    """Killed while it grades again and again: right answers are graded right, or could not be graded; never wrong."""
    with Graders(1) as graders:
        assert graders.grade(*RIGHT).outcome == "right"
        done = threading.Event()

        def kill() -> None:
            while not done.is_set():
                time.sleep(0.05)
                try:
                    processes = processes_of(graders)
                    if len(processes) > whom:
                        processes[whom].kill()
                        time.sleep(3.0)  # or no worker would ever start
                except psutil.NoSuchProcess:
                    pass

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            verdicts = graders.grade_all([("math", rf"\boxed{{{n}+x-{n - 1}}}", "x+1") for n in range(2, 60)])
        finally:
            done.set()
            killer.join()
    outcomes = [verdict.outcome for verdict in verdicts]
    assert "wrong" not in outcomes
    assert outcomes.count("right") > 50


def test_equal_answers_are_graded_once(warm: Graders) -> None:
    verdicts = warm.grade_all([("math", SLOW_ANSWER, "x+1")] * 200)
    assert {verdict.outcome for verdict in verdicts} == {"wrong"}
    begun = time.monotonic()
    warm.grade_all([("math", SLOW_ANSWER, "x+1")] * 200)
    assert time.monotonic() - begun < WALL_SECONDS * 50  # 200 hangs one after the other would take four times that


def test_no_worker_starts_before_an_answer_needs_one(graders: Graders) -> None:
    graders.grade_all([("gsm8k", "18", "18"), ("math", r"\boxed{\frac12}", "0.5"), ("math", r"\boxed{3}", "4")])
    assert fault_of_truth("math", "x+1") is None
    assert processes_of(graders) == []
    with pytest.raises(ValueError, match="at least 1"):
        Graders(-1)


def test_close_ends_all_processes_and_a_later_answer_starts_new_ones(graders: Graders) -> None:
    graders.grade_all([RIGHT, ("math", r"\boxed{2+x}", "x+1")])
    processes = processes_of(graders)
    assert len(processes) == 2
    graders.close()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert alive == []
    assert graders.grade("math", r"\boxed{2+x}", "2 + x + y - y").outcome == "right"


PARENT = """
import sys, time
from smoltulu.tasks.verifiers import Graders
graders = Graders(1)
graders.grade("math", r"\\boxed{1+x}", "x+1")
print(graders._workers[0]._process.pid, flush=True)
if "hang" in sys.argv:
    graders.grade("math", r"\\boxed{9^{9^{9^9}}}", "x+1")
time.sleep(600)
"""


@pytest.mark.parametrize("state", ["idle", "hang"])
def test_workers_die_with_a_killed_parent(tmp_path: Path, state: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, state], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    processes = [worker, *worker.children()]
    assert len(processes) == 2
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []


def test_a_forked_process_has_workers_of_its_own(warm: Graders) -> None:
    assert warm.grade(*RIGHT).outcome == "right"
    child = os.fork()
    if child == 0:
        outcome = warm.grade("math", r"\boxed{x+2-1}", "x+1").outcome
        warm.close()
        os._exit(0 if outcome == "right" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert warm.grade("math", r"\boxed{x+3-2}", "x+1").outcome == "right"


def test_an_alarm_of_the_parent_rings(warm: Graders) -> None:
    """Prefect's timeouts are alarms: math-verify in this process would cancel them."""
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        verdicts = warm.grade_all([RIGHT, ("math", SLOW_ANSWER, "x+2")])
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 and len(rung) == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert [verdict.outcome for verdict in verdicts] == ["right", "wrong"]


def test_a_verdict_that_nobody_waited_for_is_not_the_next_answers(warm: Graders) -> None:
    """An alarm, or Ctrl-C, in the midst of grading leaves a worker that still answers."""

    def give_up(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, give_up)
    try:
        for delay in (0.002, 0.004, 0.01):
            signal.setitimer(signal.ITIMER_REAL, delay)
            with contextlib.suppress(KeyboardInterrupt):
                warm.grade("math", rf"$\boxed{{(a+b+c+d+e)^7+{delay}}}$", rf"(e+d+c+b+a)^7+{delay}\cdot 1")
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert warm.grade("math", rf"\boxed{{\sqrt{{17}}+{delay}}}", rf"\sqrt{{16}}+{delay}").outcome == "wrong"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Graders().num_workers
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(alone))
    assert Graders().num_workers == 1


def test_grading_works_in_any_thread(warm: Graders) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(warm.grade("math", rf"\boxed{{x+{n}-{n}}}", "x").outcome))
        for n in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["right"] * 5


def test_a_worker_sees_no_secret(graders: Graders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    graders.grade(*RIGHT)
    for process in processes_of(graders):
        assert "HF_TOKEN" not in process.environ()


def test_a_language_has_one_verdict() -> None:
    """langdetect draws at random: this text got several languages in one process."""
    truth = json.dumps({"func_name": "validate_response_language", "language": "de"})
    text = "Guten Tag an alle hier im Haus, wir freuen uns sehr."
    assert grade("ifeval", text, truth).outcome == "right"
    assert grade("ifeval", text, truth.replace('"de"', '"German"')).outcome == "right"
    assert grade("ifeval", text, truth.replace('"de"', '"en"')).outcome == "wrong"
    assert grade("ifeval", "12 34", truth).reason == "no language can be told"
    mixed = "otto anna 42 okay"
    assert len({Graders(1).grade("ifeval@paper", mixed, truth).reason for _ in range(3)}) == 1


def test_importing_the_verifiers_imports_nothing_heavy() -> None:
    code = (
        "import sys, smoltulu.tasks.verifiers as v; v.grade('math', r'\\boxed{\\frac12}', '0.5');"
        "print([n for n in ('sympy', 'math_verify', 'langdetect', 'torch', 'transformers') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
