"""What it costs a stage that has a model read its rows, and trains nothing: scores of a selection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reading:
    """A finished stage of the same kind.

    dataset         key of the rows
    tokenizer       key of the model whose tokens are counted
    num_tokens      of all rows, read once
    has_model       whether a model reads them, or their tokens alone are counted
    work            FLOPs of its passes; tokens where it has no model
    """

    dataset: str
    tokenizer: str
    num_tokens: int
    has_model: bool
    device: str
    num_processes: int
    work: float
    seconds: float


def reading_of(manifest: Mapping[str, Any], num_passes: float, num_parameters: int | None) -> Reading | None:
    """From a manifest as plain JSON; None if a value is missing. num_passes: of its model over each token."""
    try:
        num_tokens, compute = int(manifest["outputs"]["num_tokens"]), manifest["compute"]
        if num_passes and num_parameters is None:
            return None
        return Reading(
            dataset=str(manifest["spec"]["inputs"]["dataset"]),
            tokenizer=str(manifest["spec"]["inputs"]["tokenizer"]),
            num_tokens=num_tokens,
            has_model=num_passes > 0,
            device=str(compute["device"]),
            num_processes=int(compute["num_processes"]),
            work=work_of(num_tokens, num_passes, num_parameters),
            seconds=float(manifest["duration_seconds"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def work_of(num_tokens: float, num_passes: float, num_parameters: int | None) -> float:
    """FLOPs of the passes of a model: 2 per parameter and token (Kaplan et al., arXiv 2001.08361, section 2.1)."""
    return 2.0 * num_passes * (num_parameters or 0) * num_tokens if num_passes else float(num_tokens)


def known_tokens(finished: Iterable[Reading], dataset: str, tokenizer: str) -> int | None:
    """Tokens of these rows, where another scorer has read them."""
    asked = (dataset, tokenizer)
    return next((one.num_tokens for one in finished if (one.dataset, one.tokenizer) == asked), None)


def reading_seconds(
    work: float, finished: Iterable[Reading], device: str, num_processes: int, tflops: float | None, has_model: bool
) -> float | None:
    """From a finished one on such a device, the longest of them; else from the FLOPs that a device is said to do.

    Counting tokens says nothing about a model's reading, nor the other way round.
    """
    alike = [
        one
        for one in finished
        if (one.device, one.has_model) == (device, has_model) and one.work > 0 and one.seconds > 0
    ]
    if alike:
        best = max(alike, key=lambda one: one.work)
        return work * best.seconds / best.work * best.num_processes / num_processes
    return work / (tflops * 1e12 * num_processes) if has_model and tflops is not None else None
