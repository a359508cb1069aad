"""What lies where in a store: names, patterns and paths. No other module spells them.

<root>/<stage>/<key>/
  spec.json           what the key is made of
  lock                kernel lock of the producer
  writer              kernel lock of every process that writes
  work/               of the attempt that goes on: `generation` (which one it is for), inputs.json (content of what
                      it is made from), checkpoints/; survives failures
  pull/               what is being fetched from a shared store
  gen-NNNN/           a whole artifact, its files and manifest.json; appears by one rename
  current             name of the newest generation; its time of change: last used
  damaged-gen-NNNN-…/ a generation that was set aside, with reason.txt
<root>/runs/<run name>.json, <root>/tags/<tag>.json
<root>/history/<recipe>/            nights of a recipe (tasks/nightly/history.py), pins.json, told.json
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from smoltulu.artifacts.files import open_plain, read_plain
from smoltulu.artifacts.manifests import Ref, parse_json

SPEC, LOCK, WRITER, CURRENT, MANIFEST = "spec.json", "lock", "writer", "current", "manifest.json"
WORK, PULL, ASIDE_PREFIX, REASON = "work", "pull", "damaged-", "reason.txt"
#: In `work`: trainer checkpoints, the file that names the generation that the work is for, and the one with the content
#: digests of the inputs that it is made from.
CHECKPOINTS, MADE_FOR, MADE_FROM = "checkpoints", "generation", "inputs.json"
#: Folders of the root that hold records, not artifacts.
RUNS, TAGS, HISTORY = "runs", "tags", "history"
#: Of a recipe's nights: the baselines, and what the next night may compare with. gc keeps what both name.
PINS, TOLD = "pins.json", "told.json"
#: End of the name of a node that measures again a part of what is there: its scores are no others.
REPEATED = "-again"
KEY = re.compile(r"[0-9a-f]{64}")
#: Digits that a number may have in a name: far more than will ever be counted.
_MAX_DIGITS = 18
_GENERATION = re.compile(rf"gen-([0-9]{{4,{_MAX_DIGITS}}})")
#: A pointer, or what names the generation of unfinished work, is read so far.
_POINTER_BYTES = 4096
_REASON_BYTES = 1 << 16

#: Told of a path that cannot be read.
Note = Callable[[Path, OSError], None]


class Pointer(NamedTuple):
    """Content of `current`, whether or not that generation is there, and its time of change in ns."""

    name: str
    changed: int


@dataclass(frozen=True, slots=True)
class KeyFolder:
    """What lies in the folder of one key.

    current    name that the pointer holds, whether or not that generation is there; None without a pointer
    last_used  modification time of the pointer in ns; 0 without one
    whole      generations with a manifest, oldest first
    headless   generations without one: never written by us
    damaged    generations that were set aside
    begun      which of `work` and `pull` are there
    leftovers  temporary files and trash
    is_link    the folder, or its stage's, is a symbolic link
    """

    ref: Ref
    path: Path
    has_spec: bool
    current: str | None
    last_used: int
    whole: tuple[str, ...]
    headless: tuple[str, ...]
    damaged: tuple[str, ...]
    begun: tuple[str, ...]
    leftovers: tuple[str, ...]
    is_link: bool

    @property
    def newest(self) -> str | None:
        """The generation that counts.

        A newer whole one than the pointer names was left by a kill just before it was pointed at. An older one does not
        slip into the place of one that was set aside.
        """
        return self.whole[-1] if self.whole and number_of(self.whole[-1]) >= number_of(self.current or "") else None

    @property
    def next_generation(self) -> str:
        """A name that no generation of the key ever had, one that was set aside included. ValueError: none is left."""
        aside = (name.removeprefix(ASIDE_PREFIX).rpartition("-")[0] for name in self.damaged)
        last = max(map(number_of, (*self.whole, *self.headless, *aside)), default=0)
        if not number_of(following := f"gen-{last + 1:04d}"):
            raise ValueError(f"{self.path} holds gen-{last}, which no other can follow; move it away and run again")
        return following

    def set_aside(self, generation: str) -> list[str]:
        """What a generation is called since it was set aside; empty where it was not."""
        return [name for name in self.damaged if name.startswith(f"{ASIDE_PREFIX}{generation}-")]


def key_path(root: Path, stage: str, key: str) -> Path:
    """Folder of a key. ValueError where a name would lead elsewhere: it may come from a record that anyone wrote."""
    return root / Ref.checked(stage, key).stage / key


def record_path(root: Path, kind: str, name: str) -> Path:
    """File of a run or a tag; `kind`: `RUNS` or `TAGS`."""
    return root / kind / f"{name}.json"


def history_path(root: Path, recipe: str) -> Path:
    """Folder of a recipe's nights. ValueError where a name would lead elsewhere."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,99}", recipe):
        raise ValueError(f"{recipe!r} is no recipe's name: lower-case letters, digits and '-', at most 100")
    return root / HISTORY / recipe


def made_for(folder: Path) -> str | None:
    """The generation that a key's work folder is for; None where there is none, or it does not say so.

    OSError where that cannot be read: checkpoints must not be taken for another generation's then.
    """
    try:
        return read_plain(folder / WORK / MADE_FOR, _POINTER_BYTES).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def made_from(folder: Path) -> dict[str, str] | None:
    """Binding -> content digest of the inputs that a key's work is made from; None where it does not say so.

    OSError as `made_for`.
    """
    try:
        found = parse_json(read_plain(folder / WORK / MADE_FROM))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return None
    return {str(name): str(digest) for name, digest in found.items()}


def number_of(name: str) -> int:
    """Number of a generation by its name, from 1; 0 for any other name, and for another spelling (gen-00001)."""
    match = _GENERATION.fullmatch(name)
    number = int(match[1]) if match else 0
    return number if name == f"gen-{number:04d}" else 0


def reason_of(aside: Path) -> str:
    """Why a generation was set aside."""
    try:
        return read_plain(aside / REASON, _REASON_BYTES).decode(errors="replace").strip()
    except OSError:
        return "no reason given"


def read_pointer(folder: Path) -> Pointer | None:
    """The pointer of a key; None where there is none. OSError where it cannot be read."""
    try:
        # One open for both: name and time belong together. Without pathlib, whose joins cost more than the reading.
        with open(open_plain(f"{folder}/{CURRENT}"), "rb", buffering=0) as file:
            text = file.read(_POINTER_BYTES)
            return Pointer(text.decode(errors="replace").strip(), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def scan(folder: Path, note: Note = lambda path, error: None) -> list[os.DirEntry[str]]:
    """Entries of a folder by name; none where it does not exist or cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        note(folder, error)
        return []


def look(path: Path, note: Note = lambda path, error: None) -> KeyFolder:
    """What lies in the folder of a key; all empty where it does not exist."""
    names = []
    whole: list[str] = []
    headless: list[str] = []
    for entry in scan(path, note):
        if number_of(entry.name):
            (whole if os.path.exists(f"{entry.path}/{MANIFEST}") else headless).append(entry.name)
        else:
            names.append(entry.name)
    try:
        pointer = read_pointer(path)
    except OSError as error:
        note(path / CURRENT, error)
        pointer = None
    return KeyFolder(
        ref=Ref(path.parent.name, path.name),
        path=path,
        has_spec=SPEC in names,
        current=pointer.name if pointer else None,
        last_used=pointer.changed if pointer else 0,
        whole=tuple(sorted(whole, key=number_of)),
        headless=tuple(headless),
        damaged=tuple(name for name in names if name.startswith(ASIDE_PREFIX)),
        begun=tuple(name for name in (WORK, PULL) if name in names),
        leftovers=tuple(name for name in names if name.startswith(".")),
        is_link=path.is_symlink() or path.parent.is_symlink(),
    )
