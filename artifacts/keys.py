"""Identity: canonical JSON, artifact keys, content digests."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from schemas.artifact import FileRecord, Spec

_CHUNK_BYTES = 1 << 20


def canonical_json(value: Any) -> str:
    """The one spelling of a plain value: sorted keys, no spaces, 1 = 1.0 and 1e-4 = 0.0001.

    Raises TypeError for a type that has no canonical form and ValueError for NaN and infinity: never a `str()`.
    """
    return json.dumps(_canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _canonical(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str, int)):
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
        return {name: _canonical(item) for name, item in value.items()}
    raise TypeError(f"a {type(value).__name__} has no canonical form; use str, int, float, bool, None, list or dict")


def artifact_key(spec: Spec) -> str:
    """SHA-256 (64 hex digits) over the canonical JSON of the spec."""
    return hashlib.sha256(canonical_json(spec.model_dump()).encode()).hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, read once in bounded memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def folder_records(folder: Path) -> dict[str, FileRecord]:
    """Size and digest of every file below `folder` by relative path. Links are refused: they can point outside."""
    records = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ValueError(f"{path} is a link; an artifact holds plain files only")
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            records[name] = FileRecord(size=path.stat().st_size, sha256=file_digest(path))
    return records


def records_digest(records: dict[str, FileRecord]) -> str:
    """Content digest of a set of files: over their names, sizes and digests."""
    return hashlib.sha256(
        canonical_json({name: record.model_dump() for name, record in records.items()}).encode()
    ).hexdigest()


def folder_digest(folder: Path) -> str:
    """Content digest of every file below `folder`."""
    return records_digest(folder_records(folder))
