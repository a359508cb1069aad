"""What `compute` cannot do for a training, and what it does otherwise than asked. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.rlvr import PPOSettings
from smoltulu.schemas.training import SupervisedSettings, TrainingSettings


def sharding_problems(block: str, settings: TrainingSettings, compute: ComputeSettings) -> Iterator[str]:
    """Why a training cannot be divided among its processes. `compute`: as it runs, see `ComputeSettings.of`."""
    if not compute.is_sharded:
        return
    if getattr(settings, "lora", None) is not None:
        yield (
            f"{block}: compute.parallel fsdp2 cannot train a LoRA adapter, which is merged at the end into a model "
            f"that no process has whole; set compute.stages.{block}.parallel to ddp, or remove the {block}.lora block"
        )
    if isinstance(settings, PPOSettings) and settings.critic.offload_optimizer:
        yield (
            f"{block}: critic.offload_optimizer keeps an optimizer in CPU memory that compute.parallel fsdp2 divides; "
            "set one of them only"
        )


def batch_notes(block: str, settings: TrainingSettings, compute: ComputeSettings) -> Iterator[str]:
    """A sentence for each setting that a training does not follow. `compute`: with its own exceptions."""
    size, tokens = settings.effective_batch_size, compute.tokens_per_device
    used = compute.of(block, size)
    if used.num_processes != compute.num_processes:
        yield (
            f"{block}: effective_batch_size {size} is not a multiple of num_processes {compute.num_processes}: runs on "
            f"{used.num_processes}, which changes no result; compute.stages.{block}.num_processes: "
            f"{used.num_processes} says that this is meant"
        )
    if compute.parallel == "fsdp2" and not used.is_sharded:
        yield f"{block}: compute.parallel fsdp2 does nothing here: it runs on one process"
    if tokens != "none" and not isinstance(settings, SupervisedSettings):
        yield (
            f"{block}: compute.tokens_per_device {tokens} does nothing here: a micro-batch is "
            "per_device_train_batch_size rollouts, as before; "
            f"compute.stages.{block}.tokens_per_device: none says that this is meant"
        )
    elif isinstance(tokens, int):
        return
    if used.per_device_train_batch_size != compute.per_device_train_batch_size:
        on = f" on {used.num_processes} processes" if used.num_processes > 1 else ""
        yield (
            f"{block}: per_device_train_batch_size {compute.per_device_train_batch_size}{on} does not divide "
            f"effective_batch_size {size}: lowered to {used.per_device_train_batch_size}, which changes no result"
        )
