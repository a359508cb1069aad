"""Figures of a finished preflight about its training, for `smoltulu plan`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.preflight import DryRun, PreflightConfig, PreflightOutputs
from smoltulu.schemas.training import SupervisedSettings, TrainingSettings


@dataclass(frozen=True)
class PreflightFigures:
    """Figures of the rows of one training stage.

    num_overlong       source rows longer than max_length; fate: cut or dropped
    num_tokens         of one epoch
    trained_share      share of these tokens with a loss; None for prompts, whose answers do not exist yet
    num_steps          optimizer steps of this recipe's training on these rows
    peak_memory_bytes  of the dry run
    dry_run            settings of the dry run
    notes              the settings of the dry run that differ from this recipe
    """

    node: str
    num_rows: int
    num_source_rows: int
    num_overlong: int
    fate: str
    num_tokens: int
    trained_share: float | None
    longest: int
    max_length: int
    num_steps: int | None
    peak_memory_bytes: int | None
    dry_run: dict[str, Any] | None
    notes: tuple[str, ...]


def preflight_figures(
    node: str, config: PreflightConfig, outputs: Mapping[str, Any], settings: TrainingSettings, compute: ComputeSettings
) -> PreflightFigures | None:
    """Figures from the outputs of a preflight; None if another version wrote them.

    settings, compute  of the training stage in this recipe
    """
    try:
        found = PreflightOutputs.model_validate(outputs)
    except ValidationError:
        return None
    prompts = config.kind == "prompts"
    run = found.dry_run
    return PreflightFigures(
        node=node,
        num_rows=found.num_rows,
        num_source_rows=found.num_source_rows,
        num_overlong=found.num_overlong,
        fate="dropped" if prompts or config.overlong == "drop" else "cut",
        num_tokens=found.num_tokens,
        trained_share=None if prompts else found.num_trained_tokens / max(found.num_tokens, 1),
        longest=found.longest,
        max_length=config.max_length,
        num_steps=settings.budget.num_steps(found.num_rows, found.num_tokens),
        peak_memory_bytes=None if run is None else max(run.peak_memory_bytes, run.generation_bytes),
        dry_run=None if run is None else run.model_dump(mode="json"),
        notes=() if run is None else tuple(_other_settings(run, config, settings, compute)),
    )


def _what_is_trained(lora_r: int | None) -> str:
    return "every weight" if lora_r is None else f"LoRA of rank {lora_r}"


def _other_settings(
    run: DryRun, config: PreflightConfig, settings: TrainingSettings, compute: ComputeSettings
) -> list[str]:
    """Differences between the dry run and the recipe: name old -> new."""
    asked = run.asked_batch_size or run.per_device_train_batch_size
    tokens = compute.tokens_per_device if isinstance(settings, SupervisedSettings) else "none"
    lora = getattr(settings, "lora", None)
    pairs: list[tuple[str, object, object]] = [
        ("stage", run.subject or config.subject, config.subject),
        ("activation_checkpointing", run.activation_checkpointing, compute.activation_checkpointing),
        ("tokens_per_device", run.asked_tokens, tokens),
        ("trains", _what_is_trained(run.lora_r), _what_is_trained(lora and lora.r)),
    ]
    if not isinstance(tokens, int):  # else it decides nothing
        pairs.append(("per_device_train_batch_size", asked, compute.per_device_train_batch_size))
    if config.kind != "prompts":
        pairs.append(("packing", run.packing, compute.packing))
    other = [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]
    if isinstance(run.asked_tokens, int) and run.tokens_per_device != run.asked_tokens:
        other.append(f"out of memory with {run.asked_tokens:,} tokens, {run.tokens_per_device:,} fit")
    elif run.per_device_train_batch_size != asked:
        other.append(f"out of memory with {asked} rows, {run.per_device_train_batch_size} fit")
    return other
