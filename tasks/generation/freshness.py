"""An engine that has weights of its own writes with the policy's, or not at all.

Before it writes, the policy's weights are brought to it and a probe is read by both: the log-probabilities of one fixed
text. An engine that was not reached is found at once. It says what it said before, though the policy moved; or it says
something else than the policy, as one does that still has the weights which a resumed run began with. Elsewhere such
runs trained for days: trl#5312, where an engine that woke up read its first weights again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from smoltulu.tasks.generation.engines import TransformersEngine
from smoltulu.tasks.generation.interface import Engine, Request, Sampling, Written, no_report
from smoltulu.tasks.models.batches import OnBatch

if TYPE_CHECKING:
    import torch

#: Mean difference of two log-probabilities of a token, in nats, that rounding alone makes: what is above is another
#: model. Ours.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
#: Share of it that the policy must have moved before an engine that stood still is stale.
_VISIBLE = 0.01
#: Share of the policy's move that an engine makes at least which follows it. The rest is its rounding, which may differ
#: from one reading to the next by the last bit.
_FOLLOWS = 0.05
#: Tokens of a probe.
PROBE_TOKENS = 64


class StaleEngineError(RuntimeError):
    """The engine that writes rollouts does not have the policy's weights."""


class FreshEngine:
    """An engine with weights of its own, always those of the policy. It is an `Engine` itself.

    policy     reads the probe with the policy as it is
    probe_ids  token ids of a fixed text, the same on all processes
    tolerance  see `TOLERANCE`
    gather     lies around what is read of the policy: has a sharded one whole. Not around what the engine writes, which
               needs the memory. All processes must write together, whatever they ask for
    """

    def __init__(
        self,
        engine: Engine,
        policy: TransformersEngine,
        probe_ids: Sequence[int],
        *,
        tolerance: float,
        gather: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        assert len(probe_ids) > 1, "a probe has a token that others stand before"
        self.engine, self.policy, self.probe_ids = engine, policy, list(probe_ids)[:PROBE_TOKENS]
        self.tolerance, self.gather = tolerance, gather
        # As the policy was loaded, before any checkpoint. From here on the engine must move when the policy does. A
        # server may still have the weights of the checkpoint, from the run before: it would not move any more.
        self._before = self._bring()

    def generate(self, requests: Sequence[Request], sampling: Sampling, on_batch: OnBatch = no_report) -> list[Written]:
        """StaleEngineError where the policy's weights did not reach the engine; then nothing is written."""
        self.refresh()
        return self.engine.generate(requests, sampling, on_batch)

    def logps(self, ids: Sequence[int]) -> list[float]:
        return self.engine.logps(ids)

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.engine.sync(weights)

    def refresh(self) -> None:
        """Bring the weights, and look at the probe."""
        now = self._bring()
        found = staleness(now, self._before, self.tolerance)
        if found is not None:
            raise StaleEngineError(
                f"the engine that writes rollouts does not have the policy's weights: {found}. What it would write is "
                "not of the policy that is trained; the checkpoints before this step are good. Write with "
                "engine: transformers, or report the versions of the engine and of torch"
            )
        self._before = now

    def _bring(self) -> tuple[list[float], list[float]]:
        """Log-probabilities of the probe by policy and engine, after it got the weights."""
        with self.gather():
            self.sync(whole_weights(self.policy.model))
            return self.policy.logps(self.probe_ids), self.engine.logps(self.probe_ids)


def staleness(
    now: tuple[Sequence[float], Sequence[float]],
    before: tuple[Sequence[float], Sequence[float]],
    tolerance: float,
) -> str | None:
    """What says that an engine lacks the policy's weights; None where nothing does.

    Args:
        now: log-probabilities of the probe by policy and engine, after the weights were brought.
        before: the same, when they were brought last.
        tolerance: mean difference in nats, at a token.
    """
    policy, engine = now
    if not all(map(math.isfinite, policy)):
        return None  # found by the guards, and no fault of the engine
    if len(engine) != len(policy) or not all(map(math.isfinite, engine)):
        return f"of a probe of {len(policy):,} tokens it gives {sum(map(math.isfinite, engine)):,} log-probabilities"
    moved, followed = _distance(policy, before[0]), _distance(engine, before[1])
    if moved > _VISIBLE * tolerance and followed < _FOLLOWS * moved:
        return (
            f"the policy's log-probabilities of a probe moved by {moved:.2g} at a token on average, and the engine's "
            f"by {followed:.2g}"
        )
    difference = _distance(policy, engine)
    if difference > tolerance:
        return (
            f"its log-probabilities of a probe are {difference:.2g} from the policy's at a token on average, and "
            f"rounding makes no more than {tolerance:g}"
        )
    return None


def _distance(values: Sequence[float], others: Sequence[float]) -> float:
    """Mean absolute difference."""
    return math.fsum(abs(one - other) for one, other in zip(values, others, strict=True)) / len(values)


def whole_weights(policy: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every parameter as a model folder would name it: gathered where it is sharded, and with a LoRA
    adapter added. The policy stays as it is: an adapter that is merged and taken out again leaves rounding behind.

    Tied parameters come once. All processes of a sharded policy must go through it to the end.
    """
    import torch
    from torch.distributed.tensor import DTensor

    deltas = {
        f"{name}.base_layer.weight": module
        for name, module in policy.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            continue
        weight = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        weight = weight.detach()
        if name in deltas:
            with torch.no_grad():
                weight = weight + deltas[name].get_delta_weight(deltas[name].active_adapters[0])
        yield name.removeprefix("base_model.model.").replace(".base_layer", ""), weight
