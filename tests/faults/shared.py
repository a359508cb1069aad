"""Faults with a shared store (`compute.remote`): kills in the middle of an upload or a download, damaged objects."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

from smoltulu.artifacts.shared.remote import Remote, RemoteArtifact
from tests.faults.damage import flip
from tests.faults.kills import Result, finish
from tests.faults.sandbox import Run, Sandbox

#: What lies in a shared store, by a pattern below a key's folder.
OBJECTS = ("files/*", "manifests/*", "turns/*.end")


def seed(baseline: Sandbox) -> None:
    """Put everything of the baseline into a shared folder beside it; its file-system events are recorded."""
    record = {"record": str(baseline.home / "upload-events.txt")}
    code, run = baseline.run(record, **{"compute.remote": str(baseline.home / "shared")})
    assert code == 0, run.text


def _num_upload_events(baseline: Sandbox, node: str) -> int:
    """File-system events of a node's upload."""
    prefix = f"{key_folder(baseline.home / 'shared', baseline, node)}/"
    lines = (baseline.home / "upload-events.txt").read_text().splitlines()
    return sum(line.split("\t")[-1].startswith(prefix) for line in lines)


def killed_upload(sandbox: Sandbox, baseline: Sandbox, node: str, share: float, delay: float) -> Result:
    """Kill at a file-system event of an upload to a folder, upload again, take everything on another machine."""
    nth = 1 + int(share * _num_upload_events(baseline, node))
    sandbox.copy_from(baseline)
    shared = _copy_shared(sandbox, baseline, without=node)
    under = str(key_folder(shared, sandbox, node))
    fault = {"role": "parent", "under": under, "nth": nth, "delay": delay}
    code, _ = sandbox.run(fault, **{"compute.remote": str(shared)})
    result = Result(num_kills=int(code != 0), is_missed=code == 0, num_orphans=sandbox.num_orphans(), at=f"event {nth}")
    result.problems += _half_artifact(sandbox, str(shared), node)
    return _shared_again(sandbox, baseline, str(shared), result)


def killed_upload_to_s3(sandbox: Sandbox, baseline: Sandbox, num_parts: int) -> Result:
    """The same with a real S3 API, after a few parts of a file were sent."""
    from tests import s3_double

    sandbox.copy_from(baseline)
    with s3_double.running() as s3:
        # moto keeps buckets per process: each fault needs its own.
        bucket = sandbox.home.name
        s3.client().create_bucket(Bucket=bucket)
        sandbox.environment.update(s3.environment())
        s3.transfer_seconds = 0.2
        run = sandbox.start(**{"compute.remote": f"s3://{bucket}/store"})
        while len(s3.transfers("PUT")) < num_parts and run.process.poll() is None:
            time.sleep(0.005)
        result = Result(num_kills=int(_kill(run)))
        s3.transfer_seconds = 0.0
        result.is_missed = not result.num_kills
        result.num_orphans = sandbox.num_orphans()
        return _shared_again(sandbox, baseline, f"s3://{bucket}/store", result)


def killed_download(sandbox: Sandbox, baseline: Sandbox, node: str, share: float) -> Result:
    """Kill at a file-system event while an artifact is taken from the shared store, then take it."""
    # Lock, spec and the pull's own folder, then the files.
    nth = 8 + int(share * (1 + 2 * len(baseline.manifest(node).files)))
    sandbox.copy_from(baseline, without=node)
    remote = {"compute.remote": str(baseline.home / "shared")}
    fault = {"role": "parent", "under": str(sandbox.folder(node)), "nth": nth}
    code, _ = sandbox.run(fault, **remote)
    result = Result(num_kills=int(code != 0), is_missed=code == 0, at=f"event {nth}")
    result = finish(sandbox, baseline, "", result, **remote)
    return result


def flipped_object(sandbox: Sandbox, baseline: Sandbox, node: str, pattern: str, rng: random.Random) -> Result:
    """A byte of the shared store: another machine notices, makes the artifact itself and fixes the shared one."""
    shared = _copy_shared(sandbox, baseline)
    folder = key_folder(shared, sandbox, node)
    flip(rng.choice(sorted(path for path in folder.glob(pattern) if path.stat().st_size)), rng)
    result = finish(sandbox, baseline, node, Result(), **{"compute.remote": str(shared)})
    return _nothing_made(sandbox.beside("third"), baseline, str(shared), result)


def _shared_again(sandbox: Sandbox, baseline: Sandbox, url: str, result: Result) -> Result:
    """The next run goes on with the upload; then another machine has everything without making anything."""
    result = finish(sandbox, baseline, "", result, **{"compute.remote": url})
    return _nothing_made(sandbox.beside("other"), baseline, url, result)


def _nothing_made(sandbox: Sandbox, baseline: Sandbox, url: str, result: Result) -> Result:
    """A machine with an empty store takes every artifact from the shared one."""
    return finish(sandbox, baseline, "", result, **{"compute.remote": url})


def _half_artifact(sandbox: Sandbox, url: str, node: str) -> list[str]:
    """What a reader sees right after the kill: nothing, or a whole artifact."""
    remote = Remote(url)
    found = remote.find(sandbox.graph.nodes[node].stage.name, sandbox.folder(node).name)
    if isinstance(found, RemoteArtifact):
        target = sandbox.home / "pulled"
        try:
            remote.pull(found, target)
        except ValueError as error:
            return [f"a reader sees half an artifact: {error}"]
    return []


def _kill(run: Run) -> bool:
    if run.process.poll() is not None:
        return False
    run.process.kill()
    return run.process.wait() != 0


def _copy_shared(sandbox: Sandbox, baseline: Sandbox, without: str | None = None) -> Path:
    target, source = sandbox.home / "shared", baseline.home / "shared"
    left_out = key_folder(source, baseline, without) if without else None
    shutil.copytree(
        source, target, ignore=lambda folder, names: [name for name in names if Path(folder, name) == left_out]
    )
    return target


def key_folder(shared: Path, sandbox: Sandbox, node: str) -> Path:
    return shared / sandbox.graph.nodes[node].stage.name / sandbox.folder(node).name
