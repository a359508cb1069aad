"""The local artifact store: lookup, lock, commit, explain.

Layout of `root/<stage>/<key>/`: `spec.json` (what the key is made of), `lock` (kernel lock of the producer), `writer`
(kernel lock of every process that writes), `work/` (trainer checkpoints; survives failures), `gen-NNNN/` (a whole
artifact: files and `manifest.json`, appears by one rename), `current` (name of the newest generation).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from artifacts.keys import artifact_key, canonical_json, file_digest, folder_records, records_digest
from schemas.artifact import MANIFEST_SCHEMA_VERSION, FileRecord, InputRecord, Manifest, Spec

MANIFEST = "manifest.json"
DEFAULT_ROOT = Path("artifacts/store")


@dataclass(frozen=True)
class Found:
    """A finished, intact artifact."""

    manifest: Manifest
    folder: Path


@dataclass(frozen=True)
class Missing:
    """Why there is no usable artifact of a key."""

    reason: str


class Store:
    """Artifacts under one local folder. Errors: OSError where the folder cannot be written."""

    def __init__(self, root: Path | str = DEFAULT_ROOT) -> None:
        self.root = Path(root).absolute()

    def folder(self, spec: Spec) -> Path:
        """Folder of everything about one key."""
        return self.root / spec.stage / artifact_key(spec)

    def find(self, spec: Spec, input_digests: dict[str, str] | None = None) -> Found | Missing:
        """The current generation of a spec if it is whole, and not stale against `input_digests` (binding -> digest).

        Sizes are checked here, full digests by `verify`. A damaged generation is a miss with its reason.
        """
        folder = self.folder(spec)
        try:
            name = (folder / "current").read_text().strip()
        except FileNotFoundError:
            return Missing("resumable work is there" if any_checkpoint(folder / "work") else "never made")
        except (OSError, UnicodeDecodeError) as error:
            return Missing(f"pointer to the current generation is unreadable: {error}")
        if not name.startswith("gen-") or "/" in name:
            return Missing("pointer to the current generation is damaged")
        generation = folder / name
        try:
            manifest = Manifest.model_validate_json((generation / MANIFEST).read_text())
        except FileNotFoundError:
            return Missing(f"{name} has no manifest")
        except (ValidationError, OSError, UnicodeDecodeError) as error:
            return Missing(f"{name} has an unreadable manifest ({type(error).__name__})")
        if manifest.schema_version != MANIFEST_SCHEMA_VERSION or manifest.key != folder.name:
            return Missing(f"{name} was written by another version or for another key")
        for path, record in manifest.files.items():
            try:
                size = (generation / path).stat().st_size
            except OSError:
                return Missing(f"{path} is gone")
            if size != record.size:
                return Missing(f"{path} has {size} bytes, its manifest says {record.size}")
        for binding, digest in (input_digests or {}).items():
            recorded = manifest.inputs.get(binding)
            if recorded is None or recorded.digest != digest:
                return Missing(f"stale: its input {binding} was made again with another content")
        return Found(manifest, generation)

    def verify(self, found: Found) -> list[str]:
        """Names of files whose bytes differ from the manifest."""
        return [
            name
            for name, record in found.manifest.files.items()
            if not (found.folder / name).is_file() or file_digest(found.folder / name) != record.sha256
        ]

    def quarantine(self, found: Found, reason: str) -> Path:
        """Set a damaged generation aside, with the reason, so that it is made again."""
        target = found.folder.parent / f"damaged-{found.folder.name}-{time.time_ns()}"
        found.folder.rename(target)
        (target / "reason.txt").write_text(reason + "\n")
        (found.folder.parent / "current").unlink(missing_ok=True)
        return target

    @contextlib.contextmanager
    def producer(self, spec: Spec, waiting: Callable[[str], None]) -> Iterator[Path]:
        """Hold the lock of a key: one producer at a time. Yields the key's folder.

        The kernel frees the lock of a killed holder at once. `waiting` is told whom we wait for. A writer that
        outlived its parent keeps `writer`, which is waited for too.
        """
        folder = self.folder(spec)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "a+") as lock, open(folder / "writer", "a+") as writer:
            _take(lock.fileno(), lambda: waiting(_holder(folder / "lock")))
            lock.truncate(0)
            lock.write(json.dumps({"pid": os.getpid(), "host": os.uname().nodename, "since": time.time()}))
            lock.flush()
            _take(writer.fileno(), lambda: waiting("a stage process that outlived its parent"))
            # Children hold `writer` shared for as long as they live; we only needed to know that none is left.
            fcntl.flock(writer.fileno(), fcntl.LOCK_UN)
            if not (folder / "spec.json").exists():
                _write_atomically(folder / "spec.json", canonical_json(spec.model_dump()))
            _finish_commit(folder)
            yield folder

    def commit(self, spec: Spec, output: Path, draft: Callable[[dict[str, FileRecord], str], Manifest]) -> Found:
        """Turn the folder `output` into the newest generation: digests, manifest last, one rename, then `current`.

        `draft(files, digest)` gives the manifest. The caller holds the producer's lock.
        """
        folder = self.folder(spec)
        (output / MANIFEST).unlink(missing_ok=True)
        files = folder_records(output)
        manifest = draft(files, records_digest(files))
        for name in files:
            _sync(output / name)
        _write_atomically(output / MANIFEST, manifest.model_dump_json(indent=1))
        taken = [int(path.name[4:]) for path in folder.glob("gen-[0-9]*") if path.name[4:].isdigit()]
        generation = folder / f"gen-{max(taken, default=0) + 1:04d}"
        output.rename(generation)
        _sync(folder)
        _write_atomically(folder / "current", generation.name)
        shutil.rmtree(folder / "work", ignore_errors=True)
        return Found(manifest, generation)

    def specs(self, stage: str) -> list[tuple[Spec, Path]]:
        """Spec and folder of every key that was ever begun for a stage; unreadable ones are left out."""
        found = []
        for path in sorted((self.root / stage).glob("*/spec.json")):
            with contextlib.suppress(ValidationError, OSError, UnicodeDecodeError):
                found.append((Spec.model_validate_json(path.read_text()), path.parent))
        return found

    def nearest(self, spec: Spec) -> tuple[Spec, dict[str, tuple[object, object]]] | None:
        """The finished artifact of the same stage with the fewest differing fields, and those fields old -> new."""
        best: tuple[Spec, dict[str, tuple[object, object]]] | None = None
        for other, folder in self.specs(spec.stage):
            if (folder / "current").exists() and other != spec:
                changes = differences(other, spec)
                if best is None or len(changes) < len(best[1]):
                    best = (other, changes)
        return best


def differences(old: Spec, new: Spec) -> dict[str, tuple[object, object]]:
    """Dotted fields in which two specs differ, old -> new; a field that one of them lacks is None there."""

    def flat(value: object, prefix: str) -> dict[str, object]:
        if isinstance(value, dict) and value:
            return {k: v for name, item in value.items() for k, v in flat(item, f"{prefix}{name}.").items()}
        return {prefix.rstrip("."): value}

    before, after = flat(old.model_dump(), ""), flat(new.model_dump(), "")
    return {
        name: (before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }


def input_records(references: dict[str, tuple[str, str, str]]) -> dict[str, InputRecord]:
    """Binding -> (stage, key, digest) as records of a manifest."""
    return {name: InputRecord(stage=stage, key=key, digest=digest) for name, (stage, key, digest) in references.items()}


def any_checkpoint(work: Path) -> bool:
    """Whether a folder holds a complete trainer checkpoint."""
    return newest_checkpoint(work / "checkpoints") is not None


CHECKPOINT_MARKER = ".complete"


def mark_complete(checkpoint: Path) -> None:
    """Write the completion marker of a trainer checkpoint: names and sizes of its files, after all of them are on disk.

    The trainer's own saves are not atomic (transformers#35782): without the marker a checkpoint does not count.
    """
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != CHECKPOINT_MARKER]
    for path in files:
        _sync(path)
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    _write_atomically(checkpoint / CHECKPOINT_MARKER, json.dumps(sizes))


def newest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest complete `checkpoint-<step>`; torn ones are passed over."""
    candidates = []
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and _is_complete(path):
            candidates.append((int(step), path))
    return max(candidates, default=None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / CHECKPOINT_MARKER).read_text())
        return bool(sizes) and all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _finish_commit(folder: Path) -> None:
    """Point `current` at the newest generation: a producer killed after its rename left a whole one without pointer."""
    whole = sorted(path.parent.name for path in folder.glob(f"gen-[0-9]*/{MANIFEST}"))
    current = folder / "current"
    if whole and (not current.exists() or current.read_text().strip() < whole[-1]):
        _write_atomically(current, whole[-1])


def _take(descriptor: int, waiting: Callable[[], None]) -> None:
    """Exclusive kernel lock; tells `waiting` once, then every 30 s."""
    told = -math.inf
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() - told > 30:
                waiting()
                told = time.monotonic()
            time.sleep(0.2)


def _holder(lock: Path) -> str:
    try:
        record = json.loads(lock.read_text())
        return f"process {record['pid']} on {record['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
