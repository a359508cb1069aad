"""A store with a shared one behind it: looks here, then there, and shares what is made.

An error of the shared store costs no result: it is logged, and the work goes on here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from smoltulu.artifacts import readable
from smoltulu.artifacts.keys import artifact_key
from smoltulu.artifacts.layout import PULL
from smoltulu.artifacts.shared.lease import Lease, LeaseLost
from smoltulu.artifacts.shared.remote import DamagedArtifact, Remote, RemoteArtifact, RemoteError
from smoltulu.artifacts.store import WAITING, Found, Log, Make, Refusal, Store, stale_input
from smoltulu.schemas.artifact import Manifest, Spec

_REPORT_SECONDS = 5.0


class SharedStore(Store):
    """A local store, and the shared one under a URL that it takes from and gives to."""

    def __init__(self, root: Path | str, remote: Remote, refusal: Refusal = lambda manifest: None) -> None:
        super().__init__(root, refusal)
        self.remote = remote

    def published(self, spec: Spec, input_digests: Mapping[str, str]) -> Manifest | None:
        shared = self.remote.find(spec.stage, artifact_key(spec))
        if not isinstance(shared, RemoteArtifact) or stale_input(shared.manifest, input_digests) is not None:
            return None
        return shared.manifest if self.refusal(shared.manifest) is None else None

    def obtain(self, spec: Spec, input_digests: Mapping[str, str], node: str, log: Log) -> Found | None:
        if (found := super().obtain(spec, input_digests, node, log)) is not None:
            return found
        with self.producer(spec, partial(log.info, WAITING, node)):
            return self._fetch(spec, input_digests, node, log)

    def make_once(
        self, spec: Spec, input_digests: Mapping[str, str], node: str, log: Log, refresh: bool, make: Make
    ) -> tuple[Found, bool]:
        def fetched() -> Found | None:
            return None if refresh else self._fetch(spec, input_digests, node, log)

        if (found := fetched()) is not None:
            return found, False
        if not self.remote.writable:
            return make(), True
        with contextlib.ExitStack() as held:
            lease = None
            try:
                waiting = partial(log.info, WAITING, node)
                lease = held.enter_context(self.remote.lease(spec.stage, artifact_key(spec), waiting))
            except RemoteError as error:
                log.warning("%s: %s; goes on without the shared store", node, error)
            else:
                # It may have been made elsewhere before we had the lease, or while we waited for it (None).
                if (found := fetched()) is not None:
                    return found, False
            made = make()
            if lease is not None:
                _push(self.remote, lease, node, log, made)
            return made, True

    def share(self, found: Found, node: str, log: Log) -> None:
        spec, key = found.manifest.spec, found.manifest.key
        try:
            if not self.remote.writable or isinstance(self.remote.find(spec.stage, key), RemoteArtifact):
                return
            # Not waited for: whoever makes the same key just now shares it too.
            with self.remote.lease(spec.stage, key, lambda whom: None, wait=False) as lease:
                if lease is not None:
                    _push(self.remote, lease, node, log, found)
        except RemoteError as error:
            log.warning("%s: not shared, tried again by the next run: %s", node, error)

    def _fetch(self, spec: Spec, input_digests: Mapping[str, str], node: str, log: Log) -> Found | None:
        """The shared artifact as the newest generation here; None where there is none to use. Under `producer`."""
        folder = self.folder(spec)
        try:
            shared = self.remote.find(spec.stage, folder.name)
            if not isinstance(shared, RemoteArtifact):
                return None
            if stale_input(shared.manifest, input_digests) is not None:
                log.info("%s: the shared store's artifact was made from inputs with another content", node)
                return None
            if (why := self.refusal(shared.manifest)) is not None:
                log.warning("%s: the shared store's artifact is not taken: %s; made again here", node, why)
                return None
            self.remote.pull(shared, folder / PULL, _progress(f"{node}: taken from the shared store", log))
        except DamagedArtifact as error:
            log.warning("%s: %s; made again here", node, error)
            return None
        except RemoteError as error:
            log.warning("%s: %s; goes on without the shared store", node, error)
            return None
        return self.adopt(spec, folder / PULL, shared.manifest)


def _push(remote: Remote, lease: Lease, node: str, log: Log, found: Found) -> None:
    try:
        if remote.push(found.folder, lease, _progress(f"{node}: put into the shared store", log)):
            log.info("%s: is in the shared store", node)
    except LeaseLost as error:
        log.warning("%s: not shared: %s", node, error)
    except (ValueError, OSError) as error:  # RemoteError, or a file that changed since, or that cannot be read
        log.warning("%s: not shared, tried again by the next run: %s", node, error)


def _progress(text: str, log: Log) -> Callable[[int, int], None]:
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _REPORT_SECONDS:
            last = time.monotonic()
            log.info("%s: %s of %s", text, readable.size(done), readable.size(total))

    return report
