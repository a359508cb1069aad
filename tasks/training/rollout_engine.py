"""What writes the rollouts of a training, and the held-out answers: an engine, and the run's way of sampling."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.rlvr import PPOSettings, RLVRSettings
from smoltulu.schemas.training import TrainingInputs
from smoltulu.tasks.generation.engines import CopyEngine, TransformersEngine
from smoltulu.tasks.generation.freshness import TOLERANCE, FreshEngine
from smoltulu.tasks.generation.interface import Engine, Request, Sampling, Written
from smoltulu.tasks.generation.vllm_engine import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    check_vllm,
    grown_fault,
    vllm_engine,
)
from smoltulu.tasks.models.folders import device_of, fit_embeddings, load_language_model
from smoltulu.tasks.models.tokens import stop_token_ids
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer.sharded import gathered
from smoltulu.tasks.training.prompts import ids_of_prompts

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

logger = logging.getLogger("smoltulu")


@dataclass(frozen=True)
class Writer:
    """Writes after prompts: `Backend` of tasks/training/rollouts.py.

    policy  that writes itself: its weights are fetched, where it is sharded. All processes must call this together
    """

    engine: Engine
    sampling: Sampling
    policy: torch.nn.Module | None = None

    def __call__(self, requests: Sequence[Request]) -> list[Written]:
        with gathered(self.policy):
            return self.engine.generate(requests, self.sampling)

    def for_purpose(self, purpose: int) -> Writer:
        """The same with random numbers of their own."""
        return replace(self, sampling=replace(self.sampling, purpose=purpose))


def check_engine(config: RLVRSettings, model: Path, compute: ComputeSettings) -> None:
    """Before any weights are loaded. ValueError where this machine cannot run the engine; warns of what is ignored.

    model: folder of one of the policy's size.
    """
    if config.engine == "vllm":
        longest = config.max_prompt_length + config.max_completion_length
        if not MIN_TEMPERATURE <= config.temperature <= MAX_TEMPERATURE:
            raise ValueError(
                f"rlvr.temperature is {config.temperature:g}; engine vllm takes {MIN_TEMPERATURE:g} to "
                f"{MAX_TEMPERATURE:g} as it is given, set it to one of these, or take engine: transformers"
            )
        check_vllm(model, compute, device_of(compute), longest)
        if getattr(config, "importance_sampling_cap", None) is None:
            logger.warning(
                "engine vllm rounds otherwise than the update, and nothing corrects it: set "
                "rlvr.importance_sampling_cap (2, with algorithm grpo or ppo)"
            )
    else:
        check_device(compute.generation_device)
    for name in ignored_settings(config, compute):
        logger.warning("compute.%s says nothing to this rlvr.engine %s, and is ignored", name, config.engine)


def ignored_settings(config: RLVRSettings, compute: ComputeSettings) -> list[str]:
    """Fields of `compute` with another value than their default that the engine does not follow."""
    ours, beside = {"generation_device"}, {"vllm_memory_share", "vllm_sleep"}
    if config.engine != "vllm":
        ignored = {"vllm_server"} | beside
    else:
        ignored = ours | (beside if compute.vllm_server is not None else set())
    return sorted(name for name in ignored if getattr(compute, name) != ComputeSettings.model_fields[name].default)


def check_device(device: str | None) -> None:
    """ValueError where this machine has no such device."""
    if device is None or device == "cpu":
        return
    import torch

    number, there = int(device.partition(":")[2] or 0), torch.cuda.device_count()
    if number >= there:
        raise ValueError(
            f"compute.generation_device is {device}, and torch finds {there} CUDA device{'s' * (there != 1)} here; "
            "name one that is there, or leave it out: the policy then writes itself"
        )


def writer_of(trainer: Trainer, config: RLVRSettings, inputs: TrainingInputs, context: StageContext) -> Writer:
    """The engine that the settings name, over the trainer's policy as it is loaded."""
    tokenizer: Any = trainer.processing_class
    accelerator: Any = trainer.accelerator
    policy = accelerator.unwrap_model(trainer.model)
    sampling = Sampling(
        max_new_tokens=config.max_completion_length,
        temperature=config.temperature,
        stop_ids=tuple(stop_token_ids(tokenizer)),
        seed=config.seed,
    )
    options: dict[str, Any] = {
        "pad_id": tokenizer.pad_token_id,
        "batch_size": num_at_once(config, accelerator.num_processes),
        "around": accelerator.autocast,
    }
    itself = TransformersEngine(policy, **options)
    compute = context.compute
    if config.engine == "transformers" and compute.generation_device is None:
        return Writer(itself, sampling, policy)
    own: Engine
    if config.engine == "vllm":
        longest = config.max_prompt_length + config.max_completion_length
        if fault := grown_fault(Path(inputs.model), policy.get_input_embeddings().num_embeddings):
            raise ValueError(fault)
        own = vllm_engine(Path(inputs.model), compute, accelerator, longest)
    else:
        copy = load_language_model(Path(inputs.model))
        fit_embeddings(copy, tokenizer)
        own = CopyEngine(copy.to(compute.generation_device).eval().requires_grad_(False), **options)
    [probe] = ids_of_prompts(tokenizer, [trainer.train_dataset[0]["prompt"]])
    is_rounded = trainer.args.bf16 or config.engine == "vllm"
    tolerance = TOLERANCE["bfloat16" if is_rounded else "float32"]
    return Writer(FreshEngine(own, itself, probe, tolerance=tolerance, gather=lambda: gathered(policy)), sampling)


def num_at_once(config: RLVRSettings, num_processes: int) -> int:
    """Texts that a process writes at once: no more than rollouts, for which there is memory."""
    limit = config.rollout_batch_size if isinstance(config, PPOSettings) else None
    own = -(-config.num_rollouts // num_processes)
    return min(own, limit or own)
