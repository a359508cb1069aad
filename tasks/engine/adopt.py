"""An artifact of an earlier key as the artifact of today's: the same files and scores under another identity."""

from __future__ import annotations

from functools import partial

from smoltulu.artifacts.files import link_or_copy, remove_tree
from smoltulu.artifacts.store import WAITING, Found, Log, Store
from smoltulu.schemas.artifact import FileRecord, Manifest
from smoltulu.tasks.job import Job


def adopt_artifact(job: Job, old: Found, store: Store, log: Log) -> Found:
    """Commit the files of `old` under the key of `job`. Every byte is read; none is copied where links can be made.

    Raises:
        ValueError: a file of `old` does not have the bytes that its manifest names, or its outputs are not the stage's.
    """
    job.stage.outputs_of(old.manifest)
    with store.producer(job.spec, partial(log.info, WAITING, job.node)) as folder:
        output = store.open_work(folder, job.input_digests) / "output"
        remove_tree(output)
        for name in old.manifest.files:
            link_or_copy(old.folder / name, output / name)

        def draft(files: dict[str, FileRecord], digest: str) -> Manifest:
            if wrong := sorted(name for name, record in files.items() if old.manifest.files[name] != record):
                raise ValueError(
                    f"{job.node}: {old.folder} cannot be adopted: {', '.join(wrong)} has other bytes than its manifest "
                    "says. `smoltulu verify` sets it aside; the next run makes it again"
                )
            identity = {"key": folder.name, "spec": job.spec, "inputs": dict(job.input_records)}
            return old.manifest.model_copy(update={**identity, "adopted_from": old.manifest.key})

        return store.commit(job.spec, output, draft)
