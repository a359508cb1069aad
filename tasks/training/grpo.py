"""GRPO and RLOO: TRL's trainers, whose baseline is the other rollouts of a prompt (tasks/training/rlvr.py)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.budget import accumulation_steps
from smoltulu.schemas.rlvr import GRPOSettings, RLOOSettings, RLVRInputs
from smoltulu.schemas.training import TrainingInputs
from smoltulu.tasks.generation.interface import Request
from smoltulu.tasks.models.folders import fit_embeddings, load_language_model, load_tokenizer
from smoltulu.tasks.models.tokens import check_prompts, stop_token_ids
from smoltulu.tasks.models.turns import Prompt
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer.arguments import config_of
from smoltulu.tasks.trainer.compiled import compile_layers
from smoltulu.tasks.trainer.guards import LossRule
from smoltulu.tasks.trainer.loop import load_model, train, trainer_arguments
from smoltulu.tasks.trainer.means import weigh
from smoltulu.tasks.trainer.prepare import prepare_torch
from smoltulu.tasks.trainer.rollout_guards import rollout_guards
from smoltulu.tasks.trainer.sharded import shard, shard_trainer
from smoltulu.tasks.trainer.signal import METRIC, Rollout, SignalWatch, without_signal
from smoltulu.tasks.training.model_score import AddsScore, adding_score_of, check_reward_model, load_scored_by
from smoltulu.tasks.training.prompts import ids_of_prompts, load_prompts, with_tools
from smoltulu.tasks.training.rewards import Answer, Score, VerifiableReward, shown
from smoltulu.tasks.training.rollout_engine import check_engine, writer_of
from smoltulu.tasks.training.rollout_log import RolloutLog, sample
from smoltulu.tasks.training.rollouts import Backend

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from smoltulu.tasks.training.ppo_batch import Episode

logger = logging.getLogger("smoltulu")
#: What the stage reports of its last steps.
SHOWN = ("reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "entropy", "tokens_per_second")
#: Column with the number of a row, which random numbers are keyed by.
ROW = "number_of_row"
#: Logged means over the tokens of completions; the ratio's, where it is one of tokens.
_TOKEN_MEANS = ("kl", "entropy")
_RATIO_MEANS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")

GroupSettings = GRPOSettings | RLOOSettings


@contextmanager
def reference_loaded_as_policy(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """TRL loads the reference of the KL term by itself: inside of this it is loaded and checked as the policy was."""
    from trl.trainer import grpo_trainer, rloo_trainer

    def load(folder: str, **_: Any) -> PreTrainedModel:
        model = load_language_model(Path(folder))
        fit_embeddings(model, tokenizer)
        return model

    load_of_trl = grpo_trainer.create_model_from_path
    grpo_trainer.create_model_from_path = rloo_trainer.create_model_from_path = load
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = rloo_trainer.create_model_from_path = load_of_trl


def _rollout_trainer(trainer_of_trl: type) -> type:
    """One of TRL's two trainers, whose order of prompts depends on the epoch alone: TRL's starts anew at a resume.

    Logged metrics do not depend on the micro-batches. In bfloat16 it generates with half the memory. It stops where the
    rewards never differ.
    """
    import torch
    from accelerate.utils import gather_object

    class EpochOrderTrainer(trainer_of_trl):
        #: Metrics that are means over the tokens of a micro-batch.
        token_means: tuple[str, ...] = ()
        settings: GroupSettings
        reward: VerifiableReward
        rollout_log: RolloutLog
        _signal: SignalWatch | None = None
        backend: Backend
        #: Whether TRL's trainer takes log-probabilities of what was written: GRPO's.
        gives_logps = False
        #: Numbers of the rows that the next rollouts are of.
        _asked: Sequence[int] = ()

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            #: Tokens of the completions of each micro-batch since the last log.
            self._num_written: list[torch.Tensor] = []

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self._num_written.append(inputs["completion_mask"].sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if self._num_written:
                # All processes come here, at the same step, after equally many micro-batches.
                counts = self.accelerator.reduce(torch.stack(self._num_written), "sum").tolist()
                weigh(self._metrics["train"], counts, self.token_means, "clip_ratio/low_min", "clip_ratio/high_max")
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

        def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
            """Ids, and for GRPO their log-probabilities, by the engine: of prompts that stand beside their group."""
            step, first = self.state.global_step, self.accelerator.process_index * len(prompt_ids)
            requests = [
                Request(ids, step // _cycle(self.settings), row, (first + place) % self.num_generations)
                for place, (ids, row) in enumerate(zip(prompt_ids, self._asked, strict=True))
            ]
            written = self.backend(requests)
            ids = [one.ids for one in written]
            return (ids, [one.logps for one in written]) if self.gives_logps else ids

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            if self.args.should_save and self._signal is not None:
                self._signal.save(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

        def _keep_samples(self, rows: list[dict[str, Any]], num_tokens: list[int]) -> None:
            """The first rollout of each group, of this process."""
            step, size = self.state.global_step, self.num_generations
            made = zip(rows, self.reward.answers, num_tokens, self.reward.scores, strict=True)
            samples = [sample(row, one.text, num, one.stopped, score) for row, one, num, score in made]
            self.rollout_log.add_samples(step // _cycle(self.settings), step, samples[::size])

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
            inputs = with_tools(inputs)
            self._asked = [row[ROW] for row in inputs]
            scored = super()._generate_and_score_completions(inputs)
            state, cycle = self.state, _cycle(self.settings)
            if self._signal is None:
                resumed_from = Path(self.args.output_dir) / f"checkpoint-{state.global_step}"
                self._signal = SignalWatch.of(self.settings.signal_limit, resumed_from if state.global_step else None)
                if self.accelerator.is_main_process:
                    self.rollout_log.begin(state.global_step)
            if self.accelerator.is_main_process:
                self._keep_samples(inputs, scored["completion_mask"].sum(dim=1).tolist())
            # Of all processes, so all of them stop or none does.
            rewards = list(self._logs["rewards"][self.reward_func_names[0]])
            self._metrics["train"][METRIC].append(self._signal.add(rewards, self.num_generations))
            is_last = state.global_step + cycle >= state.max_steps
            is_hopeless = self._signal.is_hopeless(is_last)
            if is_hopeless or self._signal.is_warned(is_last):
                scored_rows = zip(inputs, self.reward.scores, strict=True)
                rows = gather_object([(row["verifier"], row["ground_truth"], shown(one)) for row, one in scored_rows])
                written = zip(self._logs["prompt"], self._logs["completion"], rows, rewards, strict=True)
                rollouts = [
                    Rollout(asked[-1]["content"], said[0]["content"], verifier, truth, verdict, reward)
                    for asked, said, (verifier, truth, verdict), reward in written
                ]
                said = without_signal(self._signal, rollouts)
                if is_hopeless:
                    raise ValueError(said)
                if self.accelerator.is_main_process:
                    logger.warning("%s", said)
            return scored

    return EpochOrderTrainer


def _trainer_class() -> type:
    """GRPOTrainer as `_rollout_trainer` makes it. Its loss does not depend on the micro-batches either."""
    import torch
    from trl import GRPOTrainer

    class StepTrainer(_rollout_trainer(GRPOTrainer)):  # type: ignore[misc]
        #: Whether the loss is the mean over the tokens of an optimizer step, however many steps share their rollouts.
        is_mean_of_step = False
        gives_logps = True

        def _prepare_inputs(self, generation_batch: Any) -> Any:
            before = self._buffered_inputs
            inputs = super()._prepare_inputs(generation_batch)
            if self._buffered_inputs is not before:
                if self.is_mean_of_step:
                    self._count_tokens_of_steps(self._buffered_inputs)
                if self.top_entropy_quantile < 1:
                    self._find_uncertain_tokens(self._buffered_inputs)
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

        @torch.no_grad()
        def _find_uncertain_tokens(self, batches: list[dict[str, Any]]) -> None:
            """Mark the tokens of highest entropy under the policy that wrote them, step by step, over all processes.

            TRL looks for them in each micro-batch.
            """
            for batch in batches:
                ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
                mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
                num_written = batch["completion_ids"].shape[1]
                _, batch["entropies"], _ = self._get_per_token_logps_and_entropies(
                    self.model, ids, mask, num_written, compute_entropy=True
                )
            a_step = self.args.gradient_accumulation_steps
            for first in range(0, len(batches), a_step):
                of_step = batches[first : first + a_step]
                own = torch.cat([batch["entropies"][batch["completion_mask"].bool()] for batch in of_step]).float()
                padded = self.accelerator.pad_across_processes(own, pad_index=-1)  # no entropy is negative
                every = self.accelerator.gather(padded)
                every = every[every >= 0]
                lowest = torch.quantile(every, 1 - self.top_entropy_quantile) if len(every) else 0.0
                for batch in of_step:
                    is_uncertain = batch.pop("entropies") >= lowest
                    batch["is_uncertain"] = is_uncertain & batch["completion_mask"].bool()

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self._is_uncertain = inputs.get("is_uncertain")
            return super().compute_loss(model, inputs, *args, **kwargs)

        def get_high_entropy_mask(self, *args: Any) -> torch.Tensor:
            return self._is_uncertain

    return StepTrainer


def _cycle(config: GroupSettings) -> int:
    """Optimizer steps from one generation of rollouts to the next."""
    return config.steps_per_generation * config.num_iterations


def _rollout_arguments(config: GroupSettings, context: StageContext) -> dict[str, Any]:
    """What GRPOConfig and RLOOConfig have in common."""
    arguments = trainer_arguments(config, context)
    # A checkpoint within a generation cycle would lose the rollouts, so save only at the end of a cycle.
    save_steps = -(-context.compute.save_steps // _cycle(config)) * _cycle(config)
    # TRL counts steps_per_generation in micro-batches, we in optimizer steps: the batch of rollouts must not change
    # with per_device_train_batch_size.
    micro_steps = config.steps_per_generation * accumulation_steps(config.effective_batch_size, context.compute)
    return arguments | {
        "save_steps": save_steps,
        "max_steps": config.num_steps,
        "num_generations": config.num_generations,
        "num_iterations": config.num_iterations,
        "steps_per_generation": micro_steps,
        "generation_batch_size": None,
        "max_completion_length": config.max_completion_length,
        "temperature": config.temperature,
        "beta": config.beta,
        "epsilon": config.epsilon,
        "epsilon_high": config.epsilon_high,
        "mask_truncated_completions": config.mask_truncated_completions,
        # Rollouts are drawn from the policy itself: the update knows nothing of a distribution that is cut.
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "generation_kwargs": None,
        "chat_template_kwargs": None,
        "cache_implementation": None,
        "use_transformers_continuous_batching": False,
        "use_transformers_paged": False,
        "use_vllm": False,
        "shuffle_dataset": True,
        "remove_unused_columns": False,  # verifiers read them
        "reward_weights": None,
        "sync_ref_model": False,
        "disable_dropout": False,  # as the model's config has it
        "router_aux_loss_coef": None,  # the same
    }


def _arguments(config: GroupSettings, context: StageContext) -> Any:
    """GRPOConfig or RLOOConfig."""
    from trl import GRPOConfig, RLOOConfig

    shared = _rollout_arguments(config, context)
    if isinstance(config, RLOOSettings):
        normalize = config.normalize_advantages
        return config_of(RLOOConfig, **shared, normalize_advantages=normalize, reward_clip_range=None)
    return config_of(
        GRPOConfig,
        **shared,
        # TRL's "bnpo" is the mean over a micro-batch, and would change with its size.
        loss_type="dapo" if config.loss_type == "bnpo" else config.loss_type,
        scale_rewards=config.scale_rewards,
        use_bias_correction_kl=config.kl_form == "k3_weighted",
        importance_sampling_level=config.importance_sampling_level,
        delta=config.delta,
        top_entropy_quantile=config.top_entropy_quantile,
        multi_objective_aggregation="sum_then_normalize",  # there is one objective
        entropy_coef=0.0,
        use_adaptive_entropy=False,
        off_policy_mask_threshold=None,
        cast_lm_head_to_fp32=False,
        max_tool_calling_iterations=None,
    )


def build(config: GroupSettings, inputs: RLVRInputs, context: StageContext) -> Trainer:
    """The trainer. Rows: {"id", "prompt": messages, "verifier", "ground_truth"}.

    ValueError where the reward model cannot be used, or there are fewer prompts than a step needs.
    """
    if config.reward_model_weight:  # refused before any weights are loaded
        check_reward_model(config, inputs, load_tokenizer(Path(inputs.model), inputs.chat_template))
    return _assembled(config, inputs, context)


def _assembled(
    config: GroupSettings, inputs: TrainingInputs, context: StageContext, is_dry_run: bool = False
) -> Trainer:
    prepare_torch(context)
    from trl import RLOOTrainer

    if not is_dry_run:
        check_engine(config, Path(inputs.model), context.compute)
    model, tokenizer = load_model(config, inputs, packing=False)
    # The preflight left out prompts that are longer than max_prompt_length.
    rows = load_prompts(inputs.dataset, context)
    config.check_num_rows(len(rows))
    rows = rows.add_column(ROW, list(range(len(rows))))
    is_rloo = isinstance(config, RLOOSettings)
    reward = VerifiableReward(config, stop_token_ids(tokenizer))
    with reference_loaded_as_policy(tokenizer):
        trainer = (_rollout_trainer(RLOOTrainer) if is_rloo else _trainer_class())(
            model=model,
            reward_funcs=[reward],
            args=_arguments(config, context),
            train_dataset=rows,
            processing_class=tokenizer,
        )
    if isinstance(rows[0]["prompt"], Prompt):
        # TRL renders prompts with the trainer's tools, which it would call itself, and not with those of a row.
        trainer._tokenize_prompts = lambda prompts: (ids_of_prompts(tokenizer, prompts), None, {})
    trainer.settings, trainer.reward = config, reward
    shard_trainer(trainer, context.compute)
    compile_layers(context, trainer.model)
    if context.compute.is_sharded and getattr(trainer, "ref_model", None) is not None:
        shard(trainer.ref_model, trainer.args.device)
    if not is_dry_run:
        trainer.backend = writer_of(trainer, config, inputs, context)
    if isinstance(config, GRPOSettings) and config.importance_sampling_cap is not None:
        # TRL's own correction, which it ties to its own engine of this name: ours writes all the same.
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        trainer.vllm_importance_sampling_mode = "token_truncate"
        trainer.vllm_importance_sampling_clip_min = None
        trainer.vllm_importance_sampling_clip_max = config.importance_sampling_cap
    reward_model = load_scored_by(config, inputs, tokenizer, is_dry_run)
    if reward_model is not None:
        reward.add = _of_rollouts(adding_score_of(reward_model, trainer, config.reward_model_weight), tokenizer)
    trainer.rollout_log = RolloutLog(context.work, config.num_steps // _cycle(config))
    if isinstance(config, GRPOSettings):
        trainer.is_mean_of_step = config.loss_type == "bnpo"
        of_tokens = config.importance_sampling_level == "token"
        trainer.token_means = (*_TOKEN_MEANS, *(_RATIO_MEANS if of_tokens else ()))
    else:
        trainer.token_means = ("entropy",)  # its KL is of all rollouts already, its ratio one of sequences
    check_prompts(
        tokenizer,
        "TRL's RLOOTrainer" if is_rloo else "TRL's GRPOTrainer",
        lambda prompts: trainer._tokenize_prompts(prompts)[0],
    )
    assert set(trainer.eos_token_ids) == set(stop_token_ids(tokenizer)), trainer.eos_token_ids
    return trainer


def _of_rollouts(add: AddsScore, tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[Score]]:
    """As VerifiableReward calls it."""

    def added(prompts: Any, completion_ids: Any, answers: list[Answer], scores: list[Score]) -> list[Score]:
        asked = ids_of_prompts(tokenizer, prompts)
        rollouts: list[Episode] = [
            {"prompt": prompt, "prompt_ids": before, "ids": ids, "stopped": one.stopped, "text": one.text}
            for prompt, before, ids, one in zip(prompts, asked, completion_ids, answers, strict=True)
        ]
        return add(rollouts, scores)

    return added


def build_without_generation(config: GroupSettings, inputs: TrainingInputs, context: StageContext) -> Trainer:
    """`build` for a dry run. It generates nothing: every rollout of a step is given, as long as allowed.

    A step is one group of `effective_batch_size` rollouts to one prompt, but of at least two.
    """
    num_rollouts = max(config.effective_batch_size, 2)
    group = {"effective_batch_size": num_rollouts, "num_generations": num_rollouts}
    once = {"steps_per_generation": 1, "num_iterations": 1, "max_rollouts_without_signal": 0}
    trainer = _assembled(config.model_copy(update=group | once), inputs, context, is_dry_run=True)
    rollout = [trainer.processing_class.eos_token_id] * config.max_completion_length

    def given(prompt_ids: list[Any], *args: Any, **kwargs: Any) -> Any:
        rollouts = [rollout] * len(prompt_ids)
        return rollouts if isinstance(config, RLOOSettings) else (rollouts, None)

    trainer._generate_single_turn = given
    return trainer


def run(trainer: Trainer, config: GroupSettings, context: StageContext) -> int:
    """Train; returns the number of optimizer steps in all."""
    # Advantages have a mean of 0: the value of the loss says nothing.
    rule = LossRule(zero_is_fault=False, must_not_grow=False)
    return train(trainer, context, config.schedule, rule, _cycle(config), own_guard=rollout_guards(config.guards))
