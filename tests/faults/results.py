"""What came of the faults of a campaign, in a file that grows by a line a fault: the same command goes on there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import ROOT
from tests.faults.draw import Fault
from tests.faults.kills import Result

#: Folders whose files decide what a fault does, and what comes of it.
_CODE = ("artifacts", "flows", "recipes", "schemas", "tasks", "tests")
_CODE_SUFFIXES = (".py", ".yaml", ".jinja")


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
        at = f" ({result.at})" if result.at else ""
        return f"{self.fault.number:3d}  {self.fault.kind}: {self.fault.text}{at}: {what} ({self.seconds:.0f} s)"


#: A kill may come too late, but not each of so many.
_OFTEN = 4


class ResultsError(ValueError):
    """A results file that is of another campaign."""


class Results:
    """The file `results.jsonl` of a campaign. First line: which campaign; then a line a fault that was tried."""

    def __init__(self, home: Path, campaign: dict[str, Any]) -> None:
        self.file, self.campaign = home / "results.jsonl", campaign
        self._lock = threading.Lock()

    def read(self, faults: list[Fault]) -> dict[int, Tried]:
        """What was tried of `faults`, by number. ResultsError where the file is of another campaign."""
        try:
            text = self.file.read_text()
        except FileNotFoundError:
            self._append(self.campaign)
            return {}
        records = [json.loads(line) for line in text.splitlines() if _is_whole(line)]
        if not text.endswith("\n"):
            self._append(None)  # a torn line is passed over: its fault is tried again
        given = records[0] if records else {}
        if given != self.campaign:
            differ = [name for name in self.campaign if given.get(name) != self.campaign[name]] or ["its first line"]
            raise ResultsError(
                f"{self.file} is of another campaign: {', '.join(f'{name} {given.get(name)}' for name in differ)}, "
                f"asked for {', '.join(str(self.campaign.get(name)) for name in differ)}. Name another folder with "
                "--home, or remove that one"
            )
        known = {fault.number: fault for fault in faults}
        tried = {}
        for record in records[1:]:
            fault = known.get(record["number"])
            if fault is None or fault.identity != (record["number"], record["kind"], record["text"]):
                raise ResultsError(
                    f"{self.file} is of another list of faults: number {record['number']} there is {record['kind']}: "
                    f"{record['text']}. Name another folder with --home, or remove that one"
                )
            tried[fault.number] = Tried(fault, Result(**record["result"]), record["seconds"])
        return tried

    def add(self, tried: Tried) -> None:
        number, kind, text = tried.fault.identity
        result = dataclasses.asdict(tried.result)
        self._append({"number": number, "kind": kind, "text": text, "seconds": tried.seconds, "result": result})

    def _append(self, record: dict[str, Any] | None) -> None:
        """One write, at the end, on disk before the next fault: None ends a torn line."""
        line = "\n" if record is None else json.dumps(record) + "\n"
        with self._lock:
            descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, line.encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _is_whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


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


def never_hit(tried: list[Tried]) -> list[str]:
    """Kinds that are to kill and killed nobody, however often: a fault of the campaign, which says nothing of them."""
    kills: dict[str, list[int]] = {}
    for one in tried:
        if one.fault.kind.startswith("SIGKILL") and not one.result.skipped:
            kills.setdefault(one.fault.kind, []).append(one.result.num_kills)
    return [kind for kind, numbers in kills.items() if len(numbers) >= _OFTEN and not any(numbers)]


def code_digest() -> str:
    """Digest of the code that is tried and that tries: results of other code say nothing of this."""
    digest = hashlib.sha256()
    for folder in _CODE:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in _CODE_SUFFIXES and not file.name.startswith("test_"):
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
