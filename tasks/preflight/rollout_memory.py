"""Memory that RLVR needs while it generates all rollouts of a step at once."""

from __future__ import annotations

import json
from pathlib import Path

from smoltulu.artifacts import readable
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.rlvr import PPOSettings, RLVRSettings
from smoltulu.tasks.models.sizes import kv_bytes, model_size
from smoltulu.tasks.training.rollout_engine import num_at_once


class TooLarge(ValueError):
    """One device has no memory for the training."""


def rollout_bytes(settings: RLVRSettings, model: Path, longest: int, compute: ComputeSettings, bfloat16: bool) -> int:
    """Bytes needed while rollouts of the longest length are generated."""
    weights = 4 * model_size(model).num_parameters
    held = num_models_held(settings) * weights
    if compute.is_sharded:
        held = held // compute.num_processes + weights  # each fetches the whole policy to write
    held += weights // 2 if bfloat16 else 0  # autocast keeps a copy
    if compute.generation_device in ("cuda", "cuda:0"):
        held += weights
    elif settings.engine == "vllm" or compute.generation_device is not None:
        return held  # what they read lies in vLLM's share (`vllm_bytes`), or on another device
    try:
        architecture = json.loads((model / "config.json").read_text())
        num_texts = num_at_once(settings, compute.num_processes)
        return held + kv_bytes(architecture, num_texts, longest, 2 if bfloat16 else 4)
    except (KeyError, TypeError):  # not a decoder with attention in every layer
        return held


def vllm_bytes(settings: RLVRSettings, compute: ComputeSettings, total: int) -> int:
    """Bytes of a device of `total` bytes that vLLM takes beside the training."""
    is_beside = settings.engine == "vllm" and compute.vllm_server is None
    return int(compute.vllm_memory_share * total) if is_beside else 0


def num_models_held(settings: RLVRSettings) -> int:
    """How often the weights are in memory during generation: a model that is trained with Adam's moments counts three.

    The policy; the reference, where there is a KL term; PPO's critic; the reward model, where its score counts. With
    LoRA the policy has no moments worth counting, and is the reference too.
    """
    held = 3 + (settings.beta > 0) + (settings.reward_model_weight > 0)
    if isinstance(settings, PPOSettings):
        if settings.lora is not None:
            held = 1 + (settings.reward_model_weight > 0)
        held += 1 if settings.critic.offload_optimizer else 3
    return held


def require_memory(needed: int, settings: RLVRSettings, longest: int) -> None:
    """TooLarge where this GPU has less than RLVR needs. Its generation is not tried: it would fail hours later."""
    import torch

    there = torch.cuda.get_device_properties(0).total_memory
    if needed > there:
        cut = "rollout_batch_size" if isinstance(settings, PPOSettings) else "steps_per_generation"
        raise TooLarge(
            f"rlvr: {settings.num_rollouts:,} rollouts of up to {longest:,} tokens, the models and their optimizers "
            f"need {readable.size(needed)}, and this GPU has {readable.size(there)}; lower "
            f"max_completion_length or {cut}, raise compute.num_processes, or take a larger device "
            "(preflight.dry_run: false skips this check, not the failure)"
        )
