"""A disk that loses what was not synced.

Files lie in a real folder, so that the code under test runs on real calls. Beside it stands what would be left after a
power cut, in the weakest form that POSIX allows:

- A file's bytes are safe once the file was synced. Until then a power cut leaves the old bytes, the new ones, a part of
  the new ones, or zeros in their length.
- A name (a file made, linked, renamed, removed; a folder made) is safe once the folder it stands in was synced. Until
  then any subset of the changes may be lost, also a later one kept and an earlier one lost. A rename is one change.

Compare ALICE (https://www.usenix.org/conference/osdi14/technical-sessions/presentation/pillai) and CrashMonkey.
"""

from __future__ import annotations

import io
import os
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(eq=False)
class File:
    """A file: where it has names, and the bytes that are safe (None: none yet)."""

    names: set[tuple[Folder, str]] = field(default_factory=set)
    safe: bytes | None = None
    last: bytes = b""

    def now(self) -> bytes:
        """Its present bytes; of one without a name left, those that it had."""
        for folder, name in self.names:
            return _bytes(folder.path() / name)
        return self.last


@dataclass(eq=False)
class Folder:
    """A folder and what is in it now."""

    entries: dict[str, File | Folder] = field(default_factory=dict)
    above: tuple[Folder, str] | None = None
    root: Path | None = None

    def path(self) -> Path:
        if self.root is not None:
            return self.root
        assert self.above is not None
        return self.above[0].path() / self.above[1]


@dataclass(eq=False)
class Change:
    """One change of names: in which folder which name stands for what from now on."""

    names: list[tuple[Folder, str, File | Folder | None]]
    is_safe: bool = False


class Disk:
    """What `root` holds, and what of it a power cut leaves. Told of each call after it was done."""

    def __init__(self, root: Path) -> None:
        self.root = root
        #: power cuts so far: what was opened before one is stale after it
        self.num_cuts = 0
        root.mkdir(parents=True, exist_ok=True)
        self._read_anew()

    def _read_anew(self) -> None:
        """Everything that is there is safe."""

        def read(path: Path) -> Folder:
            folder = Folder()
            for entry in os.scandir(path):
                if entry.is_dir(follow_symlinks=False):
                    inner = read(Path(entry.path))
                    inner.above = (folder, entry.name)
                    folder.entries[entry.name] = inner
                else:
                    file = File(safe=_bytes(Path(entry.path)))
                    file.names.add((folder, entry.name))
                    folder.entries[entry.name] = file
            return folder

        self.top = read(self.root)
        self.top.root = self.root
        self.changes: list[Change] = []
        self.before = {folder: dict(folder.entries) for folder in self._folders(self.top)}

    def _folders(self, folder: Folder) -> Iterable[Folder]:
        yield folder
        for inner in folder.entries.values():
            if isinstance(inner, Folder):
                yield from self._folders(inner)

    def _folder(self, path: Path) -> Folder:
        folder = self.top
        for name in path.relative_to(self.root).parts:
            inner = folder.entries[name]
            assert isinstance(inner, Folder)
            folder = inner
        return folder

    def _at(self, path: Path) -> tuple[Folder, str, File | Folder | None]:
        folder = self._folder(path.parent)
        return folder, path.name, folder.entries.get(path.name)

    # What was done

    def made(self, path: Path, is_folder: bool = False) -> None:
        """A file or folder is new."""
        folder, name, there = self._at(path)
        if there is None:
            self._set([(folder, name, Folder(above=(folder, name)) if is_folder else File())])

    def linked(self, source: Path, target: Path) -> None:
        folder, name, _ = self._at(target)
        self._set([(folder, name, self._at(source)[2])])

    def renamed(self, source: Path, target: Path) -> None:
        """Called before the call is done where it replaces something, whose bytes are then still there."""
        (old, old_name, what), (new, new_name, _) = self._at(source), self._at(target)
        self._set([(old, old_name, None), (new, new_name, what)])
        if isinstance(what, Folder):
            what.above = (new, new_name)

    def removed(self, path: Path) -> None:
        folder, name, _ = self._at(path)
        self._set([(folder, name, None)])

    def keep_bytes(self, path: Path) -> None:
        """A name is about to go: its bytes may have to come back."""
        what = self._at(path)[2]
        if isinstance(what, File):
            what.last = _bytes(path)

    def synced(self, path: Path) -> None:
        what = self.top if path == self.root else self._at(path)[2]
        if isinstance(what, File):
            what.safe = what.now()
        else:
            for change in self.changes:
                change.is_safe |= any(folder is what for folder, _, _ in change.names)

    def _set(self, names: list[tuple[Folder, str, File | Folder | None]]) -> None:
        for folder, name, what in names:
            before = folder.entries.pop(name, None)
            if isinstance(before, File):
                before.names.discard((folder, name))
            if what is not None:
                folder.entries[name] = what
            if isinstance(what, File):
                what.names.add((folder, name))
        self.changes.append(Change(names))

    # What is left

    def cut_power(self, rng: random.Random) -> None:
        """Leave what is safe, and of the rest what chance keeps."""
        self.num_cuts += 1
        kept = rng.choice((0.0, 0.5, 0.9, 1.0))
        left = {folder: dict(entries) for folder, entries in self.before.items()}
        for change in self.changes:
            if change.is_safe or rng.random() < kept:
                for folder, name, what in change.names:
                    entries = left.setdefault(folder, {})
                    entries.pop(name, None)
                    if what is not None:
                        entries[name] = what
        contents: dict[File, bytes] = {}
        ruins = self.root.with_name(f"{self.root.name}.left")
        shutil.rmtree(ruins, ignore_errors=True)

        def write(folder: Folder, path: Path) -> None:
            path.mkdir()
            for name, what in left.get(folder, {}).items():
                if isinstance(what, Folder):
                    write(what, path / name)
                else:
                    (path / name).write_bytes(contents.setdefault(what, _left_of(what, rng)))

        write(self.top, ruins)
        shutil.rmtree(self.root)
        ruins.rename(self.root)
        self._read_anew()


def _bytes(path: Path) -> bytes:
    """Read without a call of the process that is looked at: in the middle of a sync nothing may come between."""
    with io.FileIO(path) as file:
        return file.readall()


def _left_of(file: File, rng: random.Random) -> bytes:
    now, safe = file.now(), file.safe if file.safe is not None else b""
    if now == file.safe:
        return now
    half = now[: rng.randint(0, len(now))]
    return rng.choice((safe, now, half, half + bytes(len(now) - len(half)), half + safe[len(half) :]))
