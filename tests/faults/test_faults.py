"""A bounded sample of the fault campaign (docs/faults.md), from the world to SFT, and the checks that it rests on."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from smoltulu.artifacts.checkpoints import fault, mark_complete, newest_checkpoint
from smoltulu.artifacts.store import Missing
from tests.faults import damage, kills, stops
from tests.faults.campaign import Campaign, attempt, main, make_baseline
from tests.faults.draw import Draw, Fault
from tests.faults.kills import Result
from tests.faults.results import Results, ResultsError, Tried, never_hit, table
from tests.faults.sandbox import UP_TO_SFT, Limits, Sandbox, differing_files
from tests.faults.variants import VARIANTS, Baselines, said


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
    shards = "work/checkpoints/checkpoint-*/shards/*.safetensors"
    for kind, pattern in ((damage.flipped_work, shards), (damage.flipped_artifact, "gen-*/manifest.json")):
        draw.add("flipped bit", pattern, functools.partial(kind, node="sft", pattern=pattern, rng=rng))
    draw.add("disk full", "sft", functools.partial(damage.full_disk, node="sft", share=0.5))
    filled = functools.partial(damage.killed_on_a_full_disk, node="sft", victim="both", step=4, share=0.5)
    draw.add("SIGKILL on a full disk", "sft", filled)
    stopped = functools.partial(stops.stopped, node="sft", victim="both", step=5, seconds=1.0)
    draw.add("SIGSTOP", "sft", stopped)
    return draw.faults


def test_a_sample_of_the_campaign_gives_the_weights_of_the_unbroken_run(baseline: Sandbox, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        tried = list(pool.map(lambda fault: attempt(fault, baseline, tmp_path), sample(baseline, tmp_path)))
    told = "\n".join(one.line() for one in tried)
    assert not [one for one in tried if one.is_wrong], f"{told}\n{table(tried)}"
    assert sum(one.result.num_kills for one in tried) >= 6, told
    assert all(one.result.num_kills for one in tried if one.fault.kind == "SIGKILL on a full disk"), told
    assert [one for one in tried if one.result.lost_steps], f"no kill cost a step, so none hit a training:\n{told}"


def test_a_kind_that_never_kills_is_a_fault_of_the_campaign() -> None:
    def tried(kind: str, num_kills: int, skipped: str = "") -> Tried:
        fault = Fault(0, kind, "", lambda *_: Result())
        return Tried(fault, Result(num_kills=num_kills, skipped=skipped), 1.0)

    idle = [tried("SIGKILL on a full disk", 0)] * 4
    assert never_hit(idle) == ["SIGKILL on a full disk"]
    assert never_hit(idle[:3]) == never_hit([*idle, tried("SIGKILL on a full disk", 1)]) == []
    assert never_hit([tried("SIGSTOP", 0)] * 9) == never_hit([tried("SIGKILL of gc", 0, "needs root")] * 9) == []


def test_nothing_is_made_from_damaged_bytes(baseline: Sandbox, tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path / "here", UP_TO_SFT)
    result = damage.flipped_input(sandbox, baseline, "base-model", "sft", random.Random(0))
    assert result.problems == []


def test_killed_parent_of_two_ranks_leaves_no_process(baseline: Sandbox, tmp_path: Path) -> None:
    """The process that starts the ranks stands between the runner and them, and must die with the runner."""
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


def test_an_extension_that_was_killed_ends_with_the_weights_of_the_unbroken_one(
    baseline: Sandbox, tmp_path: Path
) -> None:
    unbroken = Baselines(tmp_path, baseline).of("extension")
    assert unbroken.manifest("sft").extends is not None and unbroken.graph.recipe.publish is None
    killed = functools.partial(kills.at_steps, node="sft", victim="child", steps=[17], seconds=0.0)
    one = attempt(Fault(1, "", "", said("extension", killed), "extension"), unbroken, tmp_path)
    assert not one.is_wrong and one.result.num_kills == 1, one.line()


def test_what_is_told_of_a_run_counts_as_what_is_made(baseline: Sandbox, tmp_path: Path) -> None:
    """Times and speeds differ from run to run; a step that is logged twice is a difference."""
    theirs = next(baseline.folder("sft").glob("gen-*"))
    mine = tmp_path / "gen-0001"
    shutil.copytree(theirs, mine)
    history = mine / "logs" / "history.jsonl"
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    faster = [{**row, "tokens_per_second": 1.0, "peak_memory_gb": 2.0} for row in rows]
    lineage = [{"node": "sft", "digest": "a", "metrics": {"loss": 1.0}, "finished_at": "now", "duration_seconds": 1.0}]
    for folder in (mine, tmp_path / "other"):
        (folder / "model").mkdir(parents=True, exist_ok=True)
        (folder / "model" / "lineage.json").write_text(json.dumps(lineage))
    history.write_text("".join(json.dumps(row) + "\n" for row in faster))
    assert differing_files(mine, theirs) == ["model/lineage.json"], "the baseline has none"
    history.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[-1]]))
    assert differing_files(mine, theirs) == ["logs/history.jsonl", "model/lineage.json"]
    slower = [{**lineage[0], "finished_at": "later", "duration_seconds": 2.0, "environment": {"git_commit": "c"}}]
    (tmp_path / "other" / "model" / "lineage.json").write_text(json.dumps(slower))
    assert "model/lineage.json" not in differing_files(mine, tmp_path / "other")
    (tmp_path / "other" / "model" / "lineage.json").write_text(json.dumps([{**slower[0], "digest": "b"}]))
    assert "model/lineage.json" in differing_files(mine, tmp_path / "other")


def test_limits_are_multiples_of_an_unbroken_run() -> None:
    quick, slow = Limits(), Limits()
    quick.measure(seconds=30, num_stages=30)
    slow.measure(seconds=3000, num_stages=30)
    assert quick == Limits()
    assert slow == Limits(run=30_000, orphan=300, flow=1000)


def made_up(tried: list[int], num: int = 4) -> list[Fault]:
    """Faults that note their number; the second one goes wrong."""

    def note(sandbox: Sandbox, baseline: Sandbox, number: int) -> Result:
        tried.append(number)
        return Result(num_kills=1, problems=["bad"] if number == 2 else [], at="then")

    return [Fault(n, "kind", f"number {n}", functools.partial(note, number=n)) for n in range(1, num + 1)]


def test_a_campaign_goes_on_with_what_was_not_tried(tmp_path: Path) -> None:
    tried: list[int] = []
    faults, results = made_up(tried), Results(tmp_path, {"seed": 0})
    baselines = Baselines(tmp_path, Sandbox(tmp_path / "baseline", UP_TO_SFT))
    assert results.read(faults) == {}
    Campaign(baselines, tmp_path, results).run(faults[:2], num_jobs=2)
    # Killed in the middle of a line.
    with results.file.open("a") as file:
        file.write('{"number": 3, "kind": "ki')

    again = Results(tmp_path, {"seed": 0})
    before = again.read(faults)
    assert [(n, one.is_wrong, one.result.at) for n, one in sorted(before.items())] == [
        (1, False, "then"),
        (2, True, "then"),
    ]
    campaign = Campaign(baselines, tmp_path, again)
    campaign.run([fault for fault in faults if fault.number not in before], num_jobs=1)
    assert sorted(tried) == [1, 2, 3, 4]
    everything = Results(tmp_path, {"seed": 0}).read(faults)
    assert sorted(everything) == [1, 2, 3, 4]
    assert table(list(everything.values())).endswith("| all | 4 | 4 | 3 | - | 1 | 0 |")


def test_what_ends_with_the_campaign_is_no_result(tmp_path: Path) -> None:
    results = Results(tmp_path, {"seed": 0})
    results.read([])
    campaign = Campaign(Baselines(tmp_path, Sandbox(tmp_path / "baseline", UP_TO_SFT)), tmp_path, results)

    def interrupted(sandbox: Sandbox, baseline: Sandbox) -> Result:
        campaign.is_over.set()
        return Result(problems=["its process was killed with the campaign"])

    faults = [Fault(1, "kind", "one", interrupted), *made_up([], 2)[1:]]
    campaign.run(faults, num_jobs=1)
    assert campaign.tried == [] and results.read(faults) == {}


def test_results_of_another_campaign_are_refused(tmp_path: Path) -> None:
    faults, tried = made_up([]), Results(tmp_path, {"seed": 0, "size": "usual"})
    tried.read(faults)
    Campaign(Baselines(tmp_path, Sandbox(tmp_path / "b", UP_TO_SFT)), tmp_path, tried).run(faults[:1], num_jobs=1)
    with pytest.raises(ResultsError, match=r"of another campaign: size usual, asked for full\. Name another folder"):
        Results(tmp_path, {"seed": 0, "size": "full"}).read(faults)
    others = [Fault(1, "kind", "another", faults[0].attempt)]
    with pytest.raises(ResultsError, match="of another list of faults: number 1 there is kind: number 1"):
        Results(tmp_path, {"seed": 0, "size": "usual"}).read(others)


@pytest.mark.parametrize(("size", "at_least"), [([], 121), (["--full"], 500)])
def test_the_list_has_every_kind(
    size: list[str], at_least: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is drawn from the seed and the recipe alone: nothing is run for it, and every machine has the same one."""
    assert main(["--list", "--home", str(tmp_path / "none"), *size]) == 0
    faults, _, counts = capsys.readouterr().out.strip().partition("\n\n")
    by_kind = {line[:-5].strip(): int(line[-5:]) for line in counts.splitlines()}
    assert by_kind.pop("all") == sum(by_kind.values()) == len(faults.splitlines()) >= at_least
    kinds = {variant.kind for variant in VARIANTS.values()}
    kinds |= {"SIGSTOP", "SIGSTOP with a lease", "SIGKILL on a full disk", "SIGKILL of the Prefect worker"}
    assert kinds <= by_kind.keys() and all(f": {name}: " in faults for name in VARIANTS)
    assert not (tmp_path / "none").exists()
