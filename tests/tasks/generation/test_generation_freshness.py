"""An engine with weights of its own: it writes with the policy's, or says why not."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltulu.schemas.training import LoraSettings
from smoltulu.tasks.generation.engines import CopyEngine, TransformersEngine
from smoltulu.tasks.generation.freshness import FreshEngine, StaleEngineError, staleness, whole_weights
from smoltulu.tasks.generation.interface import Request, Sampling
from smoltulu.tasks.models.folders import load_language_model
from smoltulu.tasks.models.lora import with_adapter
from tests.tiny_model import build_tiny_model

PROBE = [7, 8, 9, 30, 31, 32]
ASKED = [Request([7, 8, 9], 0, 0, 0), Request([10, 11], 0, 1, 0)]
SAMPLING = Sampling(8, 1.0, (0,), seed=1)


@pytest.fixture
def policy(tmp_path: Path) -> Any:
    return load_language_model(build_tiny_model(tmp_path / "policy"))


class Unreached(CopyEngine):
    """Its weights stay what they were: the sync is lost on the way."""

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _ in weights:
            pass


def fresh(policy: Any, kind: type[CopyEngine] = CopyEngine, tolerance: float = 1e-3) -> FreshEngine:
    own = kind(copy.deepcopy(policy).requires_grad_(False), pad_id=1)
    return FreshEngine(own, TransformersEngine(policy, pad_id=1), PROBE, tolerance=tolerance)


def step(policy: Any, rate: float) -> None:
    policy.train()
    ids = torch.tensor([[7, 8, 9, 12, 13]])
    policy(ids, labels=ids).loss.backward()
    torch.optim.SGD(policy.parameters(), lr=rate).step()
    policy.zero_grad()


def test_after_every_step_a_copy_writes_what_the_policy_writes(policy: Any) -> None:
    engine = fresh(policy)
    seen = []
    for _ in range(3):
        made = engine.generate(ASKED, SAMPLING)
        expected = TransformersEngine(policy, pad_id=1).generate(ASKED, SAMPLING)
        assert [one.ids for one in made] == [one.ids for one in expected]
        assert engine.logps(PROBE) == pytest.approx(TransformersEngine(policy, pad_id=1).logps(PROBE), abs=1e-6)
        seen.append([one.logps for one in made])
        step(policy, 0.5)
    assert seen[0] != seen[1] != seen[2] and policy.training


@pytest.mark.parametrize(("rate", "tolerance"), [(0.05, 0.1), (0.5, 1e-3)])
def test_a_sync_that_is_lost_is_found_at_the_first_probe(policy: Any, rate: float, tolerance: float) -> None:
    """Also where the step is far below what rounding could make: the engine stood still."""
    engine = fresh(policy, Unreached, tolerance)
    engine.generate(ASKED, SAMPLING)
    step(policy, rate)
    with pytest.raises(StaleEngineError, match=r"the policy's weights: .* moved by .*, and the engine's by"):
        engine.generate(ASKED, SAMPLING)


def test_a_sync_that_brings_half_of_the_weights_is_found(policy: Any) -> None:
    class Half(CopyEngine):
        def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            own = dict(self.model.named_parameters())
            super().sync((name, own[name] if "layers.0" in name else weight) for name, weight in weights)

    engine = fresh(policy, Half)
    step(policy, 1.0)
    with pytest.raises(StaleEngineError, match="from the policy's at a token on average"):
        engine.generate(ASKED, SAMPLING)


def test_a_resumed_policy_is_brought_before_anything_is_written(policy: Any) -> None:
    """An engine is loaded from the folder that the run began with, and a checkpoint comes into the policy later."""
    good, lost = fresh(policy), fresh(policy, Unreached)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.02)
    good.generate(ASKED, SAMPLING)
    with pytest.raises(StaleEngineError):
        lost.generate(ASKED, SAMPLING)


def test_a_divided_policy_is_whole_while_it_is_read_and_not_while_an_engine_writes(policy: Any) -> None:
    """The engine needs the memory. (Divided by two ranks: tests/tasks/training/test_rollout_generation.py.)"""
    seen: list[str] = []

    class Telling(CopyEngine):
        def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            seen.append("bring")
            super().sync(weights)

        def generate(self, *args: Any) -> Any:
            seen.append("write")
            return super().generate(*args)

    @contextmanager
    def gather() -> Iterator[None]:
        seen.append("whole")
        yield
        seen.append("divided")

    own = Telling(copy.deepcopy(policy).requires_grad_(False), pad_id=1)
    engine = FreshEngine(own, TransformersEngine(policy, pad_id=1), PROBE, tolerance=1e-3, gather=gather)
    engine.generate(ASKED, SAMPLING)
    assert seen == ["whole", "bring", "divided", "whole", "bring", "divided", "write"]


def test_an_engine_that_still_has_the_checkpoint_is_not_stale(policy: Any) -> None:
    """A server goes on while a run is killed and resumed. The policy then moves to where the server is already."""
    own = CopyEngine(copy.deepcopy(policy).requires_grad_(False), pad_id=1)
    with torch.no_grad():
        for parameter in own.model.parameters():
            parameter.mul_(1.02)
    engine = FreshEngine(own, TransformersEngine(policy, pad_id=1), PROBE, tolerance=0.1)
    policy.load_state_dict({name: 1.02 * weight for name, weight in policy.state_dict().items()})
    assert len(engine.generate(ASKED, SAMPLING)) == 2


@pytest.mark.parametrize(
    ("now", "before", "said"),
    [
        # Rounding: half of the tolerance, and it moved.
        (([-1.0, -2.0], [-1.05, -1.95]), ([-3.0, -2.0], [-3.0, -2.0]), None),
        # Nothing moved, as in a critic's warm-up.
        (([-1.0, -2.0], [-1.0, -2.0]), ([-1.0, -2.0], [-1.0, -2.0]), None),
        # The policy moved by 0.0009, less than can be seen, which is 1 % of 0.1; and by 0.0011.
        (([-1.0018, -2.0], [-1.0, -2.0]), ([-1.0, -2.0], [-1.0, -2.0]), None),
        (([-1.0022, -2.0], [-1.0, -2.0]), ([-1.0, -2.0], [-1.0, -2.0]), "moved by 0.0011 at a token on average"),
        # By 0.01, and the engine by 0.0004 (its last bit) or 0.0006.
        (([-1.02, -2.0], [-1.0008, -2.0]), ([-1.0, -2.0], [-1.0, -2.0]), "and the engine's by 0.0004"),
        (([-1.02, -2.0], [-1.0012, -2.0]), ([-1.0, -2.0], [-1.0, -2.0]), None),
        # It moved, to somewhere else: (0.3 + 0.1) / 2.
        (([-1.0, -2.0], [-1.3, -2.1]), ([-3.0, -2.0], [-3.0, -2.0]), "are 0.2 from the policy's"),
        (([-1.0, -2.0], [-1.0, float("nan")]), ([-1.0, -2.0], [-1.0, -2.0]), "gives 1 log-probabilities"),
        # A policy that is NaN is no fault of an engine that follows it.
        (([float("nan"), -2.0], [float("nan"), -2.0]), ([-1.0, -2.0], [-1.0, -2.0]), None),
        (([-1.0, -2.0], [-1.0]), ([-1.0, -2.0], [-1.0, -2.0]), "gives 1 log-probabilities"),
    ],
)  # fmt: skip
def test_staleness_by_hand(now: Any, before: Any, said: str | None) -> None:
    found = staleness(now, before, 0.1)
    assert found is None if said is None else said in str(found)


def test_weights_of_an_adapter_come_added_and_the_policy_stays_to_the_bit(policy: Any) -> None:
    plain = {name: weight.clone() for name, weight in policy.named_parameters()}
    copied = CopyEngine(copy.deepcopy(policy).requires_grad_(False), pad_id=1)
    adapted = with_adapter(policy, LoraSettings(r=4))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    before = {name: weight.clone() for name, weight in adapted.named_parameters()}
    weights = dict(whole_weights(adapted))
    assert weights.keys() == plain.keys()
    assert any(not torch.equal(weights[name], plain[name]) for name in plain)
    assert all(torch.equal(weight, before[name]) for name, weight in adapted.named_parameters())
    copied.sync(weights.items())
    assert copied.logps(PROBE) == pytest.approx(TransformersEngine(adapted, pad_id=1).logps(PROBE), abs=1e-5)


def test_weights_that_have_no_place_are_refused(policy: Any) -> None:
    engine = CopyEngine(copy.deepcopy(policy).requires_grad_(False), pad_id=1)
    weights = dict(policy.named_parameters())
    with pytest.raises(ValueError, match=r"weight other \(2,\) has no place"):
        engine.sync([*weights.items(), ("other", torch.zeros(2))])
    with pytest.raises(ValueError, match=r"brought no model\.norm\.weight"):
        engine.sync((name, weight) for name, weight in weights.items() if name != "model.norm.weight")
