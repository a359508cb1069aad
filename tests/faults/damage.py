"""Faults that kill nobody: flipped bits, torn and foreign manifests, full or read-only disks, two producers, clocks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from smoltulu.artifacts.checkpoints import newest_checkpoint
from smoltulu.artifacts.layout import MANIFEST
from smoltulu.artifacts.upkeep.catalogue import Catalogue
from smoltulu.artifacts.upkeep.verify import verify_artifacts
from tests.faults.kills import Result, Victim, Watch, finish
from tests.faults.sandbox import Sandbox

DAY = 86_400.0
#: What an interrupted training leaves behind, by a pattern below the node's folder.
WORK_FILES = (
    "work/checkpoints/checkpoint-*/shards/rank-0-of-1.safetensors",
    "work/checkpoints/checkpoint-*/state.json",
    "work/checkpoints/checkpoint-*/trainer_state.json",
    "work/checkpoints/checkpoint-*/.complete",
    "work/datasets/**/*.arrow",
    "work/datasets/.complete",
    "work/logs/history.jsonl",
    "work/environment.json",
    "work/job.json",
    "work/generation",
)
#: What a finished artifact consists of: node, pattern.
ARTIFACT_FILES = (
    ("sft", "gen-*/model/model.safetensors"),
    ("sft", "gen-*/model/tokenizer.json"),
    ("sft", "gen-*/logs/history.jsonl"),
    ("sft", "gen-*/manifest.json"),
    ("sft", "spec.json"),
    ("sft", "current"),
    ("sft", "lock"),
    ("dataset-sft", "gen-*/rows.parquet"),
    ("evaluation-sft", "gen-*/manifest.json"),
    ("evaluation-sft", "gen-*/*.json*"),
    ("publish", "gen-*/model/model.safetensors"),
)


def flip(path: Path, rng: random.Random) -> str:
    """Change one bit of a file, its size kept; says which."""
    data = bytearray(path.read_bytes())
    position, bit = rng.randrange(len(data)), rng.randrange(8)
    data[position] ^= 1 << bit
    path.write_bytes(data)
    return f"{path.name}, bit {bit} of byte {position} of {len(data)}"


def flipped_artifact(sandbox: Sandbox, baseline: Sandbox, node: str, pattern: str, rng: random.Random) -> Result:
    """A byte of a finished artifact; found by `smoltulu verify` at the latest, then made again."""
    sandbox.copy_from(baseline)
    path = _one(sandbox.folder(node), pattern, rng)
    flip(path, rng)
    findings = verify(sandbox)
    result = Result()
    inside = path.parent != sandbox.folder(node)
    if inside and not any(finding.status == "damaged" for finding in findings):
        result.problems.append(f"{path.name}: the check of the store did not see it")
    return finish(sandbox, baseline, node, result)


def flipped_input(sandbox: Sandbox, baseline: Sandbox, node: str, below: str, rng: random.Random) -> Result:
    """A byte of a model from which another is about to be made: nothing may be made of it, verified or not."""
    sandbox.copy_from(baseline, without=below)
    flip(_one(sandbox.folder(node), "gen-*/model/model.safetensors", rng), rng)
    code, run = sandbox.run()
    result = Result()
    if code == 0 or "damaged" not in run.text:
        result.problems.append(
            f"{below} was made from damaged bytes, or the message does not say so: {run.text[-300:]}"
        )
    # The first run set the damaged one aside, this one makes it and what stands on it.
    code, run = sandbox.run()
    remade = {name for name, outcome in run.outcomes().items() if outcome != "cached"}
    if code or remade != {node, *sandbox.left_out}:
        result.problems.append(f"made again: {sorted(remade)}, status {code}")
    result.problems += sandbox.differences(baseline)
    return result


def flipped_work(sandbox: Sandbox, baseline: Sandbox, node: str, pattern: str, rng: random.Random) -> Result:
    """A byte of what an interrupted training left: it goes on from something whole, or from the start."""
    sandbox.copy_from(baseline, without=node)
    run = sandbox.start()
    watch = Watch(sandbox, run, node)
    checkpoints = sandbox.folder(node) / "work" / "checkpoints"
    two = 2 * sandbox.save_steps(node)
    watch.until(lambda: (newest_checkpoint(checkpoints) or (0,))[0] >= two)
    Victim("both").kill(run, watch.child)
    watch.end()
    result = Result(num_kills=1, num_orphans=sandbox.num_orphans())
    newest = newest_checkpoint(checkpoints)
    assert newest is not None
    flip(_one(sandbox.folder(node), pattern.replace("checkpoint-*", newest[1].name), rng), rng)
    return finish(sandbox, baseline, node, result)


def damaged_manifest(sandbox: Sandbox, baseline: Sandbox, node: str, how: str) -> Result:
    """A manifest that is truncated, empty, gone, or of a newer schema version."""
    sandbox.copy_from(baseline)
    path = _one(sandbox.folder(node), f"gen-*/{MANIFEST}", random.Random(0))
    text = path.read_text()
    if how == "gone":
        path.unlink()
    elif how == "newer":
        path.write_text(json.dumps({**json.loads(text), "schema_version": 99, "new_field": True}))
    else:
        path.write_text(text[: {"truncated": len(text) // 2, "empty": 0}[how]])
    before = path.read_bytes() if how == "newer" else b""
    result = finish(sandbox, baseline, node, Result())
    if how == "newer" and path.read_bytes() != before:
        result.problems.append("an artifact of newer code was changed")
    return result


def wrong_clock(sandbox: Sandbox, baseline: Sandbox, node: str, role: str, shift: float) -> Result:
    """Made with a clock that is wrong by `shift` seconds, killed, gone on with by one that is right."""
    sandbox.copy_from(baseline, without=node)
    run = sandbox.start({"role": role, "shift": shift})
    watch = Watch(sandbox, run, node)
    two = 2 * sandbox.save_steps(node)
    watch.until(lambda: sandbox.last_step(node) >= two)
    Victim("both").kill(run, watch.child)
    watch.end()
    result = Result(num_kills=1, num_orphans=sandbox.num_orphans())
    return finish(sandbox, baseline, node, result)


def wrong_times(sandbox: Sandbox, baseline: Sandbox, shift: float) -> Result:
    """Every file of the store is from another time, the future included."""
    sandbox.copy_from(baseline)
    for path in sandbox.root.rglob("*"):
        os.utime(path, (time.time() + shift,) * 2)
    return finish(sandbox, baseline, "", Result())


def two_producers(sandbox: Sandbox, baseline: Sandbox, node: str, killed: bool) -> Result:
    """Two runs want the same artifact: one makes it. Where that one is killed, the other goes on with its work."""
    sandbox.copy_from(baseline, without=node)
    result = Result(limit=sandbox.save_steps(node))
    runs = [sandbox.start(), sandbox.start()]
    watches = [Watch(sandbox, run, node) for run in runs]
    done = 0
    if killed:
        step = sandbox.save_steps(node) + 1
        while all(watch.look() for watch in watches) and done < step:
            done = sandbox.last_step(node)
            time.sleep(0.005)
        first = next((watch for watch in watches if watch.child is not None), watches[0])
        Victim("parent").kill(first.run, first.child)
        first.end()
        done = max(done, first.last_step)
        result.num_kills = 1
        # Not `num_orphans`: the other run's child is alive, and should be.
        runs.remove(first.run)
    codes = [run.wait() for run in runs]
    outcomes = [run.outcomes().get(node) for run in runs]
    made = [outcome for outcome in outcomes if outcome != "cached"]
    waited = any("waiting for" in run.text for run in runs)
    if any(codes) or len(made) != 1 or not waited:
        result.problems.append(f"status {codes}, outcomes {outcomes}, waited: {waited}")
    if killed and outcomes == ["resumed"]:
        result.lost_steps = max(0, done - sandbox.manifest(node).resumed_from_steps[-1])
    result.num_orphans += sandbox.num_orphans()
    return finish(sandbox, baseline, node, result)


def full_disk(sandbox: Sandbox, baseline: Sandbox, node: str, share: float) -> Result:
    """A tmpfs on which `share` of what a node needs fits; then room is made."""
    used = _num_blocks(baseline.root) * 4096
    needed = _num_blocks(baseline.folder(node)) * 4096
    with _tmpfs(sandbox.home / "disk", used + (1 << 20)) as mount:
        if mount is None:
            return Result(skipped="mounting a tmpfs needs root")
        tight = sandbox.at(mount, logs=sandbox.home)
        tight.copy_from(baseline, without=node)
        used = _num_blocks(tight.root) * 4096
        _remount(mount, f"size={used + int(needed * share) + 65_536}")
        code, run = tight.run()
        result = Result()
        if code == 0:
            result.is_missed = True
        elif "disk is full" not in run.text and "free some" not in run.text:
            result.problems.append(f"the message does not say that the disk is full: {run.text[-400:]}")
        _remount(mount, f"size={used + (256 << 20)}")
        result.num_orphans = tight.num_orphans()
        return finish(tight, baseline, node, result)


def killed_on_a_full_disk(
    sandbox: Sandbox, baseline: Sandbox, node: str, victim: str, step: int, share: float
) -> Result:
    """From a step on there is room for `share` of a checkpoint: its writer is killed as it tidies up what did not fit.

    safetensors asks for the room of a whole file, and writes nothing where it is not there.
    """
    [weights] = baseline.folder(node).glob("gen-*/model/model.safetensors")
    needed = 3 * weights.stat().st_size  # with Adam's moments
    # Enough for what a training asks for before it begins.
    with _tmpfs(sandbox.home / "disk", 256 << 20) as mount:
        if mount is None:
            return Result(skipped="mounting a tmpfs needs root")
        tight = sandbox.at(mount, logs=sandbox.home)
        tight.copy_from(baseline, without=node)
        mark = sandbox.home / "killed"
        fault = {"role": "child", "under": str(tight.folder(node)), "nth": 1, "full": needed, "mark": str(mark)}
        run = tight.start(fault | {"both": victim == "both", "other": victim == "parent"})
        watch = Watch(tight, run, node)
        result = Result(limit=tight.save_steps(node))
        if watch.until(lambda: watch.child is not None and tight.last_step(node) >= step):
            _shrink(mount, int(needed * share))
        watch.end()
        result.num_kills = int(mark.exists())
        result.is_missed = not result.num_kills
        if run.process.returncode == 0:
            result.problems.append("the disk was full, and the run says nothing")
        result.num_orphans = tight.num_orphans()
        _remount(mount, "size=256M")
        # A full disk may cost a checkpoint: the one that did not fit.
        result.limit *= 2
        return finish(tight, baseline, node, result, watch.last_step)


def _shrink(mount: Path, room: int) -> None:
    """Leave `room` bytes on a tmpfs that is written to meanwhile."""
    for more in range(0, 8 << 20, 65_536):
        size = shutil.disk_usage(mount).used + room + more
        if subprocess.run(["mount", "-o", f"remount,size={size}", str(mount)], capture_output=True).returncode == 0:
            return
    raise AssertionError(f"{mount} cannot be made smaller")


def read_only(sandbox: Sandbox, baseline: Sandbox, node: str) -> Result:
    """A read-only store serves what is finished, says clearly what it cannot make, and is as good as before."""
    with _tmpfs(sandbox.home / "disk", 256 << 20) as mount:
        if mount is None:
            return Result(skipped="mounting a tmpfs needs root")
        store = sandbox.at(mount / "here", logs=sandbox.home)
        store.copy_from(baseline)
        result = Result()
        _remount(mount, "ro")
        code, run = store.run()
        if code or set(run.outcomes().values()) != {"cached"}:
            result.problems.append(f"finished artifacts of a read-only store are not used: {run.text[-400:]}")
        _remount(mount, "rw")
        shutil.rmtree(store.folder(node))
        _remount(mount, "ro")
        code, run = store.run()
        if code == 0 or "read-only" not in run.text:
            result.problems.append(f"the message does not say that the store is read-only: {run.text[-400:]}")
        _remount(mount, "rw")
        return finish(store, baseline, node, result)


def verify(sandbox: Sandbox) -> list:
    """`smoltulu verify` on everything: damaged generations are set aside."""
    catalogue = Catalogue(sandbox.root)
    return list(verify_artifacts(catalogue, catalogue.refs, report_only=False))


def _one(folder: Path, pattern: str, rng: random.Random) -> Path:
    found = sorted(path for path in folder.glob(pattern) if path.is_file() and path.stat().st_size)
    assert found, f"nothing matches {pattern} in {folder}"
    return rng.choice(found)


def _num_blocks(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) + 1 for path in folder.rglob("*"))


def _remount(mount: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(mount)], check=True)


@contextlib.contextmanager
def _tmpfs(mount: Path, size: int) -> Iterator[Path | None]:
    """A file system of a given size in memory; None where this user may not mount one."""
    mount.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)
