"""Identity: canonical JSON, artifact keys, content digests."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISREG
from types import MappingProxyType
from typing import Any

from blake3 import blake3

from smoltulu.artifacts.files import READ_ERRORS, open_plain
from smoltulu.schemas.artifact import FileRecord, Manifest, Spec

#: Folder of an artifact for what a stage logs.
LOGS_FOLDER = "logs"
#: Folder of an artifact for the trainer checkpoint that a training with a larger budget goes on from.
CHECKPOINT_FOLDER = "checkpoint"
#: Kept and checked like all of an artifact, but no part of its content: nothing that follows is made from them.
NO_CONTENT = (LOGS_FOLDER, CHECKPOINT_FOLDER)

_PARALLEL_BYTES = 1 << 20
#: As fast as a mapped file (1.5 GiB/s on two cores, either way); 16 MiB at a time leave the caches: half as fast.
_READ_BYTES = 4 << 20
_NUM_FILES_AT_ONCE = 4


def canonical_json(value: Any) -> str:
    """The one spelling of a plain value: sorted keys, no spaces, 1 = 1.0 and 1e-4 = 0.0001.

    Raises TypeError for a type that has no canonical form, ValueError for NaN, infinity and lone surrogates: never a
    `str()`.
    """
    return json.dumps(_canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _canonical(value: Any) -> Any:
    if isinstance(value, str):
        # JSON escapes two lone surrogates like the one character that a pair of them stands for. UTF-8 has neither.
        try:
            value.isascii() or value.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"text {value[:40]!r} holds a lone surrogate; it cannot be part of an artifact key"
            ) from None
        return value
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} cannot be part of an artifact key; use a finite number")
        return int(value) if value.is_integer() else value
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise TypeError("a mapping in an artifact key has only text keys")
        return {_canonical(name): _canonical(item) for name, item in value.items()}
    raise TypeError(f"a {type(value).__name__} has no canonical form; use str, int, float, bool, None, list or dict")


def artifact_key(spec: Spec) -> str:
    """SHA-256 (64 hex digits) over the canonical JSON of the spec."""
    return hashlib.sha256(canonical_json(spec.model_dump()).encode()).hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """BLAKE3 (64 hex digits) of a file's bytes, on several threads where it is large. OSError where it cannot be read.

    Read, not memory-mapped: a bad sector of a mapped file, or its end where it is cut meanwhile, kills the process.
    """
    with open(open_plain(path), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        hasher = blake3(max_threads=blake3.AUTO if size > _PARALLEL_BYTES else 1)
        buffer = memoryview(bytearray(min(size, _READ_BYTES) or 1))
        try:
            while num_bytes := file.readinto(buffer):
                hasher.update(buffer[:num_bytes])
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None  # a read does not say of which file
    return hasher.hexdigest()


def file_fault(folder: Path, name: str, record: FileRecord, full: bool = False, strict: bool = False) -> str | None:
    """What is wrong with a file against its record; None where nothing is. `full`: its bytes too, not only its size.

    strict  OSError where it cannot be read now
    """
    # Here, so that keys alone need no pydantic.
    from smoltulu.schemas.common import printable

    path, name = folder / name, printable(name)
    try:
        found = path.stat()
        if not S_ISREG(found.st_mode):
            return f"{name} is no plain file"
        if found.st_size != record.size:
            return f"{name} has {found.st_size:,} bytes instead of {record.size:,}"
        if full and file_digest(path) != record.blake3:
            return f"{name} has other bytes than were written"
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} is gone"
    except OSError as error:
        if strict and error.errno in READ_ERRORS:
            raise
        return f"{name} cannot be read ({error.strerror or error})"
    return None


def folder_records(folder: Path, known: Mapping[str, FileRecord] = MappingProxyType({})) -> dict[str, FileRecord]:
    """Size and digest of every file below `folder` by relative path. Links are refused: they can point outside.

    known  records of files that are not read
    """
    files = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ValueError(f"{path} is a link; an artifact holds plain files only")
        if path.is_file() and path.relative_to(folder).as_posix() not in known:
            files.append(path)
    # Large files are hashed by several threads each; the pool is for the many small ones.
    with ThreadPoolExecutor(_NUM_FILES_AT_ONCE) as pool:
        digests = list(pool.map(file_digest, files))
    return dict(known) | {
        path.relative_to(folder).as_posix(): FileRecord(size=path.stat().st_size, blake3=digest)
        for path, digest in zip(files, digests, strict=True)
    }


def records_digest(records: dict[str, FileRecord]) -> str:
    """Content digest of a set of files: over their names, sizes and digests; what lies in `NO_CONTENT` does not count.

    What a stage logs (times, speeds), and what its trainer notes of the machine, differs between two runs that made
    the same model.
    """
    content = {name: record.model_dump() for name, record in records.items() if name.split("/")[0] not in NO_CONTENT}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def manifest_checksum(manifest: Manifest) -> str:
    """SHA-256 over everything else in a manifest: scores and output names are in no file that has a digest."""
    # Manifests from before there were these fields keep their checksum.
    later = ("extends", "adopted_from", "forecast")
    left_out = {"checksum", *(name for name in later if getattr(manifest, name) is None)}
    return hashlib.sha256(canonical_json(manifest.model_dump(mode="json", exclude=left_out)).encode()).hexdigest()


def with_checksum(manifest: Manifest) -> Manifest:
    """A manifest as it is written: nothing in it is changed after that."""
    return manifest.model_copy(update={"checksum": manifest_checksum(manifest)})


def folder_digest(folder: Path) -> str:
    """Content digest of every file below `folder`."""
    return records_digest(folder_records(folder))
