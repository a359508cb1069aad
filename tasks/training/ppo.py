"""PPO with a critic from the reward model, as SmolTulu and Tulu 3 used it (docs/stages/rlvr.md).

Mathematics: ppo_maths.py; rollouts: rollouts.py; the loop: ppo_trainer.py; the critic: critic.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smoltulu.schemas.models import ModelOutputs
from smoltulu.schemas.rlvr import PPOSettings, RLVRInputs
from smoltulu.schemas.training import TrainingInputs
from smoltulu.tasks.generation.interface import Request, Written
from smoltulu.tasks.models.folders import (
    fit_embeddings,
    load_language_model,
    load_tokenizer,
    switch_dropout_off,
)
from smoltulu.tasks.models.lora import with_adapter
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer.arguments import on_one_gpu
from smoltulu.tasks.trainer.compiled import compile_layers
from smoltulu.tasks.trainer.fused_head import give_fused_head
from smoltulu.tasks.trainer.guards import LossRule
from smoltulu.tasks.trainer.loop import finish, load_model, save_and_check, train, trainer_arguments
from smoltulu.tasks.trainer.prepare import prepare_torch
from smoltulu.tasks.trainer.rollout_guards import rollout_guards
from smoltulu.tasks.trainer.sharded import shard, shard_trainer
from smoltulu.tasks.training.critic import CRITIC_FOLDER, Critic, load_critic
from smoltulu.tasks.training.held_out_rows import Split
from smoltulu.tasks.training.model_score import adding_score_of, check_reward_model, load_scored_by
from smoltulu.tasks.training.prompts import load_prompts
from smoltulu.tasks.training.rewards import Answer, Score, scores_of
from smoltulu.tasks.training.rollout_engine import check_engine, writer_of
from smoltulu.tasks.training.rollout_log import RolloutLog
from smoltulu.tasks.training.watched import watch

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from smoltulu.tasks.training.ppo_batch import Episode
    from smoltulu.tasks.training.ppo_trainer import PPOTrainer, Scorer

#: What the stage reports of its last steps.
SHOWN = (
    "reward", "verified/right", "kl", "entropy", "explained_variance", "value_loss", "policy_clip_share",
    "completions/mean_length", "completions/clipped_ratio", "tokens_per_second",
)  # fmt: skip


def build(config: PPOSettings, inputs: RLVRInputs, context: StageContext) -> PPOTrainer:
    """The trainer. Rows: {"id", "prompt": messages, "verifier", "ground_truth"}.

    ValueError where the reward model or critic cannot be used, or there are fewer prompts than a rollout batch needs.
    """
    prepare_torch(context)
    rows = load_prompts(inputs.dataset, context)
    config.check_num_rows(len(rows))
    tokenizer = load_tokenizer(Path(inputs.model), inputs.chat_template)
    # Refused before any weights are loaded.
    check_engine(config, Path(inputs.model), context.compute)
    check_reward_model(config, inputs, tokenizer)
    critic = load_critic(config, inputs, tokenizer)
    return _assembled(config, inputs, context, rows, critic, load_scored_by(config, inputs, tokenizer))


def build_without_generation(config: PPOSettings, inputs: TrainingInputs, context: StageContext) -> PPOTrainer:
    """`build` for a dry run. It generates nothing: every rollout of a step is given, as long as allowed.

    All rollouts are of one prompt. Critic and reward model are made of the policy, which has their size.
    """
    prepare_torch(context)
    size = config.effective_batch_size
    config = config.model_copy(
        update={
            "num_samples_per_prompt": size,
            "num_minibatches": 1,
            "num_ppo_epochs": 1,
            "num_episodes": 2 * size,
            "max_rollouts_without_signal": 0,
            "critic": config.critic.model_copy(update={"initial": "policy", "path": None, "warmup_steps": 0}),
        }
    )
    tokenizer = load_tokenizer(Path(inputs.model), inputs.chat_template)
    given = RLVRInputs(**inputs.model_dump())
    rows = load_prompts(inputs.dataset, context)
    reward_model = load_scored_by(config, given, tokenizer, is_dry_run=True)
    trainer = _assembled(config, given, context, rows, load_critic(config, given, tokenizer), reward_model, True)

    def rollouts(requests: Sequence[Request]) -> list[Written]:
        length = config.max_completion_length
        return [Written([request.prompt_ids[-1]] * length, False, [0.0] * length) for request in requests]

    trainer.backend = rollouts
    return trainer


def _assembled(
    config: PPOSettings,
    inputs: RLVRInputs,
    context: StageContext,
    rows: Dataset,
    critic: PreTrainedModel,
    reward_model: PreTrainedModel | None,
    is_dry_run: bool = False,
) -> PPOTrainer:
    from transformers import TrainingArguments

    from smoltulu.tasks.training.ppo_trainer import PPOTrainer

    def fused(model: PreTrainedModel) -> PreTrainedModel:
        give_fused_head(model, temperature=config.temperature, outputs=("log_probs", "entropy"))
        return model

    policy, tokenizer = load_model(config, inputs, packing=False, dropout=False)
    policy, reference = fused(policy), None
    if config.lora:
        policy = with_adapter(policy, config.lora)
    elif config.beta > 0:
        reference = fused(_reference(inputs, tokenizer))
    arguments = trainer_arguments(config, context)
    del arguments["trust_remote_code"]  # TRL's own; `load_language_model` runs none
    # A checkpoint within a rollout batch would lose the rollouts, so save only at the end of one.
    cycle = config.num_steps_per_rollout
    arguments["save_steps"] = -(-context.compute.save_steps // cycle) * cycle
    num_steps = config.budget.max_steps
    assert num_steps is not None
    trainer = PPOTrainer(
        model=policy,
        args=on_one_gpu(TrainingArguments(**arguments, max_steps=num_steps, remove_unused_columns=False)),
        train_dataset=rows,
        processing_class=tokenizer,
        settings=config,
        critic=Critic(critic, config),
        reference=reference,
        scorer=verifier_scores(config, rows),
        rollout_log=RolloutLog(context.work, num_steps // cycle),
    )
    shard_trainer(trainer, context.compute)
    for model in (critic, reference):
        # Divided, none is ever whole on a device: four may be too large for one.
        if model is not None and context.compute.is_sharded:
            shard(model, trainer.args.device)
        elif model is not None:
            model.to(trainer.args.device)
    compile_layers(context, trainer.model, critic)
    if not is_dry_run:
        trainer.backend = writer_of(trainer, config, inputs, context)
    if reward_model is not None:
        of_verifiers, add = trainer.scorer, adding_score_of(reward_model, trainer, config.reward_model_weight)
        trainer.scorer = lambda episodes: add(episodes, of_verifiers(episodes))
    return trainer


def _reference(inputs: RLVRInputs, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The starting policy once more, frozen."""
    model = load_language_model(Path(inputs.model))
    fit_embeddings(model, tokenizer)
    switch_dropout_off(model)
    return model.eval().requires_grad_(False)


def verifier_scores(config: PPOSettings, rows: Dataset) -> Scorer:
    """Rewards by the verifiers of the rows."""

    def scores(episodes: Sequence[Episode]) -> list[Score]:
        answers = []
        for episode in episodes:
            row, key = rows[episode["row"]], "/".join(str(episode[name]) for name in ("batch", "row", "sample"))
            answers.append(Answer(row["verifier"], row["ground_truth"], episode["text"], episode["stopped"], key))
        return scores_of(config, answers)

    return scores


def run(
    config: PPOSettings, inputs: RLVRInputs, context: StageContext, split: Split | None = None
) -> tuple[ModelOutputs, dict[str, float]]:
    """Train, save policy and critic, and check both as saved. `split`: what is held out."""
    trainer = build(config, inputs, context)
    held_out = watch(trainer, config, context, split, critic=trainer.critic.model)
    # Whitened advantages have a mean of 0: the value of the loss says nothing.
    rule = LossRule(zero_is_fault=False, must_not_grow=False)
    cycle = config.num_steps_per_rollout
    guard = rollout_guards(config.guards, config.critic.warmup_steps)
    num_steps = train(trainer, context, config.schedule, rule, cycle, keeps_for_extension=False, own_guard=guard)
    if held_out is not None:
        held_out.restore_best()
    outputs, metrics = finish(trainer, context, num_steps, SHOWN, config.gate)
    outputs = outputs.model_copy(update={"critic": CRITIC_FOLDER})
    save_and_check(trainer, trainer.critic.model, context.folder / CRITIC_FOLDER, None)
    if trainer.is_world_process_zero():
        samples = trainer.rollout_log.publish(context.folder)
        outputs = outputs.model_copy(update={"samples_file": samples})
    return held_out.outputs(outputs, metrics) if held_out is not None else (outputs, metrics)


def flops_per_token(config: PPOSettings) -> float:
    """A parameter and token of a rollout, of policy and critic, which have nearly as many.

    2 to write it, 2 each for the policy's log-probability, the reference's (where there is a KL term) and the value
    before the update, 2 for the reward model's score (where it counts), 6 for each pass of the critic, and of the
    policy, which waits in the critic's warm-up.
    """
    num_steps = config.budget.max_steps
    assert num_steps is not None
    moved = 1 - config.critic.warmup_steps / num_steps
    looks = 2 + 2 + 2 + (2 if config.beta > 0 else 0) + (2 if config.reward_model_weight > 0 else 0)
    return looks + 6 * config.num_ppo_epochs * (1 + moved)
