"""What a night compares with; whole nights are in tests/e2e/test_pipeline.py and tests/faults/test_operations.py."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from smoltulu.artifacts.manifests import Ref
from smoltulu.artifacts.store import Found, read_manifest
from smoltulu.flows.evaluation import _compare, _last_night, rows_of, told
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.tasks.comparison.evaluations import Comparison
from smoltulu.tasks.comparison.paired import paired_test
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


# --- What a night says ----------------------------------------------------------------------------------------------


def comparison(task: str, num_lost: int = 0, reason: str = "") -> Comparison:
    before = {str(i): 1.0 for i in range(40)}
    test = None if reason else paired_test(before, before | {str(i): 0.0 for i in range(num_lost)})
    return Comparison("sft", task, "acc,none", 1.0, 1 - num_lost / 40, test, reason)


@pytest.mark.parametrize(("comparisons", "failed", "went_well", "said"), [
    ([comparison("a"), comparison("b", 4)], {}, True, "2 evaluations; no real drop in 2 scores"),
    ([comparison("a"), comparison("b", 20)], {}, False, "2 evaluations; dropped beyond noise: sft b"),
    # Where nothing was compared it never says that nothing dropped.
    ([comparison("bbh", reason="other documents: 1 of 4 are gone, 0 are new")], {}, True,
     "2 evaluations; nothing was compared; 1 not comparable: sft bbh (other documents: 1 of 4 are gone, 0 are new)"),
    ([], {}, True, "2 evaluations; nothing to compare with yet"),
    ([comparison("a")], {"evaluation-dpo": "no room"}, False,
     "2 evaluations; 1 FAILED: evaluation-dpo: no room; no real drop in 1 scores"),
    # Seven of forty in one of seven tasks: Holm's level is 0.05 / 7.
    ([comparison("a", 7), *(comparison(str(i)) for i in range(6))], {}, True, "no real drop in 7 scores"),
    ([comparison(str(i), reason="gone") for i in range(5)], {}, True, "sft 2 (gone) and 2 more"),
])  # fmt: skip
def test_what_a_night_says(comparisons: list[Comparison], failed: dict[str, str], went_well: bool, said: str) -> None:
    well, message = told(comparisons, 2, failed)
    assert well == went_well and said in message


def test_the_table_of_a_night() -> None:
    same, drop, lost = rows_of([comparison("a"), comparison("b", 20), comparison("c", reason="other prompts")])
    assert same["verdict"] == "same" and (same["lost, gained"], same["items"]) == ("0, 0", "40")
    assert drop["verdict"] == "drop" and drop["p (Holm)"] == f"{2 * 2 / 2**20:.3g}"
    assert lost["verdict"] == "not comparable: other prompts" and lost["p (paired)"] == "-"


def test_a_last_time_that_cannot_be_read_is_told_and_ends_nothing(tmp_path: Path) -> None:
    """Or that model would fail every night: the one that it is compared with never changes."""
    score = {
        "task": "a", "metric": "acc,none", "value": 1.0, "num_samples": 1, "harness": "h", "task_version": "1",
        "template_digest": "t",
    }  # fmt: skip
    references = []
    for name, text in (("last", '{"task": "a"'), ("tonight", '{"task": "a", "id": 0, "metrics": {"acc": 1.0}}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "samples.jsonl").write_text(text)
        references.append(
            ArtifactReference(
                stage="evaluation",
                node=NODE,
                key="0" * 64,
                digest="0" * 64,
                path=str(tmp_path / name),
                outputs={"subject": "sft", "scores": [score], "samples_file": "samples.jsonl"},
            )
        )
    [made] = _compare("sft", *references)
    assert made.test is None and made.reason.startswith("the last time cannot be read: samples.jsonl, line 1")
    well, message = told([made], 1, {})
    assert well and "nothing was compared; 1 not comparable: sft a (the last time cannot be read" in message
