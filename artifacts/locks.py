"""Kernel locks (`flock`): nothing goes stale, a killed holder frees its lock at once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from smoltulu.artifacts.files import open_plain, read_plain
from smoltulu.artifacts.layout import LOCK, WRITER

_TOLD_EVERY_SECONDS = 30.0
_POLL_SECONDS = 0.2
_HOLDER_BYTES = 4096


def open_lock(path: Path) -> IO[str]:
    """A lock file, made where there is none. OSError where something else lies there: it is never written through."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "is a link, not a file", str(path))
    return open(open_plain(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW), "a+")


def take(descriptor: int, waiting: Callable[[], None]) -> None:
    """Exclusive lock on an open file; tells `waiting` once, then every 30 s, while another holds it."""
    told = -math.inf
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() - told > _TOLD_EVERY_SECONDS:
                waiting()
                told = time.monotonic()
            time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Whether nobody holds the lock file; it is held until the block ends where that is so. A missing file is free."""
    try:
        file = open_lock(path)
    except FileNotFoundError:
        yield True
        return
    with file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def is_held(path: Path) -> bool:
    """Whether somebody holds a lock file now: makes no file, writes none, and keeps no lock."""
    try:
        descriptor = open_plain(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def hold_if_idle(folder: Path) -> Iterator[str | None]:
    """Hold the locks of a key's folder until the block ends, and yield None; where it is in use, yield by whom."""
    with try_lock(folder / LOCK) as is_free, try_lock(folder / WRITER) as is_idle:
        yield None if is_free and is_idle else holder_text(folder)


def write_holder(lock: IO[str]) -> None:
    """Say in a lock file who holds it: for people only, the lock itself is the kernel's."""
    lock.truncate(0)
    lock.write(json.dumps({"pid": os.getpid(), "host": os.uname().nodename, "since": time.time()}))
    lock.flush()


def holder_text(folder: Path) -> str:
    """Who holds the lock of a key's folder, for a message."""
    try:
        record = json.loads(read_plain(folder / LOCK, _HOLDER_BYTES))
        return f"process {record['pid']} on {record['host']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"
