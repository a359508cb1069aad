"""What a manifest says of its outputs is believed only where it is the stage's own, and names what is there."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from smoltulu.artifacts.keys import manifest_checksum
from smoltulu.artifacts.layout import MANIFEST
from smoltulu.artifacts.shared.door import Remote, SharedStore
from smoltulu.artifacts.store import Found, Missing, Store, read_manifest
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.schemas.common import artifact_paths
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.engine.runner import run_stage
from smoltulu.tasks.engine.stores import open_store
from smoltulu.tasks.stages import STAGES
from tests.tasks.engine.test_runner import COMPUTE, world_job

LOG = logging.getLogger("test")
JOB = world_job(compute=COMPUTE.model_copy(update={"launcher": "inline"}))

BAD: dict[str, dict[str, Any]] = {
    "nothing": {},
    "absolute": {"sft": "/home/x/.ssh/id_rsa"},
    "outside": {"sft": "../../../secret"},
    "not normal": {"sft": "./sft.jsonl"},
    "empty": {"sft": ""},
    "not there": {"sft": "other.jsonl"},
    "not text": {"sft": ["sft.jsonl"]},
    "unknown field": {"surprise": 1},
    "number": {"num_rows": {"sft": "many"}},
}


def rewrite(folder: Path, outputs: dict[str, Any]) -> None:
    """A manifest with other outputs that is sound in itself, as whoever can write to a store can make it."""
    manifest = read_manifest(folder)
    changed = {**manifest.outputs, **outputs} if outputs else {}
    manifest = manifest.model_copy(update={"outputs": changed, "checksum": ""})
    manifest = manifest.model_copy(update={"checksum": manifest_checksum(manifest)})
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1))


@pytest.mark.parametrize("bad", BAD)
def test_bad_outputs_are_set_aside_and_made_again(tmp_path: Path, bad: str) -> None:
    """`outputs.folder: /home/x/.ssh` was "Cached", and the push uploaded the keys; `{}` was a bare KeyError."""
    store = open_store(ComputeSettings(store=str(tmp_path)))
    made = run_stage(JOB, store, LOG)
    rewrite(Path(made.path), BAD[bad])
    found = store.find(JOB.spec, {})
    assert isinstance(found, Missing) and found.damaged == "gen-0001" and "its outputs are refused" in found.reason
    again = run_stage(JOB, store, LOG)
    assert (again.outcome, Path(again.path).name, again.digest) == ("Completed", "gen-0002", made.digest)
    assert len(list(Path(made.path).parent.glob("damaged-gen-0001-*"))) == 1


@pytest.mark.parametrize("bad", BAD)
def test_bad_outputs_of_a_shared_store_are_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: str
) -> None:
    url = str(tmp_path / "shared")
    Path(url).mkdir()
    compute = ComputeSettings(store=str(tmp_path / "here"), remote=url)
    other = SharedStore(tmp_path / "other", Remote(url))
    folder = Path(run_stage(JOB, Store(tmp_path / "other"), LOG).path)
    rewrite(folder, BAD[bad])
    found = other.find(JOB.spec)
    assert isinstance(found, Found)
    other.share(found, "world", LOG)
    store = open_store(compute)
    assert store.published(JOB.spec, {}) is None
    with caplog.at_level(logging.INFO):
        made = run_stage(JOB, store, LOG)
    assert made.outcome == "Completed" and "the shared store's artifact is not taken: its outputs are" in caplog.text
    # And it is mended there.
    third = open_store(ComputeSettings(store=str(tmp_path / "third"), remote=url))
    assert run_stage(JOB, third, LOG).outcome == "Cached"


def test_every_stage_marks_what_it_names_in_its_artifact() -> None:
    """A text field of outputs called file or folder that is not marked would be used unchecked."""
    for stage in STAGES.values():
        for name, field in stage.outputs.model_fields.items():
            if name in ("file", "folder") or name.endswith(("_file", "_folder")):
                outputs = stage.outputs.model_construct(**{**dict.fromkeys(stage.outputs.model_fields), name: "x"})
                assert (name, "x") in list(artifact_paths(outputs)), f"{stage.name}: {name} ({field.annotation})"


def test_a_reference_carries_the_outputs_that_were_checked(tmp_path: Path) -> None:
    made: ArtifactReference = run_stage(JOB, Store(tmp_path), LOG)
    assert JOB.stage.outputs_of(read_manifest(Path(made.path))).model_dump(mode="json") == made.outputs
    with pytest.raises(ValueError, match="its outputs are refused"):
        dataclasses.replace(JOB.stage, outputs=STAGES["sft"].outputs).outputs_of(read_manifest(Path(made.path)))


def test_a_stage_that_names_what_it_did_not_write_fails_and_leaves_nothing(tmp_path: Path) -> None:
    """Committed, it would be refused at every hit and made again for ever."""

    def forgets(config: Any, inputs: Any, context: Any) -> Any:
        outputs, metrics = JOB.stage.function(config, inputs, context)
        (context.folder / outputs.sft).unlink()
        return outputs, metrics

    job = dataclasses.replace(JOB, stage=dataclasses.replace(JOB.stage, function=forgets))
    with pytest.raises(ValueError, match=r"its outputs are refused: sft: no file of it is called 'sft\.jsonl'"):
        run_stage(job, Store(tmp_path), LOG)
    assert not list(tmp_path.rglob("gen-*"))
