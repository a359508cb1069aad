"""Writing and removing files so that a kill at any instant leaves the old state or the new one."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

TRASH_PREFIX = ".trash-"


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by one rename, on disk when this returns. OSError where the folder cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write_synced(temporary, text.encode())
    temporary.replace(path)
    sync(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file that no reader knows yet, on disk when this returns. After an error there is no file."""
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        # On a full disk the half-written file would only make it fuller.
        path.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's entries, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name: a hard link where the file system has them, else a copy that is on disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


def remove_tree(path: Path) -> None:
    """Remove a folder so that it is gone at once for every reader: a rename first, then what takes long."""
    trash = path.with_name(f"{TRASH_PREFIX}{path.name}-{os.getpid()}-{time.monotonic_ns()}")
    try:
        path.rename(trash)
    except FileNotFoundError:
        return
    shutil.rmtree(trash, ignore_errors=True)


def made_from_folder(folder: Path, made_from: str, marker_name: str = "made_from.json") -> Path:
    """A folder of unfinished work; emptied first where `made_from`, kept beside that work, is another than before."""
    marker = folder / marker_name
    if not marker.exists() or marker.read_bytes() != made_from.encode():
        remove_tree(folder)
        folder.mkdir()
        write_atomically(marker, made_from)
    return folder
