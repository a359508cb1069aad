"""A bounded sample of the faults of operations (docs/faults.md): a small store with an SFT, scores, a publication."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smoltulu.flows.machine import machine
from tests.faults import operations, served
from tests.faults.campaign import attempt, make_baseline
from tests.faults.commands import Moment
from tests.faults.draw import Draw, Fault
from tests.faults.kills import Result
from tests.faults.sandbox import SHRUNKEN, Sandbox
from tests.small_tiny import LENIENT_GATE

UP_TO_SCORES: dict[str, Any] = {
    **{name: value for name, value in SHRUNKEN.items() if name.startswith(("world", "base_model"))},
    "sft.max_steps": 12,
    "sft.gate": LENIENT_GATE,
    "compute.stages.sft.save_steps": 3,
    "compute.logging_steps": 1,
    "evaluation.sampled": None,
    "compute.min_free_disk_gb": 0,
    **dict.fromkeys(("reward_model", "dpo", "rlvr", "contamination"), None),
    **dict.fromkeys(("data.preference", "data.rlvr", "data.preference_eval", "data.verified_eval"), None),
}
NODE = "evaluation-sft"


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return make_baseline(tmp_path_factory.mktemp("operations"), UP_TO_SCORES)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of a server that runs for as long as this file's tests."""
    home = tmp_path_factory.mktemp("prefect")
    yield home
    machine.down(home, say=lambda text: None)


def tried(baseline: Sandbox, tmp_path: Path, kind: Any, **arguments: Any) -> Result:
    """What came of one fault; it is not missed, and nothing is wrong."""
    one = attempt(Fault(1, kind.__name__, "", functools.partial(kind, **arguments)), baseline, tmp_path)
    assert not one.is_wrong and one.result.num_kills == 1, one.line()
    return one.result


def test_a_killed_gc_loses_nothing_that_is_needed_and_the_next_one_ends_it(baseline: Sandbox, tmp_path: Path) -> None:
    tried(baseline, tmp_path, operations.killed_gc, node=NODE, moment=Moment("parent", 0.5), is_remade=False)


def test_after_a_killed_verify_the_next_one_ends_it(baseline: Sandbox, tmp_path: Path) -> None:
    arguments = {"nodes": ("dataset-sft", NODE), "rng": random.Random(0), "is_remade": False}
    tried(baseline, tmp_path, operations.killed_verify, moment=Moment("parent", 0.6), **arguments)


def test_a_killed_tag_names_the_old_or_the_new(baseline: Sandbox, tmp_path: Path) -> None:
    arguments = {"how": "move", "node": NODE, "other": "sft"}
    tried(baseline, tmp_path, operations.killed_tag, moment=Moment("parent", 0.5), **arguments)


def test_an_audit_after_a_killed_one_says_the_same(baseline: Sandbox, tmp_path: Path) -> None:
    tried(baseline, tmp_path, operations.killed_audit, moment=Moment("child", 0.5), detector="none")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [(operations.killed_gc, {"node": NODE}), (operations.killed_verify, {"nodes": (NODE,), "rng": random.Random(0)})],
)
def test_after_a_kill_the_recipe_makes_what_is_gone_and_no_more(
    baseline: Sandbox, tmp_path: Path, kind: Any, arguments: dict[str, Any]
) -> None:
    tried(baseline, tmp_path, kind, moment=Moment("parent", 0.7), **arguments)


@pytest.mark.slow
def test_a_push_after_a_killed_one_is_whole_and_one_commit(baseline: Sandbox, tmp_path: Path, home: Path) -> None:
    arguments = {"moment": "/commit/", "is_answered": True, "is_new": False}
    tried(baseline, tmp_path, served.killed_push, home=home, **arguments)


@pytest.mark.slow
def test_the_drop_that_a_killed_night_measured_is_told_by_the_next(
    baseline: Sandbox, tmp_path: Path, home: Path
) -> None:
    """Between the verdict and its place in the history: the last events there are the night's rename."""
    tried(baseline, tmp_path, served.killed_night, home=home, moment=Moment("parent", 0.8), part="history")


def test_a_draw_adds_all_of_them(baseline: Sandbox, tmp_path: Path) -> None:
    draw = Draw(baseline, seed=0, home=tmp_path)
    operations.add(draw, 3)
    assert {fault.kind for fault in draw.faults} >= {"SIGKILL of gc", "SIGKILL of a tag", *served.KINDS[:2]}
