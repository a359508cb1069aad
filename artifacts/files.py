"""Reading what may be anything; writing and removing so that a kill or a power cut leaves the old state or the new."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path, PurePosixPath

TRASH_PREFIX = ".trash-"
#: Manifests, specs and records are small; what is larger than this is none, and is not read into memory.
MAX_RECORD_BYTES = 64 << 20
#: Of a disk or network that does not answer, and of rights: they say nothing of what lies there.
READ_ERRORS = (
    *(errno.EIO, errno.EREMOTEIO, errno.ENODATA, errno.EBADMSG, errno.EUCLEAN),  # a disk, and what lies on it
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.ENODEV),  # a network
    *(errno.EACCES, errno.EPERM),
    *(errno.EINTR, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM),  # this process, or this machine
)


def open_plain(path: Path | str, flags: int = os.O_RDONLY) -> int:
    """Descriptor of a plain file. OSError for anything else (a folder, a pipe, a device), which is never waited for."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "is no plain file", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_plain(path: Path | str, limit: int = MAX_RECORD_BYTES) -> bytes:
    """Bytes of a plain file. OSError as `open_plain`, and where it has more than `limit` bytes."""
    with open(open_plain(path), "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise OSError(errno.EFBIG, f"has more than {limit:,} bytes", str(path))
        return file.readall()


def make_folder(path: Path, root: Path) -> Path:
    """Make a folder at or below `root`, and all that are missing above it, on disk when this returns.

    Those that were there already are written to disk too: who made them may have been killed before. ValueError where
    something else has its place.
    """
    missing = {folder for folder in (path, *path.parents) if not os.path.exists(folder)}
    try:
        private_folder(root)
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        here = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
        raise ValueError(f"{here} is no folder, so that {path} cannot be made; move it away and run again") from None
    for folder, above in pairwise((path, *path.parents)):
        if not (folder.is_relative_to(root) or folder in missing):
            break
        try:
            sync(above)
        except PermissionError:  # above the root: may be entered, but not read
            if above.is_relative_to(root):
                raise
    return path


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
    """Give a file a second name: a hard link where the file system has them, else a copy. Not synced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def sync_tree(folder: Path, names: Iterable[str]) -> None:
    """Have files below a folder on disk, then the entries of their folders from the innermost to `folder` itself."""
    names = list(names)
    for name in names:
        sync(folder / name)
    inner = {PurePosixPath(), *(parent for name in names for parent in PurePosixPath(name).parents)}
    for parent in sorted(inner, key=lambda parent: (-len(parent.parts), parent)):
        sync(folder / parent)


def remove_tree(path: Path) -> None:
    """Remove a folder so that it is gone at once for every reader: a rename first, then what takes long."""
    trash = path.with_name(f"{TRASH_PREFIX}{path.name}-{os.getpid()}-{time.monotonic_ns()}")
    try:
        path.rename(trash)
    except FileNotFoundError:
        return
    if trash.is_dir() and not trash.is_symlink():
        shutil.rmtree(trash, ignore_errors=True)
    else:
        trash.unlink(missing_ok=True)


def made_from_folder(folder: Path, made_from: str, marker_name: str = "made_from.json") -> Path:
    """A folder of unfinished work; emptied first where `made_from`, kept beside that work, is another than before."""
    marker = folder / marker_name
    if not marker.exists() or marker.read_bytes() != made_from.encode():
        remove_tree(folder)
        folder.mkdir()
        write_atomically(marker, made_from)
    return folder
