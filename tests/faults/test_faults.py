"""A bounded sample of the fault campaign (docs/faults.md), from the world to SFT, and the checks that it rests on."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from smoltulu.artifacts.checkpoints import fault, mark_complete, newest_checkpoint
from smoltulu.artifacts.store import Missing
from tests.faults import damage, kills
from tests.faults.campaign import attempt, make_baseline, table
from tests.faults.draw import Draw, Fault
from tests.faults.sandbox import UP_TO_SFT, Sandbox


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return make_baseline(tmp_path_factory.mktemp("faults"), UP_TO_SFT)


def sample(baseline: Sandbox, home: Path) -> list[Fault]:
    """Faults of the kinds that differ most; instants drawn by a fixed seed."""
    draw = Draw(baseline, seed=0, home=home)
    rng = random.Random(0)
    step = functools.partial(kills.at_steps, node="sft", seconds=rng.random() * 0.1)
    draw.add("SIGKILL of the parent", "sft", functools.partial(step, victim="parent", steps=[rng.randint(4, 15)]))
    draw.add("SIGKILL of parent and child", "sft, twice", functools.partial(step, victim="both", steps=[4, 11]))
    instant = functools.partial(kills.at_an_instant, node="world", victim="child", seconds=0.05)
    draw.add("SIGKILL of the child", "world", instant)
    draw.checkpoint(rng)
    draw.commit(rng)
    optimizer = "work/checkpoints/checkpoint-*/optimizer.pt"
    for kind, pattern in ((damage.flipped_work, optimizer), (damage.flipped_artifact, "gen-*/manifest.json")):
        draw.add("flipped bit", pattern, functools.partial(kind, node="sft", pattern=pattern, rng=rng))
    draw.add("disk full", "sft", functools.partial(damage.full_disk, node="sft", share=0.5))
    return draw.faults


def test_a_sample_of_the_campaign_gives_the_weights_of_the_unbroken_run(baseline: Sandbox, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        tried = list(pool.map(lambda fault: attempt(fault, baseline, tmp_path), sample(baseline, tmp_path)))
    told = "\n".join(one.line() for one in tried)
    assert not [one for one in tried if one.is_wrong], f"{told}\n{table(tried)}"
    assert sum(one.result.num_kills for one in tried) >= 6, told
    assert [one for one in tried if one.result.lost_steps], f"no kill cost a step, so none hit a training:\n{told}"


def test_nothing_is_made_from_damaged_bytes(baseline: Sandbox, tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path / "here", UP_TO_SFT)
    result = damage.flipped_input(sandbox, baseline, "base-model", "sft", random.Random(0))
    assert result.problems == []


def test_killed_parent_of_two_ranks_leaves_no_process(baseline: Sandbox, tmp_path: Path) -> None:
    """torchrun stands between the runner and the ranks, and must die with the runner."""
    sandbox = Sandbox(tmp_path / "here", UP_TO_SFT)
    sandbox.copy_from(baseline, without="sft")
    run = sandbox.start(**{"compute.num_processes": 2, "compute.per_device_train_batch_size": 8})
    deadline = time.monotonic() + 600
    while sandbox.last_step("sft") < 1:
        assert time.monotonic() < deadline and run.process.poll() is None, run.text
        time.sleep(0.02)
    assert len(sandbox.processes()) == 3
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    assert sandbox.num_orphans() == 0


def test_every_flipped_bit_of_a_manifest_is_seen(baseline: Sandbox, tmp_path: Path) -> None:
    """A score lies in no file that has a digest: the manifest has its own."""
    sandbox = Sandbox(tmp_path / "here", UP_TO_SFT)
    sandbox.copy_from(baseline)
    path = next(sandbox.folder("sft").glob("gen-*/manifest.json"))
    before, whole = path.read_bytes(), sandbox.found("sft")
    unseen = []
    for position in random.Random(0).sample(range(len(before)), 300):
        damaged = bytearray(before)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        found = sandbox.found("sft")
        # Another spelling of the same value is no damage.
        if not isinstance(found, Missing) and found != whole:
            unseen.append(before[max(0, position - 40) : position + 40])
    assert unseen == []


def test_a_checkpoint_with_other_bytes_of_the_same_size_is_passed_over(tmp_path: Path) -> None:
    for step in (10, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(bytes(1000))
        mark_complete(folder)
    damage.flip(tmp_path / "checkpoint-20" / "optimizer.pt", random.Random(0))
    assert newest_checkpoint(tmp_path) == (20, tmp_path / "checkpoint-20")
    assert newest_checkpoint(tmp_path, full=True) == (10, tmp_path / "checkpoint-10")
    assert fault(tmp_path / "checkpoint-20", full=True) == "optimizer.pt has other bytes than were written"


def test_processes_finds_the_stage_of_this_store_only(baseline: Sandbox, tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path / "here", UP_TO_SFT)
    sandbox.copy_from(baseline, without="sft")
    run = sandbox.start()
    while not sandbox.processes():
        assert run.process.poll() is None
        time.sleep(0.01)
    (child,) = sandbox.processes()
    assert baseline.processes() == [] and psutil.Process(run.process.pid).children() == [child]
    assert json.loads((sandbox.folder("sft") / "work" / "job.json").read_text())["parent_pid"] == run.process.pid
    run.process.kill()
    run.process.wait()
    assert sandbox.num_orphans() == 0
