"""What a night compares with; whole nights are in tests/e2e/test_pipeline.py and tests/faults/test_operations.py."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from smoltulu.artifacts.manifests import Ref
from smoltulu.artifacts.store import Found, read_manifest
from smoltulu.flows.evaluation import _last_night
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.tasks.engine.runner import reference_to
from tests.hand_store import HandStore

NODE = "evaluation-sft"


@pytest.fixture
def store(tmp_path: Path) -> HandStore:
    return HandStore(tmp_path / "store")


def reference(store: HandStore, ref: Ref, generation: str) -> ArtifactReference:
    folder = store.folder(ref) / generation
    return reference_to(Found(read_manifest(folder), folder), NODE, "Cached")


def compared_with(store: HandStore, ref: Ref) -> str:
    """The generation, by the reference and by what the record of the night will say."""
    newest = {NODE: reference(store, ref, (store.folder(ref) / "current").read_text())}
    last, names = _last_night([NODE], newest, store.catalogue, logging.getLogger("test"))
    assert last[NODE] == reference(store, ref, names[NODE])
    return names[NODE]


def test_scores_of_a_night_without_a_verdict_are_not_those_of_the_last_night(store: HandStore) -> None:
    for content in ("recipe", "night"):
        ref = store.make("evaluation", NODE, content=content)
    assert compared_with(store, ref) == "gen-0002"
    # A night measures again, and is killed; so is the next one.
    for day, content in ((3, "killed"), (4, "killed too")):
        started_at = f"2026-10-0{day}T03:00:00+00:00"
        store.run(f"night-{day}", {NODE: ref}, started_at=started_at, state="Running", compared_with={NODE: "gen-0002"})
        store.make("evaluation", NODE, content=content)
        assert compared_with(store, ref) == "gen-0002"
    # The third one tells.
    store.make("evaluation", NODE, content="told")
    store.run("night-5", {NODE: ref}, started_at="2026-10-05T03:00:00+00:00", compared_with={})
    assert compared_with(store, ref) == "gen-0005"


def test_where_that_is_gone_the_newest_will_do(store: HandStore, caplog: pytest.LogCaptureFixture) -> None:
    ref = store.make("evaluation", NODE)
    store.run("night", {NODE: ref}, compared_with={NODE: "gen-0007"})
    assert compared_with(store, ref) == "gen-0001" and "what it compared with is gone" in caplog.text
