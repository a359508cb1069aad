"""Bugs that the schedules must find: each is planted for the length of a block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from smoltulu.artifacts import checkpoints, files, layout, store
from smoltulu.artifacts.files import remove_tree, sync, write_atomically
from smoltulu.artifacts.shared import lease, objects, remote
from smoltulu.artifacts.shared.lease import Ending, Lease
from smoltulu.artifacts.shared.objects import FolderObjects
from smoltulu.artifacts.store import Found, Store
from smoltulu.schemas.artifact import Manifest, Spec
from tests.faults.simulated import schedules


def _files_only(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        sync(folder / name)


def _not_at_all(folder: Path, names: Iterable[str]) -> None:
    pass


def _mkdir(path: Path, root: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _write(path: Path, text: str) -> None:
    """`write_atomically` whose bytes are not synced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
    sync(path.parent)


def _write_in_place(path: Path, text: str) -> None:
    path.write_text(text)
    sync(path)
    sync(path.parent)


def _pointer_first(self: Store, spec: Spec, whole: Path, manifest: Manifest) -> Found:
    folder = self.folder(spec)
    generation = folder / layout.look(folder).next_generation
    write_atomically(folder / layout.CURRENT, generation.name)
    whole.rename(generation)
    sync(folder)
    remove_tree(folder / layout.WORK)
    return Found(manifest, generation)


def _work_first(self: Store, spec: Spec, whole: Path, manifest: Manifest) -> Found:
    folder = self.folder(spec)
    generation = folder / layout.look(folder).next_generation
    whole.rename(generation)
    remove_tree(folder / layout.WORK)
    write_atomically(folder / layout.CURRENT, generation.name)
    return Found(manifest, generation)


def _older_first(folder: Path, score: float | None = None) -> None:
    """The checkpoints before this one go, then it is marked."""
    for other in folder.parent.iterdir():
        if other != folder:
            remove_tree(other)
    checkpoints.mark_complete(folder, score)


def _name_unsynced(folder: Path, marker: checkpoints.Marker) -> None:
    files.sync_tree(folder, marker.files)
    write_atomically(folder / checkpoints.CHECKPOINT_MARKER, marker.model_dump_json())


def _look_then_write(self: FolderObjects, name: str, data: bytes, patience: float = 60.0) -> bool:
    if (self.root / name).exists():
        return self.get(name) == data
    self.put(name, data)
    return True


def _publish_over(self: Lease, manifest: str, part_bytes: int) -> None:
    """The end is written, not created: also by one that was taken over."""
    self._silence()
    ending = Ending(kind="published", by=self._record, manifest=manifest, part_bytes=part_bytes)
    self._objects.put(lease._name(self.folder, self.token, "end"), ending.model_dump_json().encode())
    self._ended = True


def _pointer_before_files(self: remote.Remote, folder: Path, held: Lease, report: Any = None) -> bool:
    """Published with nothing uploaded yet; the rest comes after."""
    data = (folder / layout.MANIFEST).read_bytes()
    digest = remote.blake3(data).hexdigest()
    objects_ = self._objects
    held.publish(digest, self.part_bytes)
    manifest = Manifest.model_validate_json(data)
    for name, record in manifest.files.items():
        for part in remote.parts_of(record, self.part_bytes):
            content = (folder / name).read_bytes()[part.offset : part.offset + part.size]
            objects_.put(f"{held.folder}/files/{part.name}", content)
    objects_.put(f"{held.folder}/manifests/{digest}.json", data)
    return True


def _no_lock(descriptor: int, waiting: Callable[[], None]) -> None:
    pass


def _put_unsynced(self: FolderObjects, name: str, data: bytes) -> Path:
    folder = (self.root / name).parent
    files.make_folder(folder, self.root)
    temporary = folder / f"{objects._TEMPORARY}{objects.uuid.uuid4().hex}"
    temporary.write_bytes(data)
    return temporary


#: What is wrong -> what is put in the place of what. Those from `_FIRST_SHARED` on need a shared store to be seen.
BUGS: dict[str, tuple[tuple[Any, str, Any], ...]] = {
    "subfolders of an artifact are not synced": ((store, "sync_tree", _files_only),),
    "files of an artifact are not synced": ((store, "sync_tree", _not_at_all),),
    "the pointer is written before the rename": ((Store, "adopt", _pointer_first),),
    "checkpoints go before the rename is synced": ((Store, "adopt", _work_first),),
    "the folder of a key is not synced": ((store, "make_folder", _mkdir),),
    "small files are not synced": ((store, "write_atomically", _write), (checkpoints, "write_atomically", _write)),
    "small files are written in place": (
        (store, "write_atomically", _write_in_place),
        (checkpoints, "write_atomically", _write_in_place),
    ),
    "older checkpoints go before the new one is marked": ((schedules, "mark_complete", _older_first),),
    "files of a checkpoint are not synced": ((checkpoints, "sync_tree", _not_at_all),),
    "a checkpoint's own name is not synced": ((checkpoints, "_complete", _name_unsynced),),
    "subfolders of a checkpoint are not synced": ((checkpoints, "sync_tree", _files_only),),
    "the lock is not taken": ((store, "take", _no_lock),),
    "a lease is created by looking first": ((FolderObjects, "create", _look_then_write),),
    "who was taken over can publish": ((Lease, "publish", _publish_over),),
    "a shared artifact is published before its files": ((remote.Remote, "push", _pointer_before_files),),
    "objects of a shared folder are not synced": ((FolderObjects, "_temporary", _put_unsynced),),
    "folders of a shared folder are not synced": ((objects, "make_folder", _mkdir),),
}
_FIRST_SHARED = "a lease is created by looking first"


def kind_of(bug: str) -> str:
    """The kind of schedules that shows a bug."""
    names = list(BUGS)
    return "folder" if names.index(bug) >= names.index(_FIRST_SHARED) else "local"


@contextlib.contextmanager
def planted(bug: str) -> Iterator[None]:
    """The code with one bug in it."""
    with contextlib.ExitStack() as stack:
        for where, name, what in BUGS[bug]:
            stack.enter_context(mock.patch.object(where, name, what))
        yield
