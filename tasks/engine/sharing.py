"""One artifact between this machine's store and the shared one (`compute.remote`): taken from there, or put there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from smoltulu.artifacts import readable
from smoltulu.artifacts.store import Found, Store, stale_input
from smoltulu.schemas.artifact import Spec
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.data.sources import expand_text

if TYPE_CHECKING:
    from smoltulu.artifacts.shared.lease import Lease
    from smoltulu.artifacts.shared.remote import Remote

Log = logging.Logger | logging.LoggerAdapter

_REPORT_SECONDS = 5.0


def open_remote(compute: ComputeSettings) -> Remote | None:
    """The shared store that `compute` names, looked at once. Raises ValueError where it cannot be used."""
    if compute.remote is None:
        return None
    from smoltulu.artifacts.shared.remote import Remote

    remote = Remote(expand_text(compute.remote))
    remote.check(writing=remote.writable)
    return remote


def take_over(
    spec: Spec, input_digests: Mapping[str, str], store: Store, remote: Remote, node: str, log: Log
) -> Found | None:
    """The shared artifact of a spec, brought here and made the newest generation; None where there is none to use.

    The caller holds the producer's lock.
    """
    from smoltulu.artifacts.shared.remote import DamagedArtifact, RemoteArtifact, RemoteError

    key_folder = store.folder(spec)
    try:
        shared = remote.find(spec.stage, key_folder.name)
        if not isinstance(shared, RemoteArtifact):
            return None
        if stale_input(shared.manifest, input_digests) is not None:
            log.info("%s: the shared store's artifact was made from inputs with another content", node)
            return None
        target = key_folder / "pull"
        remote.pull(shared, target, _progress(f"{node}: taken from the shared store", log))
    except DamagedArtifact as error:
        log.warning("%s: %s; made again here", node, error)
        return None
    except RemoteError as error:
        log.warning("%s: %s; goes on without the shared store", node, error)
        return None
    return store.adopt(spec, target, shared.manifest)


def find_anywhere(
    spec: Spec, input_digests: Mapping[str, str], store: Store, remote: Remote | None, node: str, log: Log
) -> Found | None:
    """An artifact that is finished here or in the shared store, from where it is brought here."""
    found = store.find(spec, dict(input_digests))
    if isinstance(found, Found):
        store.touch(found)
        return found
    if remote is None:
        return None
    with store.producer(spec, lambda whom: log.info("%s: waiting for %s, which makes it", node, whom)):
        return take_over(spec, input_digests, store, remote, node, log)


def share(found: Found, remote: Remote, lease: Lease, node: str, log: Log) -> None:
    """Put an artifact into the shared store. What goes wrong there costs no result: it is said, and tried next time."""
    from smoltulu.artifacts.shared.lease import LeaseLost

    try:
        if remote.push(found.folder, lease, _progress(f"{node}: put into the shared store", log)):
            log.info("%s: is in the shared store", node)
    except LeaseLost as error:
        log.warning("%s: not shared: %s", node, error)
    except ValueError as error:  # RemoteError, or a file that changed since it was committed
        log.warning("%s: not shared, tried again by the next run: %s", node, error)


def share_if_absent(found: Found, remote: Remote, node: str, log: Log) -> None:
    """Share an artifact that is only here: an upload was cut off, or the shared store was named later."""
    from smoltulu.artifacts.shared.remote import RemoteArtifact, RemoteError

    spec = found.manifest.spec
    key = found.manifest.key
    try:
        if not remote.writable or isinstance(remote.find(spec.stage, key), RemoteArtifact):
            return
        # Not waited for: whoever makes the same key just now shares it too.
        with remote.lease(spec.stage, key, lambda whom: None, wait=False) as lease:
            if lease is not None:
                share(found, remote, lease, node, log)
    except RemoteError as error:
        log.warning("%s: not shared, tried again by the next run: %s", node, error)


def _progress(text: str, log: Log) -> Callable[[int, int], None]:
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _REPORT_SECONDS:
            last = time.monotonic()
            log.info("%s: %s of %s", text, readable.size(done), readable.size(total))

    return report
