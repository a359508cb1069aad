"""The campaign: each fault is tried in a store of its own, and a table says what came of them.

Killed or stopped at any instant, the same command goes on with the faults that were not tried yet.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from smoltulu.flows.machine import machine
from tests import ROOT
from tests.faults import served, shared
from tests.faults.draw import PREFECT_KINDS, SIZES, WAITING_KINDS, Draw, Fault
from tests.faults.kills import Result
from tests.faults.results import Results, ResultsError, Tried, code_digest, never_hit, table
from tests.faults.sandbox import SHRUNKEN, Sandbox, limits
from tests.faults.variants import Baselines

_NUM_WAITING = 4
#: The unbroken run is given up after this many times what it takes to start a stage's process, for each stage.
_STARTS_PER_STAGE = 40


def make_baseline(home: Path, overrides: dict[str, Any]) -> Sandbox:
    """An unbroken run, its file-system events recorded in `events.txt`; the limits follow from how long it took."""
    baseline = Sandbox(home / "baseline", overrides)
    limits.run = max(limits.run, _STARTS_PER_STAGE * len(baseline.graph.nodes) * _seconds_to_start())
    began = time.monotonic()
    code, run = baseline.run({"record": str(home / "baseline" / "events.txt")})
    if code:
        raise SystemExit(f"the unbroken run failed:\n{run.text[-3000:]}")
    (home / "baseline" / "seconds").write_text(str(time.monotonic() - began))
    measure(baseline)
    return baseline


def measure(baseline: Sandbox) -> None:
    """Take the limits from an unbroken run."""
    limits.measure(float((baseline.home / "seconds").read_text()), len(baseline.graph.nodes))


def _seconds_to_start() -> float:
    """What the process of a stage takes to be there: the unit before there is a better one."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import smoltulu.tasks.stages, trl"], cwd=ROOT, check=True)
    return time.monotonic() - began


def attempt(fault: Fault, baseline: Sandbox, home: Path, keep: bool = False) -> Tried:
    """Try one fault in a store of its own; it is kept where something is wrong."""
    folder = home / f"fault-{fault.number:03d}"
    _remove(folder)
    began = time.monotonic()
    try:
        result = fault.attempt(baseline.at(folder), baseline)
    except Exception:
        result = Result(problems=[traceback.format_exc()])
    tried = Tried(fault, result, time.monotonic() - began)
    if not tried.is_wrong and not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return tried


def _remove(folder: Path) -> None:
    """What a campaign that was killed left of a fault, a mounted disk included."""
    if os.path.ismount(folder / "disk"):
        subprocess.run(["umount", "-l", str(folder / "disk")], check=False)
    shutil.rmtree(folder, ignore_errors=True)


def default_home(seed: int, size: str) -> Path:
    """Where a campaign works and goes on: one folder for a seed, a size and a state of the code."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "smoltulu" / "faults" / f"{size}-{seed}-{code_digest()}"


@contextlib.contextmanager
def _only_one(home: Path) -> Iterator[None]:
    """Hold the folder; end what a campaign that was killed left running there."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"a campaign works in {home} already; wait for it, or name another --home") from None
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get("SMOLTULU_STORE", "").startswith(f"{home}/"):
                    process.kill()
        yield


def listing(faults: list[Fault]) -> str:
    """Every fault, then how many there are of each kind."""
    counts = Counter(fault.kind for fault in faults)
    width = max(map(len, counts), default=0)
    return "\n".join([
        *(f"{fault.number:3d}  {fault.kind}: {fault.text}" for fault in faults),
        "",
        *(f"{kind:{width}} {num:4d}" for kind, num in [*counts.items(), ("all", len(faults))]),
    ])  # fmt: skip


def prepared(home: Path, overrides: dict[str, Any]) -> Sandbox:
    """The unbroken run of the whole recipe, made here or by an earlier campaign in this folder."""
    baseline = Sandbox(home / "baseline", overrides)
    if not (baseline.home / "done").exists():
        shutil.rmtree(baseline.home, ignore_errors=True)
        baseline = make_baseline(home, overrides)
        shared.seed(baseline)
        print(
            f"unbroken run of {len(baseline.graph.nodes)} stages: {(baseline.home / 'seconds').read_text():.4} s",
            flush=True,
        )
        (baseline.home / "done").touch()
    measure(baseline)
    return baseline


class Campaign:
    """Tries faults, several at a time."""

    def __init__(self, baselines: Baselines, home: Path, results: Results) -> None:
        self.baselines, self.home, self.results = baselines, home, results
        self.tried: list[Tried] = []
        self.is_over = threading.Event()

    def one(self, fault: Fault, keep: bool = False) -> None:
        if self.is_over.is_set():
            return
        try:
            baseline = self.baselines.of(fault.variant)
        except Exception:
            tried = Tried(fault, Result(problems=[f"no unbroken run to compare with: {traceback.format_exc()}"]), 0.0)
        else:
            tried = attempt(fault, baseline, self.home, keep)
        # What was interrupted with the campaign says nothing, and is tried again. Ctrl-C may reach a run before us.
        if not (self.is_over.wait(1.0) if tried.is_wrong else self.is_over.is_set()):
            self.results.add(tried)
            self.tried.append(tried)
            print(tried.line(), flush=True)

    def run(self, faults: list[Fault], num_jobs: int, keep: bool = False) -> None:
        """Try all; KeyboardInterrupt ends it."""
        with (
            ThreadPoolExecutor(num_jobs) as busy,
            ThreadPoolExecutor(_NUM_WAITING) as waiting,
            ThreadPoolExecutor(1) as prefect,
        ):
            pools = {**dict.fromkeys((*PREFECT_KINDS, *served.KINDS), prefect), **dict.fromkeys(WAITING_KINDS, waiting)}
            futures: list[Future[None]] = [
                pools.get(fault.kind, busy).submit(self.one, fault, keep) for fault in faults
            ]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self.is_over.set()
                _end_runs()
                raise


def _end_runs() -> None:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()


def _interrupted(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends it twice; the ending must not be interrupted
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="kills only, 12 of them, no Prefect, no S3")
    parser.add_argument("--full", action="store_true", help="500 faults and more, for hours")
    parser.add_argument(
        "--only", type=int, nargs="+", metavar="NUMBER", help="these faults, tried or not; their stores are kept"
    )
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--home", type=Path, help="folder to work in; what was done there is not done again")
    parser.add_argument("--list", action="store_true", help="say which faults would be tried")
    given = parser.parse_args(arguments)
    if given.quick and given.full:
        parser.error("--quick and --full are two sizes; give one")
    size = "quick" if given.quick else "full" if given.full else "usual"
    home = (given.home or default_home(given.seed, size)).absolute()
    faults = Draw(Sandbox(home / "baseline", SHRUNKEN), given.seed, home).draw(SIZES[size])
    if given.only:
        faults = [fault for fault in faults if fault.number in given.only]
    if given.list:
        print(listing(faults))
        return 0
    signal.signal(signal.SIGTERM, _interrupted)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # the S3 double names every request
    with _only_one(home):
        return _campaign(given, size, home, faults)


def _campaign(given: argparse.Namespace, size: str, home: Path, faults: list[Fault]) -> int:
    began = time.monotonic()
    results = Results(home, {"seed": given.seed, "size": size, "code": code_digest()})
    try:
        before = results.read(Draw(Sandbox(home / "baseline", SHRUNKEN), given.seed, home).draw(SIZES[size]))
    except ResultsError as error:
        raise SystemExit(str(error)) from None
    left = [fault for fault in faults if given.only or fault.number not in before]
    num_before = len(faults) - len(left)
    print(f"seed {given.seed}, {size}: {len(faults)} faults, {num_before} tried before, in {home}", flush=True)
    try:
        baseline = prepared(home, SHRUNKEN)
        campaign = Campaign(Baselines(home, baseline), home, results)
        campaign.run(left, given.jobs, keep=bool(given.only))
    except KeyboardInterrupt:
        _end_runs()
        print(f"\ninterrupted; the same command goes on (in {home})")
        return 130
    finally:
        if (home / "prefect").exists():
            machine.down(home / "prefect", say=lambda text: None)
    now = {one.fault.number: one for one in campaign.tried}
    tried = [{**before, **now}[fault.number] for fault in faults]
    print(f"\n{table(tried)}\n\n{(time.monotonic() - began) / 60:.0f} min, seed {given.seed}")
    idle = never_hit(tried)
    for kind in idle:
        print(f"{kind}: nobody was killed, so nothing of this kind was tried: mend the campaign")
    wrong = [one for one in tried if one.is_wrong]
    for found in wrong:
        print(found.line())
    if wrong:
        again = f"python -m tests.faults --seed {given.seed} --home {home}"
        again += "" if size == "usual" else f" --{size}"
        print(f"their stores are in {home}; again: {again} --only NUMBER")
    elif not given.home and not given.only:
        shutil.rmtree(home)
    return 1 if wrong or idle else 0
