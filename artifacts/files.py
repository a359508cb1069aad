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
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        # On a full disk the half-written file would only make it fuller.
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's entries, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove a folder so that it is gone at once for every reader: a rename first, then what takes long."""
    trash = path.with_name(f"{TRASH_PREFIX}{path.name}-{os.getpid()}-{time.monotonic_ns()}")
    try:
        path.rename(trash)
    except FileNotFoundError:
        return
    shutil.rmtree(trash, ignore_errors=True)


def made_from_folder(folder: Path, made_from: str) -> Path:
    """A folder of unfinished work; emptied first where `made_from`, kept beside that work, is another than before."""
    marker = folder / "made_from.json"
    if not marker.exists() or marker.read_text() != made_from:
        remove_tree(folder)
        folder.mkdir()
        write_atomically(marker, made_from)
    return folder
