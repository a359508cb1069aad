"""Writing and removing files so that a kill at any instant leaves the old state or the new one."""

from __future__ import annotations

import os
import shutil
import stat
import time
from pathlib import Path

TRASH_PREFIX = ".trash-"


def private_folder(path: Path) -> Path:
    """A folder that others than its owner's group cannot look into; one that is there stays as it is.

    The umask decides what the group may.
    """
    path.mkdir(parents=True, exist_ok=True, mode=0o770)
    return path


def exposed(path: Path) -> str | None:
    """What every user of the machine may do with a folder: `written` or `read`; None where neither, or no folder."""
    try:
        modes = [folder.stat().st_mode for folder in (path, *path.resolve().parents)]
    except OSError:
        return None
    if not all(mode & stat.S_IXOTH for mode in modes):
        return None  # it, or a folder above it, is closed
    return "written" if modes[0] & stat.S_IWOTH else "read" if modes[0] & stat.S_IROTH else None


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
