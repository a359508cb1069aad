"""GRPO and RLOO: TRL's trainers, whose baseline is the other rollouts of a prompt (tasks/training/rlvr.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.budget import accumulation_steps
from smoltulu.schemas.rlvr import GRPOSettings
from smoltulu.schemas.training import TrainingInputs
from smoltulu.tasks.models.folders import fit_embeddings, load_language_model
from smoltulu.tasks.models.tokens import check_prompts, stop_token_ids
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer.guards import LossRule
from smoltulu.tasks.trainer.loop import load_model, load_rows, prepare_torch, train, trainer_arguments
from smoltulu.tasks.trainer.means import weigh
from smoltulu.tasks.training.rewards import reward_function

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

#: What the stage reports of its last steps.
SHOWN = ("reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "entropy", "tokens_per_second")
#: Logged means over the tokens of completions.
_TOKEN_MEANS = ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


@contextmanager
def caches_as_attended() -> Iterator[None]:
    """Have caches hold keys and values in autocast's dtype, to which attention casts them anyway.

    Keys leave the rotary embedding in float32, and transformers' cache takes its dtype from the first key.
    """
    import torch
    from transformers.cache_utils import DynamicLayer

    update = DynamicLayer.update

    def cast_and_update(layer: Any, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled(keys.device.type):
            dtype = torch.get_autocast_dtype(keys.device.type)
            keys, values = keys.to(dtype), values.to(dtype)
        return update(layer, keys, values, *args, **kwargs)

    DynamicLayer.update = cast_and_update
    try:
        yield
    finally:
        DynamicLayer.update = update


@contextmanager
def reference_loaded_as_policy(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """TRL loads the reference of the KL term by itself: inside of this it is loaded and checked as the policy was."""
    from trl.trainer import grpo_trainer

    def load(folder: str, **_: Any) -> PreTrainedModel:
        model = load_language_model(Path(folder))
        fit_embeddings(model, tokenizer)
        return model

    load_of_trl = grpo_trainer.create_model_from_path
    grpo_trainer.create_model_from_path = load
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = load_of_trl


def _trainer_class() -> type:
    """GRPOTrainer whose order of prompts depends on the epoch alone: TRL's order starts anew at a resume.

    Its losses and metrics do not depend on the micro-batches. In bfloat16 it also generates with half the memory.
    """
    import torch
    from trl import GRPOTrainer

    class EpochOrderTrainer(GRPOTrainer):
        #: Whether the loss is the mean over the tokens of an optimizer step, however many steps share their rollouts.
        is_mean_of_step = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            #: Tokens of the completions of each micro-batch since the last log.
            self._num_written: list[torch.Tensor] = []

        def _prepare_inputs(self, generation_batch: Any) -> Any:
            before = self._buffered_inputs
            inputs = super()._prepare_inputs(generation_batch)
            if self.is_mean_of_step and self._buffered_inputs is not before:
                self._count_tokens_of_steps(self._buffered_inputs)
            return inputs

        def _count_tokens_of_steps(self, batches: list[dict[str, Any]]) -> None:
            """Have each micro-batch divided by the tokens of its own optimizer step, over all processes.

            TRL's loss "dapo" divides by `num_items_in_batch`, the tokens of all rollouts of a generation, and by the
            number of steps that share them.
            """
            counts = torch.stack([batch["completion_mask"].sum() for batch in batches]).float()
            a_step = self.args.gradient_accumulation_steps
            totals = self.accelerator.reduce(counts, "sum").view(-1, a_step).sum(dim=1)
            for place, batch in enumerate(batches):
                batch["num_items_in_batch"] = totals[place // a_step] * (len(batches) / a_step)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self._num_written.append(inputs["completion_mask"].sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if self._num_written:
                # All processes come here, at the same step, after equally many micro-batches.
                counts = self.accelerator.reduce(torch.stack(self._num_written), "sum").tolist()
                weigh(self._metrics["train"], counts, _TOKEN_MEANS, "clip_ratio/low_min", "clip_ratio/high_max")
                self._num_written.clear()
            super().log(logs, start_time)

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            sampler = super()._get_train_sampler(dataset)

            def set_epoch(epoch: int) -> None:
                sampler.generator.manual_seed(sampler.seed)
                for _ in range(epoch):  # the permutations that an unbroken training has drawn by then
                    torch.randperm(sampler.num_samples, generator=sampler.generator)

            # The trainer calls it where a sampler has one.
            sampler.set_epoch = set_epoch
            return sampler

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            # One autocast around all tokens keeps the cast weights; the model's own would cast them for every token.
            with self.accelerator.autocast(), caches_as_attended():
                return super()._generate_single_turn(*args, **kwargs)

    return EpochOrderTrainer


def _cycle(config: GRPOSettings) -> int:
    """Optimizer steps from one generation of rollouts to the next."""
    return config.steps_per_generation * config.num_iterations


def build(config: GRPOSettings, inputs: TrainingInputs, context: StageContext) -> Trainer:
    """The GRPO trainer. Rows: {"prompt": messages, "verifier", "ground_truth"}."""
    prepare_torch(context)
    from trl import GRPOConfig

    model, tokenizer = load_model(config, inputs, packing=False)
    # The preflight left out prompts that are longer than max_prompt_length.
    rows = load_rows(inputs.dataset, context, ["prompt", "verifier", "ground_truth"])
    arguments = trainer_arguments(config, context)
    # TRL counts steps_per_generation in micro-batches, we in optimizer steps: the batch of rollouts must not change
    # with per_device_train_batch_size.
    micro_steps = config.steps_per_generation * accumulation_steps(config.effective_batch_size, context.compute)
    # A checkpoint within a generation cycle would lose the rollouts, so save only at the end of a cycle.
    arguments["save_steps"] = -(-context.compute.save_steps // _cycle(config)) * _cycle(config)
    with reference_loaded_as_policy(tokenizer):
        trainer = _trainer_class()(
            model=model,
            reward_funcs=[reward_function(config, stop_token_ids(tokenizer))],
            args=GRPOConfig(
                **arguments,
                max_steps=config.num_steps,
                num_generations=config.num_generations,
                num_iterations=config.num_iterations,
                steps_per_generation=micro_steps,
                max_completion_length=config.max_completion_length,
                temperature=config.temperature,
                beta=config.beta,
                epsilon=config.epsilon,
                # TRL's "bnpo" is the mean over a micro-batch, and would change with its size.
                loss_type="dapo" if config.loss_type == "bnpo" else config.loss_type,
                scale_rewards=config.scale_rewards,
            ),
            train_dataset=rows,
            processing_class=tokenizer,
        )
    trainer.is_mean_of_step = config.loss_type == "bnpo"
    check_prompts(tokenizer, "TRL's GRPOTrainer", lambda prompts: trainer._tokenize_prompts(prompts)[0])
    assert set(trainer.eos_token_ids) == set(stop_token_ids(tokenizer)), trainer.eos_token_ids
    return trainer


def build_without_generation(config: GRPOSettings, inputs: TrainingInputs, context: StageContext) -> Trainer:
    """`build` for a dry run. It generates nothing: every rollout of a step is given, as long as allowed.

    A step is one group of `effective_batch_size` rollouts to one prompt, but of at least two.
    """
    num_rollouts = max(config.effective_batch_size, 2)
    group = {"effective_batch_size": num_rollouts, "num_generations": num_rollouts}
    once = {"steps_per_generation": 1, "num_iterations": 1}
    trainer = build(config.model_copy(update=group | once), inputs, context)
    rollout = [trainer.processing_class.eos_token_id] * config.max_completion_length
    trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: ([rollout] * len(prompt_ids), None)
    return trainer


def run(trainer: Trainer, config: GRPOSettings, context: StageContext) -> int:
    """Train; returns the number of optimizer steps in all."""
    # Advantages have a mean of 0: the value of the loss says nothing.
    rule = LossRule(zero_is_fault=False, must_not_grow=False)
    return train(trainer, context, config.schedule, rule, _cycle(config))
