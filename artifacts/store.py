"""The local artifact store: lookup, lock, commit, explain. What lies where: artifacts/layout.py."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import BaseModel, Field, ValidationError

from smoltulu.artifacts import layout
from smoltulu.artifacts.checkpoints import newest_checkpoint
from smoltulu.artifacts.files import (
    READ_ERRORS,
    make_folder,
    read_plain,
    remove_tree,
    sync,
    sync_tree,
    write_atomically,
)
from smoltulu.artifacts.keys import (
    artifact_key,
    canonical_json,
    file_fault,
    folder_records,
    manifest_checksum,
    records_digest,
    with_checksum,
)
from smoltulu.artifacts.locks import holder_text, open_lock, take, write_holder
from smoltulu.schemas.artifact import MANIFEST_SCHEMA_VERSION, FileRecord, Manifest, Spec
from smoltulu.schemas.common import first_problem, printable

#: What is said with a node and whom it waits for.
WAITING = "%s: waiting for %s, which makes it"

Log = logging.Logger | logging.LoggerAdapter


@dataclass(frozen=True)
class Found:
    """A finished, intact artifact."""

    manifest: Manifest
    folder: Path


#: Makes an artifact.
Make = Callable[[], Found]
Refusal = Callable[[Manifest], str | None]


@dataclass(frozen=True)
class Missing:
    """Why there is no usable artifact of a key; `damaged` names a generation that should be set aside."""

    reason: str
    damaged: str | None = None


class Store:
    """Artifacts under one local folder. Errors: OSError where the folder cannot be written."""

    def __init__(self, root: Path | str, refusal: Refusal = lambda manifest: None) -> None:
        """`refusal` says why an artifact whose manifest is sound does not count all the same; None: it counts."""
        self.root = Path(root).absolute()
        self.refusal = refusal

    def folder(self, spec: Spec) -> Path:
        """Folder of everything about one key."""
        return layout.key_path(self.root, spec.stage, artifact_key(spec))

    def find(self, spec: Spec, input_digests: dict[str, str] | None = None) -> Found | Missing:
        """The current generation of a spec if it is whole, and not stale against `input_digests` (binding -> digest).

        Sizes are checked here, full digests by `verify`. A damaged generation is a miss with its reason.
        """
        folder = self.folder(spec)
        try:
            pointer = layout.read_pointer(folder)
        except OSError as error:
            return Missing(f"pointer to the current generation cannot be read: {layout.CURRENT} {error.strerror}")
        if pointer is None:
            resumable = newest_checkpoint(folder / layout.WORK / layout.CHECKPOINTS) is not None
            return Missing("resumable work is there" if resumable else "never made")
        name = pointer.name
        if not layout.number_of(name):
            return Missing("pointer to the current generation is damaged")
        generation = folder / name
        if not os.path.lexists(generation):
            aside = layout.look(folder).set_aside(name)
            why = f"was set aside: {layout.reason_of(folder / aside[0])}" if aside else "is gone"
            return Missing(f"{name} {why}")
        try:
            manifest = read_manifest(generation)
        except FileNotFoundError:
            return Missing(f"{name} has no manifest", damaged=name)
        except ManifestVersionError as error:
            return Missing(f"{name}: {error}")
        except OSError as error:
            # What may not be read now is not damaged: it is left where it is.
            damaged = None if error.errno in READ_ERRORS else name
            return Missing(f"{name} has an unreadable manifest: it {error.strerror}", damaged)
        except ValueError as error:
            return Missing(f"{name} has an unreadable manifest: {error}", damaged=name)
        if manifest.key != folder.name:
            return Missing(f"{name} was written for another key", damaged=name)
        faults = (file_fault(generation, file, record, strict=True) for file, record in manifest.files.items())
        try:
            if (fault := next((found for found in faults if found is not None), None)) is not None:
                return Missing(fault, damaged=name)
        except OSError as error:
            return Missing(f"{name} cannot be read: {error.strerror}")
        if (refused := self.refusal(manifest)) is not None:
            return Missing(f"{name}: {refused}", damaged=name)
        if (binding := stale_input(manifest, input_digests or {})) is not None:
            return Missing(f"stale: its input {binding} was made again with another content")
        return Found(manifest, generation)

    def touch(self, found: Found) -> None:
        """Note that an artifact is used now: `gc` keeps what was used lately. No error on a read-only store."""
        with contextlib.suppress(OSError):
            os.utime(found.folder.parent / layout.CURRENT)

    def verify(self, found: Found) -> list[str]:
        """What is wrong with an artifact's bytes, a sentence each: every file is read and hashed.

        OSError where the disk does not let one be read, which is no fault of the artifact.
        """
        files = found.manifest.files
        with ThreadPoolExecutor(4) as pool:
            faults = list(
                pool.map(lambda name: file_fault(found.folder, name, files[name], full=True, strict=True), files)
            )
        present = {
            path.relative_to(found.folder).as_posix() for path in found.folder.rglob("*") if not path.is_dir()
        } - {layout.MANIFEST}
        extra = [f"{printable(name)} is not in the manifest" for name in sorted(present - files.keys())]
        return [fault for fault in faults if fault is not None] + extra

    def quarantine(self, folder: Path, generation: str, reason: str) -> Path:
        """Set a damaged generation of a key's folder aside, with the reason, so that it is made again.

        `current` keeps naming it: an older generation must not slip into its place unasked.
        """
        source, target = folder / generation, folder / f"{layout.ASIDE_PREFIX}{generation}-{time.time_ns()}"
        if source.is_dir() and not source.is_symlink():
            source.rename(target)
        else:
            target.mkdir()
            source.rename(target / generation)
        write_atomically(target / layout.REASON, reason + "\n")
        sync(folder)
        return target

    @contextlib.contextmanager
    def producer(self, spec: Spec, waiting: Callable[[str], None]) -> Iterator[Path]:
        """Hold the lock of a key: one producer at a time. Yields the key's folder.

        The kernel frees the lock of a killed holder at once. `waiting` is told whom we wait for. A writer that
        outlived its parent keeps `writer`, which is waited for too. ValueError where something that is not ours has
        the place of what the store keeps.
        """
        folder = make_folder(self.folder(spec), self.root)
        with _lock(folder / layout.LOCK) as lock, _lock(folder / layout.WRITER) as writer:
            take(lock.fileno(), lambda: waiting(holder_text(folder)))
            write_holder(lock)
            take(writer.fileno(), lambda: waiting("a stage process that outlived its parent"))
            # Children hold `writer` shared for as long as they live; we only needed to know that none is left.
            fcntl.flock(writer.fileno(), fcntl.LOCK_UN)
            for name in (layout.SPEC, layout.CURRENT):
                if os.path.lexists(folder / name) and not (folder / name).is_file():
                    self.quarantine(folder, name, "it is no plain file")
            text = canonical_json(spec.model_dump())
            # Compared, not only looked for: `plan` explains by it, and a byte of it may have gone bad.
            if not _holds(folder / layout.SPEC, text.encode()):
                write_atomically(folder / layout.SPEC, text)
            # A producer that was killed after its rename left a whole generation without a pointer.
            there = layout.look(folder, _strictly)
            if there.newest is not None and there.newest != there.current:
                write_atomically(folder / layout.CURRENT, there.newest)
            yield folder

    def open_work(
        self, folder: Path, input_digests: Mapping[str, str], told: Callable[[str], None] = lambda why: None
    ) -> Path:
        """The work folder of a key, for its next generation: as a failed attempt left it, else new.

        Left-overs of a generation that was committed are no unfinished work: going on from them would only copy it.
        Work that was made from another content of the inputs (binding -> digest) would mix the two: it is removed, and
        `told` why.
        """
        work, wanted = folder / layout.WORK, layout.look(folder, _strictly).next_generation
        goes_on = layout.made_for(folder) == wanted
        if goes_on and (other := _other_content(layout.made_from(folder), input_digests)) is not None:
            told(f"its unfinished work {other}; it is removed, and the stage begins anew")
            goes_on = False
        if not goes_on:
            remove_tree(work)
            work.mkdir()
            write_atomically(work / layout.MADE_FROM, canonical_json(dict(input_digests)))
            write_atomically(work / layout.MADE_FOR, wanted)
        make_folder(work / layout.CHECKPOINTS, folder)
        return work

    def commit(self, spec: Spec, output: Path, draft: Callable[[dict[str, FileRecord], str], Manifest]) -> Found:
        """Turn the folder `output` into the newest generation: digests, manifest last, one rename, then `current`.

        `draft(files, digest)` gives the manifest. The caller holds the producer's lock.
        """
        (output / layout.MANIFEST).unlink(missing_ok=True)
        files = folder_records(output)
        manifest = with_checksum(draft(files, records_digest(files)))
        sync_tree(output, files)
        write_atomically(output / layout.MANIFEST, manifest.model_dump_json(indent=1))
        return self.adopt(spec, output, manifest)

    def adopt(self, spec: Spec, whole: Path, manifest: Manifest) -> Found:
        """Make a whole folder, manifest included, the newest generation. The caller holds the producer's lock."""
        folder = self.folder(spec)
        generation = folder / layout.look(folder, _strictly).next_generation
        whole.rename(generation)
        sync(folder)
        write_atomically(folder / layout.CURRENT, generation.name)
        remove_tree(folder / layout.WORK)
        return Found(manifest, generation)

    def unfinished(self, spec: Spec, input_digests: Mapping[str, str]) -> tuple[int, Path] | None:
        """Step and folder of the checkpoint that the next attempt at a spec goes on from (see `open_work`).

        input_digests  of the inputs whose content is known already
        """
        folder = self.folder(spec)
        try:
            # Asked for every stage of a plan: the folder is listed only where there is work.
            if (begun := layout.made_for(folder)) is None or begun != layout.look(folder).next_generation:
                return None
            recorded = layout.made_from(folder)
            known = recorded and {name: digest for name, digest in recorded.items() if name in input_digests}
            if _other_content(known, input_digests) is not None:
                return None
            return newest_checkpoint(folder / layout.WORK / layout.CHECKPOINTS)
        except (OSError, ValueError):  # what a run cannot use either: it says why
            return None

    # Where a shared store is behind this one, `artifacts.shared.door` does more.

    def obtain(self, spec: Spec, input_digests: Mapping[str, str], node: str, log: Log) -> Found | None:
        """The artifact of a spec, finished here or in the shared store, from where it is brought here; else None."""
        found = self.find(spec, dict(input_digests))
        if isinstance(found, Missing):
            return None
        self.touch(found)
        return found

    def published(self, spec: Spec, input_digests: Mapping[str, str]) -> Manifest | None:
        """The manifest of a shared artifact that was made from these inputs. Raises RemoteError."""
        return None

    def make_once(
        self, spec: Spec, input_digests: Mapping[str, str], node: str, log: Log, refresh: bool, make: Make
    ) -> tuple[Found, bool]:
        """The artifact, and whether `make` made it here: among all machines one makes it at a time.

        `refresh`: what another machine made does not count. The caller holds the producer's lock.
        """
        return make(), True

    def share(self, found: Found, node: str, log: Log) -> None:
        """Share an artifact that is only here: an upload was cut off, or the shared store was named later."""


def stale_input(manifest: Manifest, input_digests: Mapping[str, str]) -> str | None:
    """An input (binding -> content digest now) that is not what the artifact was made from."""
    recorded = manifest.inputs
    return next(
        (name for name, digest in input_digests.items() if name not in recorded or recorded[name].digest != digest),
        None,
    )


def _other_content(recorded: Mapping[str, str] | None, wanted: Mapping[str, str]) -> str | None:
    """How what unfinished work was made from differs from what it would go on with; None where it does not."""
    if recorded is None:
        return "does not say what it was made from"
    differing = sorted(name for name in {*recorded, *wanted} if recorded.get(name) != wanted.get(name))
    return f"was made from another content of {', '.join(differing)}" if differing else None


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[IO[str]]:
    """A lock file of a key. ValueError where something else has its place: whoever moved it could break the lock."""
    try:
        file = open_lock(path)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ENXIO):
            raise
        raise ValueError(f"{path} {error.strerror}; nothing holds it: move it away and run again") from None
    with file:
        yield file


def _holds(path: Path, data: bytes) -> bool:
    try:
        return read_plain(path, len(data)) == data
    except OSError:
        return False


def _strictly(path: Path, error: OSError) -> None:
    """For `layout.look` where something is written by what it sees: what cannot be read must not count as empty."""
    raise error


class _Versioned(BaseModel):
    """What a manifest of every format has."""

    schema_version: int = Field(ge=0, lt=1 << 31)


class ManifestVersionError(ValueError):
    """A manifest of a format that this version does not read."""


def read_manifest(generation: Path) -> Manifest:
    """The manifest of a generation. Raises OSError; else as `parse_manifest`."""
    return parse_manifest(read_plain(generation / layout.MANIFEST))


def parse_manifest(data: bytes) -> Manifest:
    """A manifest from its bytes. Raises ManifestVersionError, or ValueError, in a line, where it is damaged."""
    try:
        return _parse_manifest(data)
    except ValidationError as error:
        torn = error.errors()[0]["type"] == "json_invalid"
        raise ValueError("it is not what was written" if torn else first_problem(error)) from None


def _parse_manifest(data: bytes) -> Manifest:
    version = _Versioned.model_validate_json(data).schema_version
    if version != MANIFEST_SCHEMA_VERSION:
        age = "a newer" if version > MANIFEST_SCHEMA_VERSION else "an older"
        raise ManifestVersionError(
            f"its manifest has format {version}, written by {age} smoltulu; this reads format {MANIFEST_SCHEMA_VERSION}"
        )
    manifest = Manifest.model_validate_json(data)
    if not manifest.checksum:
        raise ValueError("it has no checksum, without which its content cannot be believed")
    if manifest.checksum != manifest_checksum(manifest):
        raise ValueError("it has other content than was written")
    return manifest
