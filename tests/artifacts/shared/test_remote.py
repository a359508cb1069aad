"""Shared stores: push and pull, kills, leases, fencing, damage, hostile manifests; over a real S3 API and a folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from smoltulu.artifacts.keys import artifact_key, canonical_json, folder_records, records_digest, with_checksum
from smoltulu.artifacts.shared import objects as shared_objects
from smoltulu.artifacts.shared.format import parts_of, unfit_file_names
from smoltulu.artifacts.shared.lease import Ending, LeaseLost, _who
from smoltulu.artifacts.shared.objects import RemoteError, open_objects
from smoltulu.artifacts.shared.remote import DamagedArtifact, Remote, RemoteArtifact
from smoltulu.artifacts.store import Missing
from smoltulu.schemas.artifact import MANIFEST_SCHEMA_VERSION, FileRecord, Manifest, Spec
from tests import s3_double

BEAT, STALE = 0.15, 3.0
PART = 1000
SPEC = Spec(stage="sft", version=1, config={"learning_rate": 1e-4}, inputs={}, externals={})
KEY = artifact_key(SPEC)
FILES = {
    "model.bin": bytes(range(256)) * 10,  # 2,560 bytes: parts of 1000, 1000, 560
    "exact.bin": b"x" * 2 * PART,
    "one.bin": b"y" * PART,
    "empty.txt": b"",
    "sub/folder/copy.bin": b"y" * PART,
    "sub/été – 模型.txt": b"named in several scripts",
    "logs/events": b"a diary",
}


def nobody(whom: str) -> None:
    raise AssertionError(f"nobody should be waited for, but: {whom}")


def generation(folder: Path, files: dict[str, bytes], node: str = "sft") -> Path:
    """A committed generation folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    records = folder_records(folder)
    manifest = Manifest(
        key=KEY, spec=SPEC, digest=records_digest(records), inputs={}, outputs={}, metrics={}, files=records,
        environment={}, node=node, started_at="", finished_at="", duration_seconds=0,
    )  # fmt: skip
    (folder / "manifest.json").write_text(with_checksum(manifest).model_dump_json(indent=1))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def double() -> Iterator[s3_double.S3Double]:
    # The server logs a line for each of thousands of requests.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3_double.running() as double:
        yield double


@pytest.fixture
def s3(
    double: s3_double.S3Double, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> s3_double.S3Double:
    """The server, undisturbed, with an empty bucket `bucket`."""
    for name, value in double.environment().items():
        monkeypatch.setenv(name, value)
    for name, value in s3_double.S3Double(endpoint=double.endpoint).__dict__.items():
        setattr(double, name, value)
    client = double.client()
    client.create_bucket(Bucket="bucket")
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="bucket"):
        for entry in page.get("Contents", []):
            client.delete_object(Bucket="bucket", Key=entry["Key"])
    double.requests.clear()
    return double


@pytest.fixture(params=["s3", "folder"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return "s3://bucket/store"
    (tmp_path / "shared").mkdir()
    return str(tmp_path / "shared")


@pytest.fixture
def local(tmp_path: Path) -> str:
    """For what does not depend on the kind of store."""
    (tmp_path / "shared").mkdir()
    return str(tmp_path / "shared")


def remote(url: str, **changes: int) -> Remote:
    return Remote(url, **{"part_bytes": PART, "beat_seconds": BEAT, "stale_seconds": STALE, **changes})


def push(shared: Remote, folder: Path, report: Callable[[int, int], None] = lambda done, total: None) -> bool:
    with shared.lease("sft", KEY, lambda whom: None) as lease:
        assert lease is not None
        return shared.push(folder, lease, report)


def found(shared: Remote) -> RemoteArtifact:
    artifact = shared.find("sft", KEY)
    assert isinstance(artifact, RemoteArtifact), artifact
    return artifact


def missing(shared: Remote) -> str:
    answer = shared.find("sft", KEY)
    assert isinstance(answer, Missing), answer
    return answer.reason


def until(true: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


CHILD = """
import sys, time
from pathlib import Path
url, folder, key, beat, stale, offset = sys.argv[1:]
if float(offset):
    import datetime
    import smoltulu.artifacts.shared.lease
    true_time = time.time
    time.time = lambda: true_time() + float(offset)
    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, zone=None):
            return datetime.datetime.now(zone) + datetime.timedelta(seconds=float(offset))
    smoltulu.artifacts.shared.lease.datetime = Shifted
from smoltulu.artifacts.shared.lease import LeaseLost
from smoltulu.artifacts.shared.remote import Remote
def say(*words):
    print(*words, flush=True)
remote = Remote(url, part_bytes=1000, beat_seconds=float(beat), stale_seconds=float(stale), num_transfers=1)
with remote.lease("sft", key, lambda whom: say("waits for", whom)) as lease:
    say("has", lease and lease.token)
    for line in sys.stdin:
        try:
            if line.strip() == "check":
                lease.check()
                say("holds")
            elif line.strip() == "push":
                say("published" if remote.push(Path(folder), lease) else "was there")
            elif line.strip() == "pull":
                remote.pull(remote.find("sft", key), Path(folder))
                say("pulled")
            elif line.strip() == "end":
                break
        except LeaseLost as error:
            say("lost:", error)
say("ended")
"""


class Child:
    """Another machine: a process of its own, with a clock of its own."""

    def __init__(
        self, url: str, folder: Path = Path("/nonexistent"), clock_offset: float = 0, stale: float = STALE
    ) -> None:
        values = [url, str(folder), KEY, str(BEAT), str(stale), str(clock_offset)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *values], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def hears(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def ask(self, word: str) -> str:
        self.tell(word)
        return self.hears()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    started: list[Child] = []

    def start(*values: object, **named: object) -> Child:
        started.append(Child(*values, **named))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for one in started:
        one.kill()
        for pipe in (one.process.stdin, one.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


# --- push and pull


def test_round_trip(url: str, tmp_path: Path) -> None:
    shared, folder = remote(url), generation(tmp_path / "gen", FILES)
    shared.check()
    assert missing(shared) == "never made"
    up: list[tuple[int, int]] = []
    assert push(shared, folder, lambda done, total: up.append((done, total)))
    # one.bin and its copy are one object: 2560 + 2000 + 1000 + 27 + 7 bytes
    named = len(FILES["sub/été – 模型.txt"])
    assert up[0] == (0, 5567 + named) and up[-1] == (5567 + named, 5567 + named) and up == sorted(up)
    artifact = found(remote(url))
    assert artifact.manifest.digest == Manifest.model_validate_json((folder / "manifest.json").read_text()).digest
    down: list[tuple[int, int]] = []
    remote(url).pull(artifact, tmp_path / "pull", lambda done, total: down.append((done, total)))
    assert tree(tmp_path / "pull") == tree(folder)
    assert down[-1] == (6567 + named, 6567 + named) and down == sorted(down)
    assert not push(shared, folder), "what is there already is not pushed again"


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    shared = remote(f"file://{tmp_path}/shared")
    shared.check()
    assert push(shared, generation(tmp_path / "gen", FILES))
    assert isinstance(remote(str(tmp_path / "shared")).find("sft", KEY), RemoteArtifact)


def test_a_second_generation_shares_files_with_the_first_s3(s3: s3_double.S3Double, tmp_path: Path) -> None:
    shared = remote("s3://bucket/store")
    push(shared, generation(tmp_path / "a", FILES))
    s3.requests.clear()
    assert push(shared, generation(tmp_path / "b", {**FILES, "logs/events": b"another diary"}))
    assert s3.transfers("PUT") == [blake3(b"another diary").hexdigest()]
    shared.pull(found(shared), tmp_path / "pull")
    assert tree(tmp_path / "pull") == tree(tmp_path / "b")
    assert found(shared).token == 2


def test_a_reader_sees_nothing_of_an_upload_under_way_s3(s3: s3_double.S3Double, tmp_path: Path) -> None:
    s3.transfer_seconds = 0.1
    folder = generation(tmp_path / "gen", FILES)
    seen = []
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(push, remote("s3://bucket/store", num_transfers=1), folder)
        while not upload.done():
            answer, num_uploaded = remote("s3://bucket/store").find("sft", KEY), len(s3.transfers("PUT"))
            seen.append((isinstance(answer, RemoteArtifact), num_uploaded))
    assert upload.result()
    assert any(num_uploaded for _, num_uploaded in seen)
    assert not any(whole and num_uploaded < 8 for whole, num_uploaded in seen)


def test_upload_that_was_killed_goes_on_s3(s3: s3_double.S3Double, tmp_path: Path, child: Callable[..., Child]) -> None:
    s3.transfer_seconds = 0.1
    content = os.urandom(12 * PART)
    folder = generation(tmp_path / "gen", {"model.bin": content})
    first = child("s3://bucket/store", folder)
    assert first.hears() == "has 1"
    first.tell("push")
    until(lambda: len(s3.transfers("PUT")) >= 5)
    first.kill()
    s3.transfer_seconds = 0
    time.sleep(0.2)  # the upload that was under way may still arrive
    shared = remote("s3://bucket/store")
    assert missing(shared).startswith("not finished; last begun by process")
    assert push(shared, folder)
    uploads = Counter(s3.transfers("PUT"))
    assert len(uploads) == 12
    assert sum(uploads.values()) <= 13, "only what was under way when it was killed is sent twice"
    shared.pull(found(shared), tmp_path / "pull")
    assert (tmp_path / "pull/model.bin").read_bytes() == content


def test_download_that_was_killed_goes_on_s3(
    s3: s3_double.S3Double, tmp_path: Path, child: Callable[..., Child]
) -> None:
    content = os.urandom(12 * PART)
    shared = remote("s3://bucket/store")
    push(shared, generation(tmp_path / "gen", {"model.bin": content}))
    s3.transfer_seconds = 0.1
    target = tmp_path / "pull"
    reader = child("s3://bucket/store", target)
    reader.hears()
    reader.tell("pull")
    until(lambda: len(s3.transfers("GET")) >= 5)
    reader.kill()
    assert not (target / "model.bin").exists()
    s3.transfer_seconds = 0
    shared.pull(found(shared), target)
    assert tree(target) == tree(tmp_path / "gen")
    assert len(s3.transfers("GET")) <= 13


def test_download_that_was_torn_is_found_out(local: str, tmp_path: Path) -> None:
    """After a power cut a part can be in the diary though its bytes never reached the disk."""
    shared, target = remote(local), tmp_path / "pull"
    push(shared, generation(tmp_path / "gen", FILES))
    artifact = found(shared)
    record = artifact.manifest.files["model.bin"]
    (target / ".pull").mkdir(parents=True)
    (target / ".pull/manifest.json").write_bytes(artifact.manifest_bytes)
    (target / ".pull" / record.blake3).write_bytes(bytes(2560))
    names = [part.name for part in parts_of(record, PART)]
    (target / ".pull" / f"{record.blake3}.done").write_text("\n".join(names) + "\n")
    shared.pull(artifact, target)
    assert tree(target) == tree(tmp_path / "gen")


def test_pull_removes_what_is_not_its_own(local: str, tmp_path: Path) -> None:
    """A link in the target could lead a write outside of it."""
    shared, target = remote(local), tmp_path / "pull"
    push(shared, generation(tmp_path / "gen", FILES))
    outside = tmp_path / "outside"
    outside.mkdir()
    target.mkdir()
    (target / "sub").symlink_to(outside)
    shared.pull(found(shared), target)
    assert tree(target) == tree(tmp_path / "gen") and not list(outside.iterdir())


def test_push_refuses_a_file_that_went_bad(local: str, tmp_path: Path) -> None:
    shared, folder = remote(local), generation(tmp_path / "gen", FILES)
    (folder / "exact.bin").write_bytes(b"z" * 2 * PART)
    with pytest.raises(ValueError, match=r"exact\.bin has other bytes than were written; run smoltulu verify"):
        push(shared, folder)
    assert missing(shared) == "never made"


# --- damage


def damage(url: str, name: str) -> None:
    """Flip a byte of an object; its size stays."""
    objects = open_objects(url)
    path = f"sft/{KEY}/files/{name}"
    data = bytearray(objects.get(path))
    data[-1] ^= 1
    objects.put(path, bytes(data))


def test_damage_is_found_marked_and_fixed(url: str, tmp_path: Path) -> None:
    shared, folder = remote(url), generation(tmp_path / "gen", FILES)
    push(shared, folder)
    artifact = found(shared)
    damage(url, parts_of(artifact.manifest.files["model.bin"], PART)[1].name)
    with pytest.raises(DamagedArtifact, match=r"model\.bin differ") as caught:
        shared.pull(artifact, tmp_path / "pull")
    assert "the bytes of model.bin differ" in str(caught.value)
    assert not (tmp_path / "pull/manifest.json").exists()
    assert missing(remote(url)) == "model.bin is damaged: a reader found other bytes than its manifest says"
    uploaded: list[int] = []
    assert push(shared, folder, lambda done, total: uploaded.append(done))
    assert uploaded[-1] - uploaded[0] == 2560, "only the damaged file is sent again"
    shared.pull(found(remote(url)), tmp_path / "pull")
    assert tree(tmp_path / "pull") == tree(folder)


def test_an_object_that_is_gone_or_short_makes_the_artifact_missing(url: str, tmp_path: Path) -> None:
    shared, folder = remote(url), generation(tmp_path / "gen", FILES)
    push(shared, folder)
    objects = open_objects(url)
    name = f"sft/{KEY}/files/{blake3(FILES['one.bin']).hexdigest()}"
    objects.put(name, b"y" * 10)
    assert "has 10 bytes instead of 1000" in missing(shared)
    objects.delete([name])
    assert missing(shared).startswith("one.bin is damaged") and missing(shared).endswith("is gone")
    assert push(shared, folder)
    found(shared)


def test_an_object_that_goes_during_the_download_is_damage(local: str, tmp_path: Path) -> None:
    shared = remote(local)
    push(shared, generation(tmp_path / "gen", FILES))
    artifact = found(shared)
    open_objects(local).delete([f"sft/{KEY}/files/{blake3(FILES['one.bin']).hexdigest()}"])
    with pytest.raises(DamagedArtifact) as caught:
        shared.pull(artifact, tmp_path / "pull")
    assert "the bytes of one.bin, sub/folder/copy.bin differ" in str(caught.value)


# --- what others wrote


def forge(url: str, text: str, part_bytes: int = PART, files: dict[str, bytes] | None = None) -> Remote:
    """Publish a manifest that no smoltulu would, or one that it would."""
    objects, digest = open_objects(url), blake3(text.encode()).hexdigest()
    for data in (files or {}).values():
        objects.put(f"sft/{KEY}/files/{blake3(data).hexdigest()}", data)
    objects.put(f"sft/{KEY}/manifests/{digest}.json", text.encode())
    ending = Ending(kind="published", by=_who(), manifest=digest, part_bytes=part_bytes)
    objects.put(f"sft/{KEY}/turns/00000001.end", ending.model_dump_json().encode())
    return remote(url)


def manifest_of(content: dict[str, bytes], /, **changes: object) -> str:
    records = {name: FileRecord(size=len(data), blake3=blake3(data).hexdigest()) for name, data in content.items()}
    values = {
        "schema_version": MANIFEST_SCHEMA_VERSION, "key": KEY, "spec": SPEC.model_dump(),
        "digest": records_digest(records), "inputs": {}, "outputs": {}, "metrics": {},
        "files": {name: record.model_dump() for name, record in records.items()}, "environment": {}, "node": "sft",
        "started_at": "", "finished_at": "", "duration_seconds": 0,
    }  # fmt: skip
    values |= changes
    # As `manifest_checksum`, of whatever is in it: who forges a manifest can do that too.
    left_out = {"checksum", "extends", "adopted_from"}
    checked = {"compute": {}, "resumed_from_steps": []} | {n: v for n, v in values.items() if n not in left_out}
    with contextlib.suppress(UnicodeError):
        values.setdefault("checksum", hashlib.sha256(canonical_json(checked).encode()).hexdigest())
    return json.dumps(values)


def test_a_forged_manifest_that_is_right_is_believed(local: str) -> None:
    """The forgeries below are refused for what is wrong with them, not for how they are made."""
    assert found(forge(local, manifest_of({"a": b"1"}), files={"a": b"1"})).manifest.files["a"].size == 1


@pytest.mark.parametrize(
    "names",
    [
        ["../x"], ["a/../../x"], ["/tmp/x"], ["a//b"], ["./a"], ["a/"], [""], ["."], [".."], ["a\\..\\b"], ["a\0b"],
        ["a\nb"], ["a" * 300], ["b/" * 600 + "c"], [".pull/x"], ["manifest.json"], ["manifest.json/x"], ["a", "a/b"],
    ],
    ids=lambda names: ascii(names)[:20],
)  # fmt: skip
def test_file_names_that_lead_astray_are_refused(names: list[str], local: str) -> None:
    assert unfit_file_names([*names, "good.bin"])
    files = {name: b"1" for name in names}
    reason = missing(forge(local, manifest_of(files), files=files))
    assert "no plain relative path" in reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (manifest_of({"a": b"1"}, schema_version=MANIFEST_SCHEMA_VERSION + 1, news=1), "written by a newer smoltulu"),
        (manifest_of({"a": b"1"}, schema_version=1), "written by an older smoltulu"),
        (manifest_of({"a": b"1"})[:-40], "refused"),
        (manifest_of({"a": b"1"}, extra=1), "refused: extra"),
        (manifest_of({"a": b"1"}, key="0" * 64), "another artifact"),
        (manifest_of({"a": b"1"}, spec={**SPEC.model_dump(), "version": 2}), "another artifact"),
        (manifest_of({"a": b"1"}, digest="0" * 64), "contradicts itself"),
        (manifest_of({"a": b"1"}, checksum="0" * 64), "other content than was written"),
        (manifest_of({"a": b"1"}, files={"a": {"size": -1, "blake3": "0" * 64}}), "refused: files.a.size"),
        (manifest_of({"a": b"1"}, files={"a": {"size": 1, "blake3": "../../../x"}}), "refused: files.a.blake3"),
        ("[" * 100_000, "refused"),
        ("", "refused"),
    ],
    ids=range(12),
)  # fmt: skip
def test_manifests_that_do_not_fit_are_refused(text: str, reason: str, local: str) -> None:
    assert reason in missing(forge(local, text, files={"a": b"1"}))


def test_false_sizes_are_refused_before_they_cost_memory(local: str) -> None:
    for size, part_bytes in ((2, PART), (10**15, 1), (10**18, PART)):
        records = {"a": FileRecord(size=size, blake3=blake3(b"1").hexdigest())}
        files = {name: record.model_dump() for name, record in records.items()}
        text = manifest_of({}, files=files, digest=records_digest(records))
        assert missing(forge(local, text, part_bytes, {"a": b"1"})).startswith("a is damaged")


@pytest.mark.parametrize("text", ["", "{}", '{"schema_version": 9, "kind": "blessed"}', "\0\1"])
def test_a_pointer_that_is_damaged_is_said_so(text: str, local: str) -> None:
    open_objects(local).put(f"sft/{KEY}/turns/00000001.end", text.encode())
    assert "pointer" in missing(remote(local))


# --- leases


def test_lease_goes_to_one_of_many(url: str) -> None:
    """All at once: exclusive creation is true for exactly one."""
    objects = [open_objects(url) for _ in range(5)]
    with ThreadPoolExecutor(5) as pool:
        won = list(pool.map(lambda i: objects[i].create("x/y", str(i).encode()), range(5)))
    assert won.count(True) == 1 and open_objects(url).get("x/y") == str(won.index(True)).encode()


def test_lease_second_waits_and_says_for_whom(url: str, tmp_path: Path, child: Callable[..., Child]) -> None:
    first = child(url, generation(tmp_path / "gen", FILES))
    assert first.hears() == "has 1"
    second = child(url)
    heard = second.hears()
    assert heard.startswith(f"waits for process {first.process.pid} on {os.uname().nodename} (since 20")
    assert first.ask("push") == "published"
    assert second.hears() == "has None", "who waited for an artifact gets it without a turn"
    found(remote(url))


def test_lease_that_is_released_goes_to_the_next(local: str, child: Callable[..., Child]) -> None:
    first = child(local)
    assert first.hears() == "has 1"
    second = child(local)
    assert second.hears().startswith("waits for")
    first.tell("end")
    assert second.hears() == "has 2"


def test_lease_of_a_killed_holder_is_taken_over(url: str, child: Callable[..., Child]) -> None:
    first = child(url)
    assert first.hears() == "has 1"
    first.kill()
    with remote(url).lease("sft", KEY, lambda whom: None) as lease:
        assert lease is not None and lease.token == 2
        lease.check()


def test_lease_without_waiting(local: str, child: Callable[..., Child]) -> None:
    first = child(local)
    assert first.hears() == "has 1"
    with remote(local).lease("sft", KEY, lambda whom: None, wait=False) as lease:
        assert lease is None, "a live holder is left alone"
    first.kill()
    with remote(local).lease("sft", KEY, lambda whom: None, wait=False) as lease:
        assert lease is not None and lease.token == 2, "a dead one would be in the way for ever"


def test_lease_defaults_take_over_within_90_seconds() -> None:
    shared = Remote("/nowhere")
    poll = min(5.0, shared.stale_seconds / 12)
    # A beat may have come just before the kill, seen one poll later; silence is noticed at a poll; then two writes.
    assert shared.stale_seconds + 2 * poll + 10 <= 90
    assert shared.stale_seconds >= 3 * shared.beat_seconds
    with pytest.raises(ValueError, match="below three times"):
        Remote("/nowhere", beat_seconds=30, stale_seconds=60)


def test_lease_of_a_slow_holder_is_kept(url: str, tmp_path: Path, child: Callable[..., Child]) -> None:
    first = child(url, generation(tmp_path / "gen", FILES))
    assert first.hears() == "has 1"
    second = child(url)
    assert second.hears().startswith("waits for")
    time.sleep(1.5 * STALE)  # long work
    first.signal(signal.SIGSTOP)
    time.sleep(0.4 * STALE)  # a machine that swaps
    first.signal(signal.SIGCONT)
    time.sleep(0.5 * STALE)
    assert first.ask("check") == "holds"
    assert first.ask("push") == "published"
    assert second.hears() == "has None"


def test_lease_with_clocks_apart_by_minutes(tmp_path: Path, child: Callable[..., Child]) -> None:
    url = str(tmp_path)
    first = child(url, clock_offset=-600)
    assert first.hears() == "has 1"
    second = child(url, clock_offset=600)
    assert second.hears().startswith("waits for")
    time.sleep(2 * STALE)
    assert first.ask("check") == "holds", "a live holder keeps it, whatever its clock says"
    first.kill()
    assert second.hears() == "has 2", "a dead one loses it"


def test_lease_holder_that_slept_is_fenced(url: str, tmp_path: Path, child: Callable[..., Child]) -> None:
    late = child(url, generation(tmp_path / "late", FILES, node="late"))
    assert late.hears() == "has 1"
    late.signal(signal.SIGSTOP)
    shared = remote(url)
    with shared.lease("sft", KEY, lambda whom: None) as lease:
        assert lease is not None and lease.token == 2
        late.signal(signal.SIGCONT)
        # Its successor has published nothing yet: even now it must not become the current one.
        assert late.ask("push").startswith(f"lost: the lease 1 on sft/{KEY} was taken over by process {os.getpid()}")
        assert isinstance(shared.find("sft", KEY), Missing)
        assert shared.push(generation(tmp_path / "new", FILES, node="new"), lease)
    assert late.ask("push").startswith("lost")
    assert found(shared).manifest.node == "new" and found(shared).token == 2


def test_lease_holder_that_slept_while_others_published_and_cleared_away(local: str, tmp_path: Path) -> None:
    """Its end is gone with the old turns, so that it can be created once more: to no effect."""
    shared, objects = remote(local), open_objects(local)
    with shared.lease("sft", KEY, nobody) as late:
        assert late is not None
        late._silence()  # as a process that is stopped
        with shared.lease("sft", KEY, lambda whom: None) as second:
            assert second is not None
            shared.push(generation(tmp_path / "second", FILES, node="second"), second)
        with shared.lease("sft", KEY, nobody):
            pass
        assert f"sft/{KEY}/turns/00000001.end" not in objects.list(f"sft/{KEY}")
        with pytest.raises(LeaseLost):
            late.check()
        late.lost.clear()
        with pytest.raises(LeaseLost):
            shared.push(generation(tmp_path / "late", FILES, node="late"), late)
    assert found(shared).manifest.node == "second"


def test_lease_survives_an_outage_of_the_store_s3(s3: s3_double.S3Double, child: Callable[..., Child]) -> None:
    """Neither side reaches the store for longer than silence is borne: that is no proof of a dead holder."""
    with remote("s3://bucket/store").lease("sft", KEY, nobody) as lease:
        assert lease is not None
        waiter = child("s3://bucket/store")
        assert waiter.hears().startswith("waits for")
        s3.num_failures = 10**9
        time.sleep(2 * STALE)
        s3.num_failures = 0
        time.sleep(STALE)
        lease.check()
        assert not lease.lost.is_set()
    assert waiter.hears() == "has 2"


def test_lease_with_a_lost_answer_is_held_s3(s3: s3_double.S3Double, tmp_path: Path) -> None:
    """The write was done, its answer lost, the second try is told that there is one: our own."""
    s3.num_lost_answers = 1
    shared = remote("s3://bucket/store")
    with shared.lease("sft", KEY, nobody) as lease:
        assert lease is not None and lease.token == 1 and s3.num_lost_answers == 0
        s3.num_lost_answers = 1
        assert shared.push(generation(tmp_path / "gen", FILES), lease)
    assert s3.num_lost_answers == 0 and found(shared).token == 1


def test_lease_leaves_little_behind(url: str, tmp_path: Path) -> None:
    shared, objects = remote(url), open_objects(url)
    for number in range(4):
        push(shared, generation(tmp_path / str(number), FILES, node=f"sft-{number}"))
    with shared.lease("sft", KEY, nobody):
        pass
    turns = sorted(name.rpartition("/")[2] for name in objects.list(f"sft/{KEY}/turns"))
    assert [name for name in turns if not name.endswith("beat")] == ["00000004.end", "00000005.end", "00000005.lease"]
    assert found(shared).manifest.node == "sft-3", "a turn that published nothing hides nothing"


def test_lease_ends_with_an_error_in_its_block(local: str) -> None:
    shared = remote(local)
    with pytest.raises(KeyError), shared.lease("sft", KEY, nobody):
        raise KeyError("the stage failed")
    with shared.lease("sft", KEY, nobody) as lease:
        assert lease is not None and lease.token == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lease-")]


# --- trouble


def test_transient_errors_are_borne_s3(s3: s3_double.S3Double, tmp_path: Path) -> None:
    shared = remote("s3://bucket/store")
    s3.num_failures = 3
    assert push(shared, generation(tmp_path / "gen", FILES))
    s3.num_failures = 2
    shared.pull(found(shared), tmp_path / "pull")
    assert tree(tmp_path / "pull") == tree(tmp_path / "gen")


def test_a_store_that_cannot_be_used_is_explained_s3(s3: s3_double.S3Double, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RemoteError, match=r"s3://no-such-bucket/x: there is no such bucket"):
        remote("s3://no-such-bucket/x").check()
    s3.forbids = True
    for action in (remote("s3://bucket").check, lambda: remote("s3://bucket").find("sft", KEY)):
        with pytest.raises(RemoteError, match="access was refused; check the credentials"):
            action()
    s3.forbids = False
    s3.ignores_conditions = True
    with pytest.raises(RemoteError, match="two machines could hold one lease"):
        remote("s3://bucket/store").check()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(RemoteError, match="cannot be reached; check the network and AWS_ENDPOINT_URL"):
        remote("s3://bucket/store").check()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(RemoteError, match="access was refused"):
        remote("s3://bucket/store").check()


def test_a_folder_that_is_not_mounted_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="there is no such bucket or folder"):
        remote(str(tmp_path / "not-mounted/store")).check()
    assert not (tmp_path / "not-mounted").exists()


@pytest.mark.parametrize("call", ["put", "create"])
def test_a_name_that_its_server_lost_before_it_was_on_disk_is_not_taken_for_written(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart of a file server between the rename and the sync: the sync then succeeds, of a folder without it."""
    (tmp_path / "shared").mkdir()
    objects, true_sync = open_objects(str(tmp_path / "shared")), shared_objects.sync

    def restarted(path: Path) -> None:
        for lost in path.glob("manifest"):
            lost.unlink()
        true_sync(path)

    monkeypatch.setattr(shared_objects, "sync", restarted)
    with pytest.raises(OSError, match="its server was restarted"):
        getattr(objects, call)("x/manifest", b"1")


def test_what_a_killed_push_left_is_on_disk_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not uploaded again, so nobody else would sync its name."""
    (tmp_path / "shared").mkdir()
    shared, made, synced = remote(str(tmp_path / "shared")), generation(tmp_path / "gen", FILES), []
    push(shared, made)
    for ending in (tmp_path / "shared" / "sft" / KEY / "turns").glob("*.end"):
        ending.unlink()
    true_sync = shared_objects.sync
    monkeypatch.setattr(shared_objects, "sync", lambda path: (synced.append(path), true_sync(path)))
    push(shared, made)
    names = [path.name for path in synced]
    assert "files" in names and names.index("files") < names.index("manifests"), names


def test_a_folder_leaves_no_debris(tmp_path: Path) -> None:
    """What a writer that was killed left half-written goes with the next push."""
    (tmp_path / "shared").mkdir()
    half = tmp_path / f"shared/sft/{KEY}/files/.tmp-killed"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    push(remote(str(tmp_path / "shared")), generation(tmp_path / "gen", FILES))
    assert not list((tmp_path / "shared").rglob(".tmp-*"))


@pytest.mark.parametrize("url", ["https://example.invalid/store", "hf://datasets/x/y"])
def test_protocols_without_exclusive_creation_are_only_read(url: str) -> None:
    shared = remote(url)
    assert not shared.writable
    with pytest.raises(RemoteError, match="cannot create an object only if there is none"):
        shared.check()
    with pytest.raises(RemoteError, match="one of s3"), shared.lease("sft", KEY, nobody):
        pass


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAHIDDEN:hunter2-hidden@bucket/store",
        "s3://hunter2-hidden@bucket/store",
        "gs://bucket/store?token=hunter2-hidden",
        "az://container/store?sig=hunter2-hidden",
        "abfs://user:hunter2-hidden@account.dfs.core.windows.net/store",
        "simplecache::s3://key:hunter2-hidden@bucket/store",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(RemoteError) as caught:
        Remote(url)
    assert "hidden" not in str(caught.value).lower() and "hidden" not in repr(caught.value).lower()


def test_credentials_are_in_no_object_log_or_error_s3(
    s3: s3_double.S3Double, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    shared = remote("s3://bucket/store")
    push(shared, generation(tmp_path / "gen", FILES))
    shared.pull(found(shared), tmp_path / "pull")
    client = s3.client()
    entries = client.list_objects_v2(Bucket="bucket")["Contents"]
    stored = [client.get_object(Bucket="bucket", Key=entry["Key"])["Body"].read() for entry in entries]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3_double.ACCESS_KEY}:{s3_double.SECRET_KEY}@127.0.0.1:9")
    with pytest.raises(RemoteError) as caught:
        remote("s3://bucket/store").check()
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    texts = [caplog.text, str(caught.value), *(entry["Key"] for entry in entries), *map(str, stored)]
    for secret in (s3_double.ACCESS_KEY, s3_double.SECRET_KEY):
        assert not any(secret in text for text in texts)


# --- parts


@given(size=st.integers(0, 10**6), part_bytes=st.integers(1, 10**6))
def test_parts_cover_a_file_once(size: int, part_bytes: int) -> None:
    part_bytes = max(part_bytes, size // 1000 + 1)
    parts = parts_of(FileRecord(size=size, blake3="ab" * 32), part_bytes)
    assert sum(part.size for part in parts) == size
    assert [part.offset for part in parts] == [number * part_bytes for number in range(len(parts))]
    assert all(0 < part.size <= part_bytes for part in parts)
    assert len({part.name for part in parts}) == len(parts)


@given(st.lists(st.text(st.characters(categories=["L", "Nd", "P"]), min_size=1, max_size=8), unique=True))
def test_names_that_are_refused_are_those_that_leave_the_folder(names: list[str]) -> None:
    root = Path("/root/target")
    for name in set(names) - set(unfit_file_names(names)):
        path = Path(os.path.normpath(root / name))
        assert path.is_relative_to(root) and path != root
