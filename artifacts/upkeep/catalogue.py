"""What is in a store: artifacts, lineage, sizes, runs, tags. Reads only, and never fails on what it finds.

Listing reads JSON and picks fields, without pydantic: 10,000 artifacts are looked through in under a second. What
cannot be read is skipped and named in `Catalogue.notes`. Links are read like folders (a stage may lie on another
disk), and marked, so that nothing is ever removed behind one.
"""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smoltulu.artifacts import layout
from smoltulu.artifacts.files import read_plain
from smoltulu.artifacts.layout import KeyFolder
from smoltulu.artifacts.manifests import InputRef, Ref, dig, inputs_of, num_bytes_of, picking, read_json, scores_of
from smoltulu.schemas.artifact import STAGE_PATTERN
from smoltulu.schemas.common import first_problem, printable
from smoltulu.schemas.nightly import MeasuredModel, Pins, Told
from smoltulu.schemas.run import RunRecord, TagRecord

_QUOTED_KEY = re.compile(rb'"([0-9a-f]{64})"')
_MIN_PREFIX = 4
_SAME_START_SECONDS = 60.0
_NUM_READERS = 8


@dataclass(frozen=True, slots=True)
class Generation:
    """What listing needs of one generation. `problem` says why its manifest is unreadable; the rest is then empty."""

    name: str
    schema_version: int = 0
    digest: str = ""
    inputs: tuple[InputRef, ...] = ()
    num_bytes: int = 0
    problem: str = ""


@dataclass
class Catalogue:
    """Everything under one store root. ValueError where there is no store."""

    root: Path
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = Path(self.root).absolute()
        if not os.path.isdir(self.root):
            what = "is a file, not a store" if os.path.exists(self.root) else "does not exist"
            raise ValueError(f"no store at {self.root}: it {what}; give --store FOLDER or set SMOLTULU_STORE")

    # Artifacts

    @cached_property
    def refs(self) -> list[Ref]:
        """Every key that was ever begun."""
        found = []
        for stage in self._scan(self.root):
            if stage.name in (layout.RUNS, layout.TAGS, layout.HISTORY) or stage.name.startswith("."):
                continue
            if not (os.path.isdir(stage.path) and re.fullmatch(STAGE_PATTERN, stage.name)):
                self._note(f"{stage.name}: not ours, left alone")
                continue
            for entry in self._scan(Path(stage.path)):
                if layout.KEY.fullmatch(entry.name) and _is_folder(entry):
                    found.append(Ref(stage.name, entry.name))
                elif not entry.name.startswith("."):
                    self._note(f"{stage.name}/{entry.name}: not ours, left alone")
        return found

    def matching(self, prefix: str) -> list[Ref]:
        """Keys that begin with `prefix`, or with the part after `stage/`; not those of which gc left only the lock."""
        stage, slash, start = prefix.rpartition("/")
        found = [ref for ref in self.refs if ref.key.startswith(start) and (not slash or ref.stage == stage)]
        locks = {layout.LOCK, layout.WRITER}
        return sorted(ref for ref in found if {entry.name for entry in self._scan(self.path(ref))} - locks)

    def resolve(self, what: str) -> Ref | RunRecord:
        """What a user means by a tag's name, a run's name, or a key's first digits. ValueError says what is there."""
        tags = self.tags()
        if what in tags:
            return Ref(tags[what].stage, tags[what].key)
        run = self.run(what)
        if run is not None:
            return run
        digits = what.rpartition("/")[2]
        if re.fullmatch(r"[0-9a-f]+", digits):
            if len(digits) < _MIN_PREFIX:
                raise ValueError(f"{what!r} is too short for a key: give at least {_MIN_PREFIX} of its digits")
            found = self.matching(what)
            if len(found) == 1:
                return found[0]
            if found:
                shown = ", ".join(f"{ref.stage}/{ref.key[:16]}" for ref in found[:10])
                more = f" and {len(found) - 10} more" if len(found) > 10 else ""
                raise ValueError(f"{what!r} means {len(found)} keys: {shown}{more}; give more digits")
        import difflib

        names = [*tags, *(path.stem for path in self._records(layout.RUNS))]
        near = difflib.get_close_matches(what, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "; `smoltulu runs` lists the runs"
        raise ValueError(f"{self.root} has no key, tag or run {what!r}{hint}")

    def path(self, ref: Ref) -> Path:
        """Folder of a key."""
        return layout.key_path(self.root, ref.stage, ref.key)

    def folder(self, ref: Ref) -> KeyFolder:
        """What lies in the folder of a key; all empty where it does not exist."""
        return layout.look(self.path(ref), self._passed_over)

    def manifest(self, ref: Ref, generation: str | None = None) -> dict[str, Any]:
        """A manifest as plain JSON, of the current generation unless one is named. ValueError says what is wrong."""
        if generation is None:
            # Straight to the pointer: listing a whole folder first would cost more than the manifest.
            try:
                pointer = layout.read_pointer(self.path(ref))
            except OSError:
                pointer = None  # said by `folder`
            generation = pointer.name if pointer and layout.number_of(pointer.name) else self.folder(ref).newest
            if generation is None:
                raise ValueError("is gone: the artifact is not finished")
        return read_json(self.path(ref) / generation / layout.MANIFEST)

    def known(self, ref: Ref) -> dict[str, Any]:
        """The manifest of the current generation as plain JSON; empty where it cannot be read."""
        try:
            return self.manifest(ref)
        except ValueError:
            return {}

    def generation(self, ref: Ref, name: str) -> Generation:
        """What listing needs of one generation."""
        version = 0
        try:
            manifest = self.manifest(ref, name)
            with picking():
                version = int(manifest["schema_version"])
                return Generation(name, version, str(manifest["digest"]), inputs_of(manifest), num_bytes_of(manifest))
        except ValueError as error:
            return Generation(name, version, problem=f"manifest {error}")

    def upstream_by_spec(self, ref: Ref) -> set[str]:
        """Keys (and other 64-digit digests) that the spec of an artifact names, finished or not; cheap."""
        try:
            # Without pathlib, whose joins would cost more than the reading.
            text = read_plain(f"{self.root}/{ref.stage}/{ref.key}/{layout.SPEC}")
        except OSError:
            text = json.dumps(self.known(ref).get("spec")).encode()
        return {digits.decode() for digits in _QUOTED_KEY.findall(text)} - {ref.key}

    @cached_property
    def consumers(self) -> dict[str, list[Ref]]:
        """Key -> artifacts that were begun from it, straight; one pass over the specs."""

        def read(refs: list[Ref]) -> list[tuple[Ref, set[str]]]:
            return [(ref, self.upstream_by_spec(ref)) for ref in refs]

        # A cold disk, or one across a network, answers many at a time as fast as one.
        found: dict[str, list[Ref]] = {}
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            for pairs in pool.map(read, [self.refs[start::_NUM_READERS] for start in range(_NUM_READERS)]):
                for ref, keys in pairs:
                    for key in keys:
                        found.setdefault(key, []).append(ref)
        return found

    def scores(self, ref: Ref) -> list[dict[str, Any]]:
        """Scores of a model from the evaluations of it, with `kind`; of an evaluation its own. Needs `consumers`."""
        if own := scores_of(self.known(ref)):
            return own
        return [score for one in self.evaluations_of(ref) for score in scores_of(self.known(one))]

    def evaluations_of(self, model: Ref) -> list[Ref]:
        """Finished evaluations that measured a model, its own; not those for which it was only the reference.

        One that measured a part again counts where there is no other.
        """
        found = {
            ref: str(manifest.get("node"))
            for ref in self.consumers.get(model.key, [])
            if scores_of(manifest := self.known(ref)) and dig(manifest, "spec", "inputs", "model") == model.key
        }
        return [ref for ref, node in found.items() if not node.endswith(layout.REPEATED)] or list(found)

    # Runs and tags

    def runs(self) -> list[RunRecord]:
        """Every run, newest first."""
        found = [run for path in self._records(layout.RUNS) if (run := self.run(path.stem)) is not None]
        return sorted(found, key=lambda run: (run.started_at, run.run_name), reverse=True)

    def untold(self) -> dict[str, str]:
        """Key -> generation that the newest night compared with, where that night ended before it told its verdict.

        What it measured is the newest generation by now. Who compared with that would never tell what the night found.
        """
        newest: dict[str, str] = {}
        for run in self.runs():
            if run.compared_with is not None:
                for node, key in run.keys.items():
                    newest.setdefault(key, run.compared_with.get(node, ""))
        return {key: generation for key, generation in newest.items() if generation}

    def kept_by_nights(self) -> list[tuple[MeasuredModel, str]]:
        """Evaluations that a recipe's nights need, and why: baselines, and what the next night may compare with.

        ValueError where that cannot be read: it is not passed over, what it names would be removed.
        """
        found: list[tuple[MeasuredModel, str]] = []
        for entry in self._scan(self.root / layout.HISTORY):
            if not _is_folder(entry):
                continue
            pins = self._history(Path(entry.path) / layout.PINS, Pins)
            found += [(pin.measured, f"baseline of {entry.name}") for pin in pins.held().values()]
            told = self._history(Path(entry.path) / layout.TOLD, Told)
            found += [(one, f"the next night of {entry.name} compares with it") for one in told.evaluations]
        return found

    def _history(self, path: Path, model: type[Any]) -> Any:
        made = self._record(path, model) if os.path.lexists(path) else model()
        if made is None:
            raise ValueError(
                f"{path} cannot be read, and gc would remove what it names; mend it, or move it away if nothing of it "
                "is needed"
            )
        return made

    def run(self, name: str) -> RunRecord | None:
        """A run by its name; None where there is none that can be read."""
        path = layout.record_path(self.root, layout.RUNS, name)
        if "/" in name or not os.path.lexists(path):
            return None
        return self._record(path, RunRecord)

    def tags(self) -> dict[str, TagRecord]:
        """Tag -> what it names."""
        pairs = ((path.stem, self._record(path, TagRecord)) for path in self._records(layout.TAGS))
        return {name: record for name, record in pairs if record is not None}

    def _records(self, folder: str) -> list[Path]:
        entries = self._scan(self.root / folder)
        return sorted(Path(e.path) for e in entries if e.name.endswith(".json") and not e.name.startswith("."))

    def _record(self, path: Path, model: type[Any]) -> Any:
        try:
            return model.model_validate_json(read_plain(path))
        except ValidationError as error:
            self._note(f"{path.parent.name}/{path.name}: passed over, {first_problem(error)}")
        except OSError as error:
            self._passed_over(path, error)
        return None

    # Reading

    def _scan(self, folder: Path) -> list[os.DirEntry[str]]:
        return layout.scan(folder, self._passed_over)

    def _passed_over(self, path: Path, error: OSError) -> None:
        self._note(f"{path.relative_to(self.root)}: passed over, {error.strerror}")

    def _note(self, text: str) -> None:
        text = printable(text)
        if text not in self.notes:
            self.notes.append(text)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # The first costs nothing; the second follows a link, and is False where that may not be looked at.
    return entry.is_dir(follow_symlinks=False) or os.path.isdir(entry.path)


def is_alive(record: RunRecord) -> bool | None:
    """Whether the process of a run that is recorded as Running is there; None where it runs on another host."""
    if record.state != "Running":
        return False
    if record.host != os.uname().nodename:
        return None
    import psutil

    try:
        born = psutil.Process(record.pid).create_time()
        # After a restart of the machine the number may belong to another process, which began later.
        return born <= datetime.fromisoformat(record.started_at).timestamp() + _SAME_START_SECONDS
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, ValueError, OverflowError):
        return True


def state_of(record: RunRecord) -> str:
    """State to show: a run that says Running although its process is gone is `Crashed?`."""
    return "Crashed?" if record.state == "Running" and is_alive(record) is False else record.state
