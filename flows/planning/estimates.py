"""What finished stages cost, and what that says of others like them. Pure arithmetic over manifests as plain JSON.

An unknown figure is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from smoltulu.schemas.artifact import Basis


@dataclass(frozen=True)
class Estimate:
    """The remaining cost of a stage; None: unknown.

    num_rows         rows that are read, of a stage that has a model read them
    num_steps        optimizer steps
    num_tokens       tokens, as the trainers count them: without padding; with both answers of a pair
    flops            floating-point operations of the model (recomputed activations not counted)
    disk_bytes       size of the artifact
    peak_disk_bytes  most disk space that the stage uses while it runs
    seconds          wall time
    basis            where `seconds` is from: a similar finished stage, compute.device_tflops, rates that were measured
    """

    num_steps: int | None = None
    num_tokens: int | None = None
    flops: float | None = None
    disk_bytes: int | None = None
    peak_disk_bytes: int | None = None
    seconds: float | None = None
    num_rows: int | None = None
    basis: Basis | None = field(default=None, compare=False)


NOTHING = Estimate(0, 0, 0.0, 0, 0, 0.0, 0)


@dataclass(frozen=True)
class Cost:
    """The cost of a finished training stage.

    num_timed_steps  optimizer steps in `seconds`: those after the last resume
    dataset          key of the rows
    num_passes       optimizer passes over each row that `num_tokens` counts once
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
    num_passes: int = 1


def estimated_tokens(
    num_steps: int, effective_batch_size: int, similar: Cost | None, num_passes: int = 1
) -> int | None:
    """Tokens of `num_steps` steps, with the mean tokens per row of a similar stage; each row counts once."""
    if similar is None or not similar.num_tokens or not similar.num_steps:
        return None
    per_row = similar.num_tokens * similar.num_passes / (similar.num_steps * similar.effective_batch_size)
    return round(per_row * num_steps * effective_batch_size / num_passes)


def closest(costs: Iterable[Cost], num_parameters: int | None, device: str, dataset: str = "") -> Cost | None:
    """The finished stage to estimate time from: same device, then nearest model size, then the same rows."""

    def distance(cost: Cost) -> tuple[float, bool]:
        ratio = 0.0 if num_parameters is None else abs(math.log(cost.num_parameters / num_parameters))
        return ratio, cost.dataset != dataset

    timed = [cost for cost in costs if cost.device == device and cost.num_timed_steps > 0 and cost.seconds > 0]
    return min(timed, key=distance, default=None)


def closest_rows(costs: Iterable[Cost], dataset: str, max_length: int) -> Cost | None:
    """The finished stage to estimate tokens per row from: the same rows, then the nearest max_length."""
    counted = [cost for cost in costs if cost.num_tokens > 0 and cost.num_steps > 0]
    return min(counted, key=lambda cost: (cost.dataset != dataset, abs(cost.max_length - max_length)), default=None)


def estimated_seconds(
    num_steps: int, effective_batch_size: int, num_parameters: int | None, num_processes: int, similar: Cost | None
) -> float | None:
    """Seconds per step of a similar stage, scaled by batch and model size, divided by the number of processes."""
    if similar is None or num_parameters is None:
        return None
    per_step = similar.seconds / similar.num_timed_steps
    scale = (effective_batch_size / similar.effective_batch_size) * (num_parameters / similar.num_parameters)
    return num_steps * per_step * scale * similar.num_processes / num_processes


class Total(NamedTuple):
    """Sum of the known values; `num_unknown` stages are not in it."""

    value: float
    num_unknown: int


def totals(estimates: Sequence[Estimate], num_parallel: int = 1) -> dict[str, Total]:
    """Sums over stages, by field of `Estimate`.

    Peaks are not summed: the peak is the size of all artifacts, plus the extra space of the `num_parallel` stages that
    need most. Seconds are summed: stages that run in parallel take less.
    """
    sums = {}
    for name in asdict(NOTHING):
        if name == "basis":
            continue
        values = [getattr(estimate, name) for estimate in estimates]
        known = [value for value in values if value is not None]
        sums[name] = Total(sum(known), len(values) - len(known))
    extras = [e.peak_disk_bytes - (e.disk_bytes or 0) for e in estimates if e.peak_disk_bytes is not None]
    extras.sort(reverse=True)
    peak = sums["disk_bytes"].value + sum(extras[:num_parallel])
    sums["peak_disk_bytes"] = Total(peak, sums["peak_disk_bytes"].num_unknown)
    return sums


def cost_of(manifest: Mapping[str, Any]) -> Cost | None:
    """The cost of a finished training, from its manifest as plain JSON; None if a value is missing."""
    try:
        outputs, spec, compute = manifest["outputs"], manifest["spec"], manifest["compute"]
        num_steps = int(outputs["num_steps"])
        resumed = manifest["resumed_from_steps"]
        return Cost(
            num_steps=num_steps,
            num_timed_steps=num_steps - (int(resumed[-1]) if resumed else 0),
            num_tokens=int(outputs["num_tokens"]),
            seconds=seconds_of(manifest),
            effective_batch_size=int(spec["config"]["effective_batch_size"]),
            num_parameters=int(outputs["num_parameters"]),
            device=device_of(manifest),
            num_processes=int(compute["num_processes"]),
            dataset=str(spec["inputs"]["dataset"]),
            max_length=max_length_of(spec["config"]),
            num_passes=int(spec["config"].get("num_iterations") or spec["config"].get("num_ppo_epochs") or 1),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def max_length_of(config: Mapping[str, Any]) -> int:
    """The longest row, or the longest generated answer."""
    return int(config.get("max_length") or config.get("max_completion_length") or 0)


def count_in(outputs: Mapping[str, Any], name: str) -> int | None:
    """A count among an artifact's outputs; None where there is none: another stage may mean something else by it."""
    value = outputs.get(name)
    return value if isinstance(value, int) and 0 <= value < 1 << 63 else None


def file_bytes_of(manifest: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(record["size"]) for name, record in manifest.get("files", {}).items()}


def seconds_of(manifest: Mapping[str, Any]) -> float:
    return float(manifest["duration_seconds"])


def device_of(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("compute", {}).get("device", ""))
