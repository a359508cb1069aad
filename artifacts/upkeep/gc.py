"""What may go from a store, and why the rest stays. Only reads; `artifacts.upkeep.removal` removes.

Kept: what a tag, a publication, a kept run or a recent use names, with everything that it was made from; an older
generation too while a kept manifest names its digest.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from stat import S_ISDIR

from smoltulu.artifacts import layout
from smoltulu.artifacts.files import TRASH_PREFIX
from smoltulu.artifacts.layout import KeyFolder
from smoltulu.artifacts.locks import holder_text, try_lock
from smoltulu.artifacts.manifests import Ref
from smoltulu.artifacts.upkeep.catalogue import Catalogue, Generation, is_alive
from smoltulu.schemas.artifact import MANIFEST_SCHEMA_VERSION
from smoltulu.schemas.run import RunRecord

_DAY = 86_400.0


@dataclass(frozen=True)
class Rules:
    """What is kept besides tagged, running and locked artifacts. ValueError for a negative number.

    keep_days    days since an artifact was last used, or since unfinished work last changed
    keep_runs    newest runs whose artifacts stay
    keep_stages  stages whose finished artifacts stay, and their lineage: those that publish
    """

    keep_days: float = 30.0
    keep_runs: int = 5
    keep_stages: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.keep_days < 0 or self.keep_runs < 0:
            raise ValueError(f"days and runs to keep are 0 or more; got {self.keep_days:g} and {self.keep_runs}")


@dataclass(frozen=True)
class Removal:
    """Entries of one key's folder that may go.

    kind       artifact, old generation, damaged, stale work, unfinished work, or leftover
    last_used  time of the pointer when this was planned: another one at removal means that it was used meanwhile
    inputs     of an artifact: what has to stay where it stays after all
    """

    ref: Ref
    names: tuple[str, ...]
    kind: str
    reason: str
    num_bytes: int
    last_used: int = 0
    inputs: frozenset[Ref] = frozenset()


@dataclass
class Plan:
    """What gc would do, consumers before their inputs. `kept` says why each key stays, `kept_bytes` what it takes."""

    removals: list[Removal] = field(default_factory=list)
    kept: dict[Ref, str] = field(default_factory=dict)
    kept_bytes: dict[Ref, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes that would be freed."""
        return sum(removal.num_bytes for removal in self.removals)


def plan_gc(catalogue: Catalogue, rules: Rules, now: float | None = None) -> Plan:
    """Look through a whole store; `now` in seconds since the epoch. Changes nothing."""
    return _Planner(catalogue, rules, time.time() if now is None else now).plan()


class _Planner:
    def __init__(self, catalogue: Catalogue, rules: Rules, now: float) -> None:
        self.catalogue, self.rules = catalogue, rules
        self.horizon = now - rules.keep_days * _DAY
        self.yesterday = now - _DAY
        self.folders: dict[Ref, KeyFolder] = {}
        self.generations: dict[Ref, dict[str, Generation]] = {}
        self.locked: dict[Ref, str] = {}
        for ref in catalogue.refs:
            self.folders[ref] = folder = catalogue.folder(ref)
            self.generations[ref] = {name: catalogue.generation(ref, name) for name in folder.whole}
            if (holder := _holder(folder.path)) is not None:
                self.locked[ref] = holder
        self.by_key = {ref.key: ref for ref in self.folders}
        self.kept: dict[Ref, str] = {}
        self.kept_generations: dict[Ref, set[str]] = {}
        self.in_kept_run: set[Ref] = set()

    def plan(self) -> Plan:
        self._mark()
        plan = Plan(kept=self.kept)
        artifacts: dict[Ref, Removal] = {}
        damaged: list[Removal] = []
        for ref, folder in self.folders.items():
            if ref in self.kept:
                plan.kept_bytes[ref] = sum(self.generations[ref][name].num_bytes for name in self.kept_generations[ref])
            if folder.is_link or ref in self.locked:
                continue
            if ref in self.kept:
                plan.removals += self._parts(folder, plan)
            elif (removal := self._whole_key(folder)) is not None:
                artifacts[ref] = removal
            damaged += self._damaged(folder)
        # What was set aside goes before its key, whose pointer says at removal that nothing changed since.
        plan.removals = [*damaged, *self._consumers_first(artifacts), *plan.removals, *self._top_level()]
        return plan

    # Mark

    def _mark(self) -> None:
        """Fill `kept` and `kept_generations`: first the roots whose every generation may be in use, then the others."""
        runs = self.catalogue.runs()
        for ref, holder in self.locked.items():
            self._keep([ref], f"locked by {holder}", every_generation=True)
        for run in runs:
            if self._is_running(run):
                self._keep_run(run, f"run {run.run_name} goes on", every_generation=True)
        for name, tag in sorted(self.catalogue.tags().items()):
            self._keep([Ref(tag.stage, tag.key)], f"tag {name}")
            self.in_kept_run.add(Ref(tag.stage, tag.key))
        published = [ref for ref, folder in self.folders.items() if ref.stage in self.rules.keep_stages]
        self._keep([ref for ref in published if self.folders[ref].newest], "published")
        nightly = self.catalogue.kept_by_nights()
        for one, reason in nightly:
            self._keep([Ref(one.stage, one.key)], reason)
        for run in runs[: self.rules.keep_runs]:
            self._keep_run(run, f"one of the newest {self.rules.keep_runs} runs")
        for ref, folder in self.folders.items():
            if folder.is_link:
                self._keep([ref], "lies behind a link", every_generation=True)
            elif any(g.schema_version > MANIFEST_SCHEMA_VERSION for g in self.generations[ref].values()):
                self._keep([ref], "made by a newer version", every_generation=True)
            elif self._last_used(folder) > self.horizon:
                self._keep([ref], f"used in the last {self.rules.keep_days:g} days")
            elif self._is_resumable(folder) and self._changed(folder) > self.horizon:
                self._keep([ref], f"unfinished work of the last {self.rules.keep_days:g} days")

        # Those generations themselves, not only the newest of their keys.
        for one, _ in nightly:
            if one.generation in self.generations.get(ref := Ref(one.stage, one.key), {}):
                self.kept_generations[ref].add(one.generation)
        # Nights of older versions: the next compares with what one compared with that told no verdict.
        for key, name in self.catalogue.untold().items():
            evaluation = self.by_key.get(key)
            if evaluation in self.kept and name in self.generations[evaluation]:
                self.kept_generations[evaluation].add(name)

    def _keep_run(self, run: RunRecord, reason: str, every_generation: bool = False) -> None:
        refs = [Ref(run.stages[node], key) for node, key in run.keys.items() if node in run.stages]
        self._keep(refs, reason, every_generation)
        self.in_kept_run.update(refs)

    def _keep(self, roots: Iterable[Ref], reason: str, every_generation: bool = False) -> None:
        """Keep artifacts and all that they were made from. Ref and digest (empty: whatever counts) are followed."""
        pending = [(ref, "") for ref in roots]
        seen: set[tuple[Ref, str]] = set()
        while pending:
            ref, digest = step = pending.pop()
            if step in seen or ref not in self.folders:
                continue
            seen.add(step)
            self.kept.setdefault(ref, reason)
            names = self.kept_generations.setdefault(ref, set())
            generations, newest = self.generations[ref], self.folders[ref].newest
            wanted = {name for name, found in generations.items() if every_generation or name == newest}
            wanted |= {name for name, found in generations.items() if digest and found.digest == digest}
            for name in wanted if every_generation else wanted - names:
                names.add(name)
                pending += [(given.ref, given.digest) for given in generations[name].inputs]
            if newest is None or generations[newest].problem:
                # Not made yet, or unreadable: its spec names the inputs that it is, or would be, made from.
                upstream = self.catalogue.upstream_by_spec(ref)
                pending += [(self.by_key[key], "") for key in upstream if key in self.by_key]

    def _is_running(self, run: RunRecord) -> bool:
        alive = is_alive(run)
        if alive is None:
            # On another host, where we cannot look. What it makes now is locked; its record counts for `keep_days`.
            return _mtime(layout.record_path(self.catalogue.root, layout.RUNS, run.run_name)) > self.horizon
        return alive

    def _last_used(self, folder: KeyFolder) -> float:
        if folder.newest is None:
            return 0.0
        if folder.current:
            return folder.last_used / 1e9
        return _mtime(folder.path / folder.newest / layout.MANIFEST)

    def _is_resumable(self, folder: KeyFolder) -> bool:
        """Whether work or a download is there that the next attempt goes on from."""
        if folder.newest is None:
            return bool(folder.begun)
        try:
            return layout.WORK in folder.begun and layout.made_for(folder.path) == folder.next_generation
        except (OSError, ValueError):
            return True  # it cannot be seen what the work is for: it stays

    def _changed(self, folder: KeyFolder) -> float:
        return max(_newest_change(folder.path / name) for name in (layout.WORK, layout.PULL))

    # Sweep

    def _whole_key(self, folder: KeyFolder) -> Removal | None:
        """Everything of a key that nothing needs, but what was set aside."""
        aside = {*folder.damaged, *folder.headless} - set(self._old_aside(folder))
        names = [*folder.whole, *folder.begun, *folder.leftovers]
        if not names and (aside or _mtime(folder.path) > self.horizon):
            return None  # only what was set aside lately, or just begun
        if folder.current is not None:
            names.insert(0, layout.CURRENT)
        if folder.has_spec and not aside:
            names.append(layout.SPEC)
        if not names:
            return None
        if folder.whole:
            kind, reason = "artifact", f"nothing kept needs it; last used {self._days(self._last_used(folder))}"
        elif folder.begun:
            kind, reason = "unfinished work", f"last changed {self._days(self._changed(folder))}"
        else:
            kind, reason = "leftover", "nothing was made of it"
        return self._removal(folder, names, kind, reason)

    def _parts(self, folder: KeyFolder, plan: Plan) -> list[Removal]:
        """What may go from a key that is kept."""
        removals = []
        for name in folder.whole:
            if name not in self.kept_generations[folder.ref]:
                reason = "made again since; nothing kept was made from it"
                removals.append(self._removal(folder, [name], "old generation", reason))
        parts = folder.begun
        if parts and not self._is_resumable(folder):
            removals.append(self._removal(folder, parts, "stale work", "its artifact is finished"))
        elif parts and self._changed(folder) <= self.horizon and folder.ref not in self.in_kept_run:
            reason = f"last changed {self._days(self._changed(folder))}"
            removals.append(self._removal(folder, parts, "unfinished work", reason))
        elif parts:
            plan.kept_bytes[folder.ref] += sum(_disk_bytes(folder.path / name) for name in parts)
        if folder.leftovers:
            removals.append(self._removal(folder, folder.leftovers, "leftover", "temporary"))
        return removals

    def _damaged(self, folder: KeyFolder) -> list[Removal]:
        old = self._old_aside(folder)
        reason = f"set aside more than {self.rules.keep_days:g} days ago"
        return [self._removal(folder, old, "damaged", reason)] if old else []

    def _old_aside(self, folder: KeyFolder) -> list[str]:
        return [name for name in (*folder.damaged, *folder.headless) if _mtime(folder.path / name) <= self.horizon]

    def _top_level(self) -> list[Removal]:
        """Temporary files beside the artifacts; those of the last day may be in use, as no lock covers them."""
        removals = []
        for name in ("", layout.RUNS, layout.TAGS, *sorted({ref.stage for ref in self.folders})):
            folder = self.catalogue.root / name
            if folder.is_symlink() and name:
                continue
            old = tuple(
                entry.name
                for entry in layout.scan(folder)
                if entry.name.startswith(TRASH_PREFIX)
                or (_is_temporary(entry.name) and _mtime(Path(entry.path)) <= self.yesterday)
            )
            if old:
                size = sum(_disk_bytes(folder / entry) for entry in old)
                removals.append(Removal(Ref(name, ""), old, "leftover", "temporary", size))
        return removals

    def _removal(self, folder: KeyFolder, names: Iterable[str], kind: str, reason: str) -> Removal:
        names = tuple(names)
        size = sum(_disk_bytes(folder.path / name) for name in names)
        inputs = {given.ref for found in self.generations[folder.ref].values() for given in found.inputs}
        return Removal(folder.ref, names, kind, reason, size, folder.last_used, frozenset(inputs))

    def _consumers_first(self, removals: dict[Ref, Removal]) -> list[Removal]:
        graph = {ref: removal.inputs & removals.keys() for ref, removal in removals.items()}
        with contextlib.suppress(CycleError):  # only forged manifests make a circle
            return [removals[ref] for ref in reversed(list(TopologicalSorter(graph).static_order()))]
        return list(removals.values())

    def _days(self, moment: float) -> str:
        if not moment:
            return "never"
        return f"{(self.horizon + self.rules.keep_days * _DAY - moment) / _DAY:.0f} days ago"


def _holder(folder: Path) -> str | None:
    """Who holds a key's lock or writes under it; None where nobody does."""
    for name in (layout.LOCK, layout.WRITER):
        if not os.path.exists(folder / name):
            continue
        try:
            with try_lock(folder / name) as is_free:
                if not is_free:
                    return holder_text(folder)
        except OSError as error:
            return f"somebody perhaps (its lock: {error.strerror})"
    return None


def _is_temporary(name: str) -> bool:
    """Whether a file has the form of `artifacts.files.write_atomically`'s: .name.pid"""
    return name.startswith(".") and name.rpartition(".")[2].isdigit() and name.count(".") >= 2


def _mtime(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _newest_change(path: Path) -> float:
    """When anything below a folder last changed; 0 where it does not exist."""
    return max((stat.st_mtime for stat in _stats(path)), default=0.0)


def _disk_bytes(path: Path) -> int:
    """Sizes of all files below a path, links not followed."""
    return sum(stat.st_size for stat in _stats(path) if not S_ISDIR(stat.st_mode))


def _stats(path: Path) -> Iterator[os.stat_result]:
    """What the file system says of a path and of everything below it; links are not followed."""
    below = () if path.is_symlink() else os.walk(path)
    entries = (os.path.join(folder, name) for folder, folders, files in below for name in (*folders, *files))
    for entry in (str(path), *entries):
        with contextlib.suppress(OSError):  # gone meanwhile
            yield os.lstat(entry)
