"""One producer per key on a shared store: turns with a fencing token, built on exclusive creation alone.

Objects below `<stage>/<key>/turns/`, where the token n counts up from 1:
  <n>.lease   created exclusively by whoever gets turn n; says who
  <n>.beat    overwritten by the holder every `beat_seconds`; a counter
  <n>.end     created exclusively: turn n is over. `published` (by the holder: this artifact is current), `released`
              (by the holder: nothing was made) or `fenced` (by a waiter: the holder was silent for too long)

Turn n + 1 begins only after n has ended. As an end is created once, a holder that was fenced cannot publish, however
late it wakes up: losing a lease and being unable to publish are the same fact, decided by the store, not by a clock.
A waiter counts silence on its own monotonic clock, so that clocks that differ by minutes do not matter. Compare the
leader election of https://morling.dev/blog/leader-election-with-s3-conditional-writes, which fences by expiry.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Literal

from pydantic import Field

from smoltulu.artifacts.shared.objects import Objects, RemoteError, explained
from smoltulu.schemas.common import StrictModel

_NAME = re.compile(r"([0-9]{8})\.(lease|beat|end)")
_LAST_TOKEN = 10**8 - 1
#: Lease, beat and end are some hundred bytes; what is larger is none of them, and is not read.
_MAX_BYTES = 1 << 16
_TOLD_SECONDS = 30.0

#: Token -> which of lease, beat and end are there, with their bytes.
Turns = dict[int, dict[str, int]]


class LeaseLost(RuntimeError):
    """Another process took over; what this one made is not published."""


class LeaseRecord(StrictModel):
    """Who holds a turn. `since` is for people only: no clock is ever compared with another machine's."""

    pid: int
    host: str
    since: str
    nonce: str = Field(description="makes the record unlike every other, see Objects.create")

    def holder(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


class Ending(StrictModel):
    """How a turn ended; `published` ones are what readers go by."""

    schema_version: int = Field(1)
    kind: Literal["published", "released", "fenced"]
    by: LeaseRecord
    manifest: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="BLAKE3 of the manifest's bytes")
    part_bytes: int | None = Field(
        None, ge=1, le=1 << 32, description="files above this size were uploaded in parts of it"
    )


class Lease:
    """Turn `token` of a key, kept alive by a thread until it is published, released or lost."""

    def __init__(self, objects: Objects, folder: str, token: int, record: LeaseRecord, beat_seconds: float) -> None:
        self.token = token
        self.folder = folder
        #: set as soon as the heartbeat learns that another process took over
        self.lost = threading.Event()
        self._objects = objects
        self._record = record
        self._beat_seconds = beat_seconds
        self._stop = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._beat, name=f"lease-{token}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises LeaseLost if another process took over, RemoteError if the store cannot be asked."""
        try:
            if self._superseded():
                self.lost.set()
        except OSError as error:
            raise explained(error, self._objects.url) from None
        if self.lost.is_set():
            raise LeaseLost(self._lost_text())

    def publish(self, manifest: str, part_bytes: int) -> None:
        """End the turn by making an uploaded artifact the current one, in one step. Raises LeaseLost, RemoteError."""
        self._silence()
        ending = Ending(kind="published", by=self._record, manifest=manifest, part_bytes=part_bytes)
        try:
            made = self._objects.create(_name(self.folder, self.token, "end"), ending.model_dump_json().encode())
            # Ends below a published one are cleared away: one that was fenced could be created anew, to no effect.
            names = list_turns(self._objects, self.folder)
            newest = current(self._objects, self.folder, names) if made and max(names, default=0) > self.token else None
        except OSError as error:
            raise explained(error, self._objects.url) from None
        self._ended = True
        if not made or (newest is not None and newest[0] > self.token):
            self.lost.set()
            raise LeaseLost(self._lost_text())

    def release(self) -> None:
        """End the turn without an artifact, if it has not ended; never raises, for the turn goes stale anyway."""
        # First the heartbeat, then the last write: the other way round the lease would outlive its end.
        self._silence()
        if not self._ended and not self.lost.is_set():
            ending = Ending(kind="released", by=self._record)
            with contextlib.suppress(OSError):
                name = _name(self.folder, self.token, "end")
                self._objects.create(name, ending.model_dump_json().encode(), patience=10)
        self._ended = True

    def _silence(self) -> None:
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _beat(self) -> None:
        count, pause = 0, 0.0
        while not self._stop.wait(pause):
            try:
                self._objects.put(_name(self.folder, self.token, "beat"), str(count).encode(), patience=0)
                count += 1
                pause = self._beat_seconds
                if self._superseded(patience=0):
                    self.lost.set()
                    return
            except Exception:
                # Whatever it was, the lease is kept for as long as nobody takes it: try again soon.
                pause = min(self._beat_seconds, 2.0)

    def _superseded(self, patience: float = 60.0) -> bool:
        names = list_turns(self._objects, self.folder, patience)
        return max(names, default=0) != self.token or "end" in names[self.token]

    def _lost_text(self) -> str:
        try:
            names = list_turns(self._objects, self.folder, 0)
            end = _read(self._objects, self.folder, names, self.token, "end", 0)
            by = Ending.model_validate_json(end).by.holder()
        except (OSError, ValueError, KeyError):
            by = "another process"
        return (
            f"the lease {self.token} on {self.folder} was taken over by {by}, because this process was not heard of "
            "for too long; what it made stays in the local store and is not published to the shared one"
        )


def acquire(
    objects: Objects,
    folder: str,
    waiting: Callable[[str], None],
    *,
    beat_seconds: float,
    stale_seconds: float,
    wait: bool,
) -> Lease | None:
    """The next turn of a key, which the caller must end; for the rest see `Remote.lease`.

    A holder that is silent for `stale_seconds` is fenced. Raises OSError if the store cannot be used.
    """
    poll = min(5.0, stale_seconds / 12)
    told, looked = -math.inf, 0.0
    seen: tuple[int, bytes | None] | None = None
    silence = 0.0
    while True:
        try:
            # The first look is patient; a later one may fail for as long as it likes, for a wait can be hours long.
            names = list_turns(objects, folder, 60.0 if seen is None else 0.0)
            token = max(names, default=0)
            if not token or "end" in names[token]:
                if seen is not None and _published(objects, folder, names, token):
                    return None
                if token >= _LAST_TOKEN:
                    raise RemoteError(
                        f"shared store {objects.url}: {folder} has had turn {token}, which no other can follow; remove "
                        f"that folder there, and the artifact is shared again"
                    )
                record = _who()
                if objects.create(_name(folder, token + 1, "lease"), record.model_dump_json().encode()):
                    names = list_turns(objects, folder)
                    # Not so if we slept between looking and creating, and the turns went on and were cleared away.
                    if max(names) == token + 1 and "end" not in names[token + 1]:
                        _clear(objects, folder, names)
                        return Lease(objects, folder, token + 1, record, beat_seconds)
                    objects.delete([_name(folder, token + 1, "lease")])
                continue
            beat = None
            with contextlib.suppress(ValueError, FileNotFoundError):
                beat = _read(objects, folder, names, token, "beat", 0)
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            if seen is None:
                raise
            # While we cannot see the store, the holder may not be able to reach it either: that time does not count.
            # What was counted before does: else one lost request in three would keep a dead holder for ever.
            looked = math.inf
            if (now := time.monotonic()) - told > _TOLD_SECONDS:
                waiting("the shared store, which cannot be reached")
                told = now
            time.sleep(poll)
            continue
        now = time.monotonic()
        if seen == (token, beat):
            # Only time in which we looked counts: after a suspend both sides wake up, and we may be first.
            silence += min(max(now - looked, 0.0), 3 * poll)
        elif seen is not None and not wait:
            return None
        else:
            silence = 0.0
        seen, looked = (token, beat), now
        if silence >= stale_seconds:
            ending = Ending(kind="fenced", by=_who())
            objects.create(_name(folder, token, "end"), ending.model_dump_json().encode())
            continue
        if now - told > _TOLD_SECONDS:
            waiting(holder(objects, folder, names, token))
            told = now
        time.sleep(poll)


def list_turns(objects: Objects, folder: str, patience: float = 60.0) -> Turns:
    """What is there of the turns of a key."""
    return turns_in(objects.list(f"{folder}/turns", patience), folder)


def turns_in(names: Mapping[str, int], folder: str) -> Turns:
    """The same from names that were listed already."""
    turns: Turns = {}
    for name, size in names.items():
        if match := _NAME.fullmatch(name.removeprefix(f"{folder}/turns/")):
            turns.setdefault(int(match[1]), {})[match[2]] = size
    return turns


def current(objects: Objects, folder: str, turns: Turns) -> tuple[int, Ending] | None:
    """Token and end of the newest turn that published. Raises ValueError for an end that is unreadable, OSError."""
    for token in sorted(turns, reverse=True):
        if "end" in turns[token]:
            ending = Ending.model_validate_json(_read(objects, folder, turns, token, "end", 60.0))
            if ending.kind == "published":
                return token, ending
    return None


def holder(objects: Objects, folder: str, turns: Turns, token: int) -> str:
    """Who has a turn, in words."""
    try:
        return LeaseRecord.model_validate_json(_read(objects, folder, turns, token, "lease", 0)).holder()
    except (OSError, ValueError):
        return "another process"


def _read(objects: Objects, folder: str, turns: Turns, token: int, kind: str, patience: float) -> bytes:
    """One object of a turn. ValueError where it is too large to be what its name says, OSError."""
    if (size := turns.get(token, {}).get(kind, 0)) > _MAX_BYTES:
        raise ValueError(f"{_name(folder, token, kind)} has {size:,} bytes")
    return objects.get(_name(folder, token, kind), patience)


def _published(objects: Objects, folder: str, turns: Turns, token: int) -> bool:
    try:
        return Ending.model_validate_json(_read(objects, folder, turns, token, "end", 60.0)).kind == "published"
    except (ValueError, FileNotFoundError):
        return False


def _clear(objects: Objects, folder: str, turns: Turns) -> None:
    """Remove what earlier turns left; ends stay until a later one published, for they keep fenced holders out."""
    newest = max(turns)
    with contextlib.suppress(OSError, ValueError):
        published = current(objects, folder, turns)
        floor = published[0] if published else 0
        objects.delete(
            _name(folder, token, kind)
            for token, kinds in turns.items()
            for kind in kinds
            if token < newest and (kind != "end" or token < floor)
        )


def _name(folder: str, token: int, kind: str) -> str:
    return f"{folder}/turns/{token:08d}.{kind}"


def _who() -> LeaseRecord:
    return LeaseRecord(
        pid=os.getpid(),
        host=os.uname().nodename,
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        nonce=uuid.uuid4().hex,
    )
