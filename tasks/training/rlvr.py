"""RLVR: reinforcement learning from verifiable rewards, from the DPO model (or SFT where there is no DPO).

A rollout's reward is `reward_correct` where its verifier accepts it, else 0; with `non_stop_reward` set, a rollout
that does not end in eos, or in the token that ends a turn in the chat template, gets that instead (Tulu 3: 10 and -10,
open-instruct `ppo_vllm_thread_ray_gtrl.py`). The algorithms: ppo.py, and grpo.py for GRPO and RLOO.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from smoltulu.schemas.models import ModelOutputs
from smoltulu.schemas.rlvr import GRPOSettings, PPOSettings, RLOOSettings, RLVRInputs, RLVRSettings
from smoltulu.schemas.training import TrainingInputs
from smoltulu.tasks.stage import Stage, StageContext
from smoltulu.tasks.trainer.gate import gate_failures
from smoltulu.tasks.trainer.loop import finish
from smoltulu.tasks.training import grpo, ppo
from smoltulu.tasks.training.audited import rows_to_train
from smoltulu.tasks.training.watched import watch

if TYPE_CHECKING:
    from transformers import Trainer


def build_without_generation(config: RLVRSettings, inputs: TrainingInputs, context: StageContext) -> Trainer:
    """The trainer for a dry run. It generates nothing: every rollout of a step is given, as long as allowed."""
    if isinstance(config, (GRPOSettings, RLOOSettings)):
        return grpo.build_without_generation(config, inputs, context)
    assert isinstance(config, PPOSettings)
    return ppo.build_without_generation(config, inputs, context)


def train_rlvr(
    config: RLVRSettings, inputs: RLVRInputs, context: StageContext
) -> tuple[ModelOutputs, dict[str, float]]:
    """Train on prompts whose answers can be verified."""
    inputs, split = rows_to_train(config, inputs, context)
    if isinstance(config, PPOSettings):
        return ppo.run(config, inputs, context, split)
    assert isinstance(config, (GRPOSettings, RLOOSettings))
    trainer = grpo.build(config, inputs, context)
    held_out = watch(trainer, config, context, split)
    num_steps = grpo.run(trainer, config, context)
    if held_out is not None:
        held_out.restore_best()
    outputs, metrics = finish(trainer, context, num_steps, grpo.SHOWN, config.gate)
    if trainer.is_world_process_zero():
        outputs = outputs.model_copy(update={"samples_file": trainer.rollout_log.publish(context.folder)})
    return held_out.outputs(outputs, metrics) if held_out is not None else (outputs, metrics)


def flops_per_token(config: RLVRSettings) -> float:
    """A parameter: 2 to write a rollout, 2 each for reference and reward model where they count, 6 for each pass."""
    if isinstance(config, PPOSettings):
        return ppo.flops_per_token(config)
    assert isinstance(config, (GRPOSettings, RLOOSettings))
    # RLOO always computes the log-probabilities that its ratio starts from.
    own = 2 if isinstance(config, RLOOSettings) else 0
    looks = (2 if config.beta > 0 else 0) + (2 if config.reward_model_weight > 0 else 0)
    return 2 + looks + own + 6 * config.num_iterations


rlvr = Stage(
    "rlvr", 2, RLVRSettings, RLVRInputs, ModelOutputs, train_rlvr, gate_failures, build_without_generation,
    memory_advice=". All rollouts of a step are generated at once, whatever it is (PPO: rollout_batch_size of them): "
    "lower max_completion_length, raise compute.num_processes, or take a device with more memory. The checkpoints are "
    "kept",
    flops=flops_per_token, has_copies=True,
)  # fmt: skip
