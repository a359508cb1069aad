"""What a stage will cost, from the recipe and from what similar stages of the store cost. Pure: no files, no Prefect.

Every figure is an estimate or None where it is not known. Nothing is invented: a stage whose like was never finished
has no tokens and no time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Estimate:
    """What is still to be done for a stage; None: not known.

    num_steps        optimizer steps
    num_tokens       tokens, as the trainers count them: all of a batch but padding; both answers of a pair
    flops            floating-point operations of the model (recomputed activations not counted)
    disk_bytes       what the artifact will hold
    peak_disk_bytes  most that is on disk while it is made
    seconds          wall time
    """

    num_steps: int | None = None
    num_tokens: int | None = None
    flops: float | None = None
    disk_bytes: int | None = None
    peak_disk_bytes: int | None = None
    seconds: float | None = None


NOTHING = Estimate(0, 0, 0.0, 0, 0, 0.0)


@dataclass(frozen=True)
class Cost:
    """What a finished training stage cost.

    num_timed_steps  optimizer steps that `seconds` cover: those after the last resume
    dataset          key of the rows
    """

    num_steps: int
    num_timed_steps: int
    num_tokens: int
    seconds: float
    effective_batch_size: int
    num_parameters: int
    device: str
    num_processes: int
    dataset: str = ""
    max_length: int = 0


def estimated_tokens(num_steps: int, effective_batch_size: int, similar: Cost | None) -> int | None:
    """Tokens of `num_steps` steps, if a row has as many tokens as those of a similar stage had on average."""
    if similar is None or not similar.num_tokens or not similar.num_steps:
        return None
    per_row = similar.num_tokens / (similar.num_steps * similar.effective_batch_size)
    return round(per_row * num_steps * effective_batch_size)


def closest(costs: Iterable[Cost], num_parameters: int | None, device: str, dataset: str = "") -> Cost | None:
    """The finished stage that says most about time: same device, then nearest size of the model, then the same rows."""

    def distance(cost: Cost) -> tuple[float, bool]:
        ratio = 0.0 if num_parameters is None else abs(math.log(cost.num_parameters / num_parameters))
        return ratio, cost.dataset != dataset

    timed = [cost for cost in costs if cost.device == device and cost.num_timed_steps > 0 and cost.seconds > 0]
    return min(timed, key=distance, default=None)


def closest_rows(costs: Iterable[Cost], dataset: str, max_length: int) -> Cost | None:
    """The finished stage that says most about tokens a row: the same rows if there are, then the nearest max_length."""
    counted = [cost for cost in costs if cost.num_tokens > 0 and cost.num_steps > 0]
    return min(counted, key=lambda cost: (cost.dataset != dataset, abs(cost.max_length - max_length)), default=None)


def estimated_seconds(
    num_steps: int, effective_batch_size: int, num_parameters: int | None, num_processes: int, similar: Cost | None
) -> float | None:
    """Seconds of a similar stage a step, scaled with the batch, the size of the model and one over the processes."""
    if similar is None or num_parameters is None:
        return None
    per_step = similar.seconds / similar.num_timed_steps
    scale = (effective_batch_size / similar.effective_batch_size) * (num_parameters / similar.num_parameters)
    return num_steps * per_step * scale * similar.num_processes / num_processes


class Total(NamedTuple):
    """Sum of what is known; num_unknown stages are not in it."""

    value: float
    num_unknown: int


def totals(estimates: Sequence[Estimate], num_parallel: int = 1) -> dict[str, Total]:
    """Sums over stages, by field of `Estimate`.

    Peaks do not add up: it is what stays, and on top what the `num_parallel` greediest stages have besides at once.
    Seconds are a sum too: stages that run side by side take less.
    """
    sums = {}
    for name in asdict(NOTHING):
        values = [getattr(estimate, name) for estimate in estimates]
        known = [value for value in values if value is not None]
        sums[name] = Total(sum(known), len(values) - len(known))
    extras = [e.peak_disk_bytes - (e.disk_bytes or 0) for e in estimates if e.peak_disk_bytes is not None]
    extras.sort(reverse=True)
    peak = sums["disk_bytes"].value + sum(extras[:num_parallel])
    sums["peak_disk_bytes"] = Total(peak, sums["peak_disk_bytes"].num_unknown)
    return sums
