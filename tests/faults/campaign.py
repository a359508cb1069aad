"""The campaign: each fault is tried in a store of its own, and a table says what came of them."""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoltulu.flows.machine import machine
from tests.faults import served, shared
from tests.faults.draw import Draw, Fault
from tests.faults.kills import Result
from tests.faults.sandbox import SHRUNKEN, Sandbox

#: After a killed upload the next one waits until the lease is stale: that costs a minute, but no processor.
_WAITING_KINDS = ("SIGKILL in an upload", "SIGKILL in an upload to S3")
_NUM_WAITING = 4


@dataclass
class Tried:
    """A fault and what came of it."""

    fault: Fault
    result: Result
    seconds: float

    @property
    def is_wrong(self) -> bool:
        return bool(self.result.problems) or self.result.num_orphans > 0

    def line(self) -> str:
        result = self.result
        if result.skipped:
            what = f"skipped: {result.skipped}"
        elif self.is_wrong:
            what = f"WRONG ({result.num_orphans} orphans): {'; '.join(result.problems)}"
        elif result.is_missed:
            what = "the run was over before"
        else:
            what = "recovered" + (f", {result.lost_steps} of at most {result.limit} steps lost" if result.limit else "")
        return f"{self.fault.number:3d}  {self.fault.kind}: {self.fault.text}: {what} ({self.seconds:.0f} s)"


def table(tried: list[Tried]) -> str:
    """What came of the faults, by kind."""
    lines = [
        "| fault | tried | kills | recovered | most steps lost (limit) | wrong results | orphans |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    kinds = list(dict.fromkeys(one.fault.kind for one in tried))
    for kind in [*kinds, "all"]:
        these = [one for one in tried if kind in (one.fault.kind, "all") and not one.result.skipped]
        lost = max(these, key=lambda one: one.result.lost_steps - one.result.limit, default=None)
        trained = [one for one in these if one.result.limit]
        worst = max((one.result.lost_steps for one in trained), default=0)
        limit = max((one.result.limit for one in trained), default=0)
        num_skipped = sum(one.fault.kind == kind for one in tried) - len(these) if kind != "all" else 0
        lines.append(
            f"| {kind}{f' ({num_skipped} skipped)' if num_skipped else ''} | {len(these)} "
            f"| {sum(one.result.num_kills for one in these)} | {sum(not one.is_wrong for one in these)} "
            f"| {f'{worst} ({limit})' if lost and limit else '-'} "
            f"| {sum(bool(one.result.problems) for one in these)} | {sum(one.result.num_orphans for one in these)} |"
        )
    return "\n".join(lines)


def make_baseline(home: Path, overrides: dict[str, Any]) -> Sandbox:
    """An unbroken run, its file-system events recorded in `events.txt`."""
    baseline = Sandbox(home / "baseline", overrides)
    code, run = baseline.run({"record": str(home / "baseline" / "events.txt")})
    if code:
        raise SystemExit(f"the unbroken run failed:\n{run.text[-3000:]}")
    return baseline


def attempt(fault: Fault, baseline: Sandbox, home: Path, keep: bool = False) -> Tried:
    """Try one fault in a store of its own; it is kept where something is wrong."""
    folder = home / f"fault-{fault.number:03d}"
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    try:
        result = fault.attempt(Sandbox(folder, baseline.overrides), baseline)
    except Exception:
        result = Result(problems=[traceback.format_exc()])
    tried = Tried(fault, result, time.monotonic() - began)
    if not tried.is_wrong and not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return tried


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-kills", type=int, default=75, help="SIGKILLs at least, those of the worker left out")
    parser.add_argument("--num-workers-killed", type=int, default=3, help="SIGKILLs of the Prefect worker")
    parser.add_argument("--quick", action="store_true", help="kills only, 12 of them, no Prefect, no S3")
    parser.add_argument(
        "--only", type=int, nargs="+", metavar="NUMBER", help="these faults of the seed; stores are kept"
    )
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--home", type=Path, help="folder to work in; a baseline that is there is used again")
    parser.add_argument("--list", action="store_true", help="say which faults would be tried")
    given = parser.parse_args(arguments)
    home = (given.home or Path(tempfile.mkdtemp(prefix="smoltulu-faults-"))).absolute()
    print(f"seed {given.seed}, stores in {home}", flush=True)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # the S3 double names every request

    began = time.monotonic()
    baseline = Sandbox(home / "baseline", SHRUNKEN)
    if not (home / "baseline" / "done").exists():
        shutil.rmtree(home / "baseline", ignore_errors=True)
        baseline = make_baseline(home, SHRUNKEN)
        print(f"unbroken run of {len(baseline.graph.nodes)} stages: {time.monotonic() - began:.0f} s", flush=True)
        (home / "baseline" / "done").touch()
    draw = Draw(baseline, given.seed, home)
    draw.uploads = shared.seed(baseline)
    draw.kills(12 if given.quick else given.num_kills)
    if not given.quick:
        draw.uploads_to_s3(2)
        draw.workers(given.num_workers_killed)
        draw.damages()
    faults = [fault for fault in draw.faults if not given.only or fault.number in given.only]
    if given.list:
        print("\n".join(f"{fault.number:3d}  {fault.kind}: {fault.text}" for fault in faults))
        return 0

    tried: list[Tried] = []

    def one(fault: Fault) -> None:
        tried.append(attempt(fault, baseline, home, keep=bool(given.only)))
        print(tried[-1].line(), flush=True)

    try:
        with (
            ThreadPoolExecutor(given.jobs) as busy,
            ThreadPoolExecutor(_NUM_WAITING) as waiting,
            ThreadPoolExecutor(1) as prefect,
        ):
            pools = {"SIGKILL of the Prefect worker": prefect, **dict.fromkeys(_WAITING_KINDS, waiting)}
            pools |= dict.fromkeys(served.KINDS, prefect)
            futures: list[Future[None]] = [pools.get(fault.kind, busy).submit(one, fault) for fault in faults]
            for future in futures:
                future.result()
    finally:
        if (home / "prefect").exists():
            machine.down(home / "prefect", say=lambda text: None)
    tried.sort(key=lambda one: one.fault.number)
    print(f"\n{table(tried)}\n\n{(time.monotonic() - began) / 60:.0f} min, seed {given.seed}")
    wrong = [one for one in tried if one.is_wrong]
    for found in wrong:
        print(found.line())
    if wrong:
        print(
            f"their stores are in {home}; again: python -m tests.faults --seed {given.seed} --home {home} --only NUMBER"
        )
    elif not given.home:
        shutil.rmtree(home)
    return 1 if wrong else 0
