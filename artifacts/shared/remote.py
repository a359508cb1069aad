"""The shared store: artifacts under a URL that several machines use, each with its local store as cache.

Layout: artifacts/shared/format.py; leases: artifacts/shared/lease.py. A push writes files, then manifest, then pointer;
a reader reads in the opposite order and never sees half an artifact. What comes from a shared store is not trusted:
everything is checked before it is in the local store.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from blake3 import blake3

from smoltulu.artifacts import readable
from smoltulu.artifacts.files import MAX_RECORD_BYTES, remove_tree, sync_tree
from smoltulu.artifacts.keys import file_fault
from smoltulu.artifacts.layout import MANIFEST
from smoltulu.artifacts.shared import lease as leases
from smoltulu.artifacts.shared.format import PULL_STATE, Part, RemoteArtifact, checked_manifest, parts_of
from smoltulu.artifacts.shared.lease import Ending, Lease
from smoltulu.artifacts.shared.objects import EXCLUSIVE_PROTOCOLS, RemoteError, explained, open_objects
from smoltulu.artifacts.store import Missing, parse_manifest
from smoltulu.schemas.artifact import FileRecord

Report = Callable[[int, int], None]
Job = TypeVar("Job")
Result = TypeVar("Result")


class DamagedArtifact(RemoteError):
    """Files of a shared artifact do not have the bytes that its manifest promises; it is marked, a push fixes it."""


@dataclass
class Remote:
    """Artifacts under a URL (s3://, gs://, az://, abfs://) or a folder; other fsspec URLs can only be read.

    part_bytes      larger files are transferred in parts of this size; an interrupted transfer loses less than one
                    for each of the `num_transfers` at a time, which also bounds the memory
    allow_http      take a URL that is not encrypted
    beat_seconds    how often a lease is renewed; stale_seconds: how long silence is borne before it is taken over

    All methods raise RemoteError for a store that cannot be reached, is forbidden or does not exist, after transient
    errors were retried for a minute.
    """

    url: str
    part_bytes: int = 64 << 20
    beat_seconds: float = 15.0
    stale_seconds: float = 60.0
    num_transfers: int = 4
    allow_http: bool = False

    def __post_init__(self) -> None:
        if self.stale_seconds < 3 * self.beat_seconds:
            given = f"stale_seconds {self.stale_seconds:g} is below three times beat_seconds {self.beat_seconds:g}"
            raise ValueError(given)
        self._objects = open_objects(self.url, self.allow_http)
        self.url = self._objects.url
        self.writable = self._objects.writable

    def check(self, writing: bool = True) -> None:
        """Try what will be needed, on an object of our own: read, and create exclusively if `writing`."""
        name = f"checks/{uuid.uuid4().hex}"
        if writing:
            self._require_writable()
            self._ask(self._objects.prepare)
        self._ask(lambda: self._objects.list(name, patience=2))
        if not writing:
            return
        created = self._ask(lambda: self._objects.create(name, b"first", patience=2))
        again = self._ask(lambda: self._objects.create(name, b"second", patience=2))
        kept = self._ask(lambda: self._objects.get(name, patience=2))
        self._objects.delete([name])
        if (created, again, kept) != (True, False, b"first"):
            raise RemoteError(
                f"shared store {self.url}: the server overwrites an object that it was asked to create only if there "
                "is none (If-None-Match), so that two machines could hold one lease; update the server or use another"
            )

    def find(self, stage: str, key: str) -> RemoteArtifact | Missing:
        """The current artifact of a key: its pointer, its checked manifest, and all its objects there in full size."""

        def look() -> RemoteArtifact | Missing:
            for _ in range(3):
                # What was listed may be cleared away before it is read, where another machine publishes right now.
                with contextlib.suppress(FileNotFoundError):
                    return self._find(stage, key, self._objects.list(_folder(stage, key)))
            return Missing("it is being replaced")

        return self._ask(look)

    def pull(self, artifact: RemoteArtifact, target: Path, report: Report = lambda done, total: None) -> None:
        """Download an artifact into `target`, then a whole generation folder; goes on where an earlier pull stopped.

        `target` belongs to this function: whatever else is there is removed. `report(done, total)` counts bytes.
        Raises DamagedArtifact for bytes that differ from the manifest when downloaded twice, ValueError where the disk
        is too small. Nothing is written outside of `target`.
        """
        state = target / PULL_STATE
        # A finished pull is a begun one too: the caller may have been killed before it took the folder.
        begun = any(_holds(path, artifact.manifest_bytes) for path in (state / MANIFEST, target / MANIFEST))
        if not begun or any(path.is_symlink() for path in target.rglob("*")):
            remove_tree(target)
        state.mkdir(parents=True, exist_ok=True)
        (state / MANIFEST).write_bytes(artifact.manifest_bytes)
        names_of: dict[str, list[str]] = {}
        records: dict[str, FileRecord] = {}
        for name, record in artifact.manifest.files.items():
            if file_fault(target, name, record, full=True) is not None:
                names_of.setdefault(record.blake3, []).append(name)
                records[record.blake3] = record
        total = sum(record.size for record in artifact.manifest.files.values())
        done = total - sum(records[digest].size * len(names) for digest, names in names_of.items())
        fetched = sum(path.stat().st_blocks * 512 for path in state.iterdir())
        _require_space(target, total - done - fetched)
        report(done, total)

        def counted(digest: str, size: int) -> None:
            nonlocal done
            done += size * len(names_of[digest])
            report(min(done, total), total)

        damaged = self._download(artifact, records, state, counted)
        if damaged:
            # Once more: the network or an interrupted earlier pull may have been at fault, not the store.
            for digest in damaged:
                (state / digest).unlink(missing_ok=True)
                (state / f"{digest}.done").unlink(missing_ok=True)
            damaged = self._download(artifact, {digest: records[digest] for digest in damaged}, state, counted)
        for digest in records.keys() - damaged:
            _place(state / digest, [target / name for name in names_of[digest]])
        if damaged:
            raise self._mark(artifact, [records[digest] for digest in sorted(damaged)], names_of)
        (target / MANIFEST).write_bytes(artifact.manifest_bytes)
        shutil.rmtree(state)
        sync_tree(target, [*artifact.manifest.files, MANIFEST])

    @contextlib.contextmanager
    def lease(self, stage: str, key: str, waiting: Callable[[str], None], wait: bool = True) -> Iterator[Lease | None]:
        """Be the one producer of a key among all machines; None if the one waited for published: `find` again.

        Without `wait` also None as soon as another holder shows a sign of life; a silent one is waited out all the
        same. `waiting` is told whom we wait for, at once and every 30 s. A push ends the lease, or the block's end.
        """
        self._require_writable()
        times = {"beat_seconds": self.beat_seconds, "stale_seconds": self.stale_seconds}
        held = self._ask(lambda: leases.acquire(self._objects, _folder(stage, key), waiting, **times, wait=wait))
        try:
            yield held
        finally:
            if held is not None:
                held.release()

    def push(self, folder: Path, lease: Lease, report: Report = lambda done, total: None) -> bool:
        """Upload a generation folder and make it the current one: files, manifest, pointer; this ends the lease.

        What is there in full size and not marked as damaged is not uploaded again, so that an interrupted push goes
        on. False if this very generation was current already. `report(done, total)` counts bytes. Raises LeaseLost
        (nothing is published), ValueError if a file changed since it was committed.
        """
        manifest_bytes = (folder / MANIFEST).read_bytes()
        manifest = parse_manifest(manifest_bytes)
        assert lease.folder == _folder(manifest.spec.stage, manifest.key)
        found = self.find(manifest.spec.stage, manifest.key)
        if isinstance(found, RemoteArtifact) and found.manifest_bytes == manifest_bytes:
            return False
        self._ask(lambda: self._objects.settle(lease.folder))
        there = self._ask(lambda: self._objects.list(lease.folder))
        prefix = f"{lease.folder}/damaged/"
        marks = {name.removeprefix(prefix): name for name, size in there.items() if name.startswith(prefix) and size}
        paths = {record.blake3: (folder / name, record) for name, record in manifest.files.items()}
        jobs = []
        for path, record in paths.values():
            missing = [
                part
                for part in parts_of(record, self.part_bytes)
                if there.get(f"{lease.folder}/files/{part.name}") != part.size or part.name in marks
            ]
            # The name of an object is a promise about its bytes: a local file that went bad must not be sent.
            if missing and (fault := file_fault(path.parent, path.name, record, full=True)) is not None:
                raise ValueError(f"{path.parent}: {fault}; run smoltulu verify, which has it made again")
            jobs += [(path, part) for part in missing]
        total = sum(record.size for _, record in paths.values())
        done = total - sum(part.size for _, part in jobs)
        report(done, total)

        def upload(job: tuple[Path, Part]) -> int:
            path, part = job
            if lease.lost.is_set():
                lease.check()
            with path.open("rb") as file:
                data = os.pread(file.fileno(), part.size, part.offset)
            self._ask(lambda: self._objects.put(f"{lease.folder}/files/{part.name}", data))
            return part.size

        for size in _in_parallel(upload, jobs, self.num_transfers):
            done += size
            report(done, total)
        digest = blake3(manifest_bytes).hexdigest()
        self._ask(lambda: self._objects.put(f"{lease.folder}/manifests/{digest}.json", manifest_bytes))
        # An empty mark does not count: not everybody who may write may delete.
        for mark in [marks[part.name] for _, part in jobs if part.name in marks]:
            self._ask(partial(self._objects.put, mark, b""))
            self._objects.delete([mark])
        lease.publish(digest, self.part_bytes)
        return True

    def _find(self, stage: str, key: str, there: dict[str, int]) -> RemoteArtifact | Missing:
        folder = _folder(stage, key)
        turns = leases.turns_in(there, folder)
        try:
            published = leases.current(self._objects, folder, turns)
        except ValueError:
            return Missing("its pointer is damaged or was written by a newer smoltulu")
        if published is None:
            if turns and "end" not in turns[max(turns)]:
                whom = leases.holder(self._objects, folder, turns, max(turns))
                return Missing(f"not finished; last begun by {whom}")
            return Missing("never made")
        token, ending = published
        if isinstance(found := self._read_manifest(stage, key, token, ending, there), Missing):
            return found
        for name, record in found.manifest.files.items():
            # Checked before the parts are listed: a false size must not cost memory.
            if record.size // found.part_bytes > len(there):
                return Missing(f"{name} is damaged: parts of it are gone")
            for part in parts_of(record, found.part_bytes):
                size = there.get(f"{folder}/files/{part.name}")
                if size != part.size:
                    what = "is gone" if size is None else f"has {size} bytes instead of {part.size}"
                    return Missing(f"{name} is damaged: {part.name} {what}")
                if there.get(f"{folder}/damaged/{part.name}"):
                    return Missing(f"{name} is damaged: a reader found other bytes than its manifest says")
        return found

    def _read_manifest(
        self, stage: str, key: str, token: int, ending: Ending, there: dict[str, int]
    ) -> RemoteArtifact | Missing:
        if ending.manifest is None or ending.part_bytes is None:
            return Missing("its pointer is damaged")
        name = f"{_folder(stage, key)}/manifests/{ending.manifest}.json"
        if name not in there:
            return Missing("its manifest is gone")
        if there[name] > MAX_RECORD_BYTES:
            return Missing(f"its manifest has {there[name]:,} bytes, more than any real one")
        data = self._objects.get(name)
        if blake3(data).hexdigest() != ending.manifest:
            return Missing("its manifest is damaged")
        try:
            return RemoteArtifact(token, checked_manifest(data, stage, key), data, ending.part_bytes)
        except ValueError as error:
            return Missing(str(error))

    def _download(
        self,
        artifact: RemoteArtifact,
        records: dict[str, FileRecord],
        state: Path,
        counted: Callable[[str, int], None],
    ) -> set[str]:
        """Fetch files by digest into `state`, what is not there yet; returns the digests that did not come out."""
        folder = _folder(artifact.manifest.spec.stage, artifact.manifest.key)
        writing = threading.Lock()
        jobs, damaged = [], set()
        for digest, record in records.items():
            parts = parts_of(record, artifact.part_bytes)
            diary = state / f"{digest}.done"
            fetched = set(diary.read_text().split()) if diary.exists() and (state / digest).exists() else set()
            missing = [part for part in parts if part.name not in fetched]
            (state / digest).touch()
            counted(digest, record.size - sum(part.size for part in missing))
            jobs += [(digest, part) for part in missing]

        def fetch(job: tuple[str, Part]) -> tuple[str, Part, bool]:
            digest, part = job
            try:
                data = self._objects.get(f"{folder}/files/{part.name}")
            except FileNotFoundError:
                return digest, part, False
            except OSError as error:
                raise explained(error, self.url) from None
            if len(data) != part.size:
                return digest, part, False
            with (state / digest).open("r+b") as file:
                file.seek(part.offset)
                file.write(data)
            # After the bytes: a part that is named here was written, or the digest of the whole will tell.
            with writing, (state / f"{digest}.done").open("a") as diary:
                diary.write(f"{part.name}\n")
            return digest, part, True

        for digest, part, good in _in_parallel(fetch, jobs, self.num_transfers):
            if not good:
                damaged.add(digest)
            counted(digest, part.size)
        return damaged | {digest for digest, record in records.items() if file_fault(state, digest, record, full=True)}

    def _mark(
        self, artifact: RemoteArtifact, records: list[FileRecord], names_of: dict[str, list[str]]
    ) -> DamagedArtifact:
        """Leave a mark at the store, so that others need not download what is damaged, and the next push fixes it."""
        folder = _folder(artifact.manifest.spec.stage, artifact.manifest.key)
        # Readers may have no right to write; the damage is known to this process in any case.
        with contextlib.suppress(OSError):
            for record in records:
                for part in parts_of(record, artifact.part_bytes):
                    self._objects.put(f"{folder}/damaged/{part.name}", b"damaged\n", patience=5)
        names = ", ".join(sorted(name for record in records for name in names_of[record.blake3]))
        return DamagedArtifact(
            f"shared store {self.url}: {folder} is damaged, the bytes of {names} differ from its manifest; "
            "it is made again"
        )

    def _require_writable(self) -> None:
        if not self.writable:
            raise RemoteError(
                f"shared store {self.url}: this protocol cannot create an object only if there is none, which leases "
                f"need; it can be read. To write, use a folder or one of {', '.join(EXCLUSIVE_PROTOCOLS)}"
            )

    def _ask(self, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except OSError as error:
            # Without the chain: what the backend raised may show a URL with credentials.
            raise explained(error, self.url) from None


def _folder(stage: str, key: str) -> str:
    return f"{stage}/{key}"


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:
        return False


def _place(source: Path, targets: list[Path]) -> None:
    """Bring a checked file to its names."""
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
    for target in targets[1:]:
        shutil.copyfile(source, target)
    source.rename(targets[0])


def _require_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(
            f"{readable.size(free)} free under {folder}, the shared artifact needs {readable.size(num_bytes)}; "
            "free some space (smoltulu gc) and run again, the download goes on where it stopped"
        )


def _in_parallel(action: Callable[[Job], Result], jobs: list[Job], num_workers: int) -> Iterator[Result]:
    """Results as they come; after the first error what has not begun is dropped."""
    pool = ThreadPoolExecutor(num_workers)
    try:
        for future in as_completed([pool.submit(action, job) for job in jobs]):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
