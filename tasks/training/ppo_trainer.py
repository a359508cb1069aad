"""The loop of PPO: write rollouts, score them, look at them with policy, reference and critic, and train on them.

It is a Trainer of transformers whose loop is ours. So checkpoints, logs, guards, trackers and the stop when asked are
those of every training (tasks/trainer/loop.py), and the two networks have an optimizer and a gradient clip each, as in
Tulu 3. With several processes each takes its part of the rollouts and of every step; gradients are summed by hand.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from smoltulu.schemas.rlvr import PPOSettings
from smoltulu.tasks.generation.importance import importance_weights
from smoltulu.tasks.generation.interface import MINIBATCHES, Request
from smoltulu.tasks.trainer.checkpoint import Trained
from smoltulu.tasks.trainer.sharded import gathered, is_sharded, whole_tensor
from smoltulu.tasks.trainer.signal import METRIC, SignalWatch, without_signal
from smoltulu.tasks.trainer.signal import Rollout as Shown
from smoltulu.tasks.trainer.tracking import num_tokens
from smoltulu.tasks.training.critic import CRITIC_FOLDER, Critic
from smoltulu.tasks.training.ppo_batch import (
    Episode,
    as_sample,
    by_episode,
    collate,
    flat,
    num_trained,
    rollout_metrics,
    token_logps,
    token_values,
)
from smoltulu.tasks.training.ppo_maths import (
    explained_variance,
    kl_estimate,
    policy_losses,
    response_mask,
    targets,
    token_rewards,
    value_losses,
)
from smoltulu.tasks.training.prompts import ids_of_prompts
from smoltulu.tasks.training.rewards import Score, shown
from smoltulu.tasks.training.rollout_log import RolloutLog
from smoltulu.tasks.training.rollouts import Backend, prompts_of_batch, shuffled

logger = logging.getLogger("smoltulu")
#: Scores of episodes, in their order; sees prompt, text and whether it ended.
Scorer = Callable[[Sequence[Episode]], list[Score]]


class PPOTrainer(Trainer):
    """See the top of this module. `model` is the policy, with TRL's fused head at the temperature of the rollouts.

    reference  the model of the KL term; None: the policy without its LoRA adapter, or no such term (beta 0)
    backend    writes rollouts with the policy as it is; set when the trainer is there (rollout_engine.py)
    """

    #: Methods whose time is that of this rank alone (tasks/trainer/stragglers.py).
    meets_no_other_rank = ("_generate", "training_step")

    def __init__(
        self,
        *args: Any,
        settings: PPOSettings,
        critic: Critic,
        reference: PreTrainedModel | None,
        scorer: Scorer,
        rollout_log: RolloutLog,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.settings, self.critic, self.reference = settings, critic, reference
        self.scorer, self.rollout_log = scorer, rollout_log
        self.backend: Backend
        self.control: Any
        self.optimizer: Any
        self.lr_scheduler: Any
        #: Name -> sum over the tokens that this process trained on since the last log, and their number.
        self._of_tokens: dict[str, torch.Tensor] = {}
        #: Name -> values of the steps since the last log, the same on all processes; some still on the device.
        self._of_steps: dict[str, list[float | torch.Tensor]] = {}
        self._of_rollouts: dict[str, float] = {}
        self._signal = SignalWatch.of(settings.signal_limit, None)

    # ------------------------------------------------------------------------------------------------------- the loop

    def _inner_training_loop(
        self, batch_size: int | None = None, args: Any = None, resume_from_checkpoint: str | None = None, **_: Any
    ) -> Any:
        settings, max_steps = self.settings, self.args.max_steps
        cycle = settings.num_steps_per_rollout
        start_time = self._begin(max_steps, resume_from_checkpoint)
        assert self.state.global_step % cycle == 0, "checkpoints lie between rollout batches"
        for batch in range(self.state.global_step // cycle, -(-max_steps // cycle)):
            if self.control.should_training_stop:
                break
            episodes = self._roll_out(batch)
            for minibatch in self._minibatches(batch, episodes):
                self._optimize(minibatch, start_time)
                if self.control.should_training_stop:
                    break
        return self._finalize_training(None, max_steps * settings.effective_batch_size, start_time)

    def _begin(self, max_steps: int, resume_from_checkpoint: str | None) -> float:
        """Optimizers, schedules and state, from a checkpoint where there is one. Returns the time."""
        self._init_training_state(max_steps, max_steps, 1, resume_from_checkpoint, None)
        self.optimizer = self.lr_scheduler = None
        self.create_optimizer()
        # The policy's schedule counts its own steps.
        self.create_scheduler(num_training_steps=max_steps - self.settings.critic.warmup_steps)
        self.critic.begin(self, max_steps, lambda: num_tokens(self))
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            self._signal = SignalWatch.of(self.settings.signal_limit, Path(resume_from_checkpoint))
        self.critic.sync_weights()
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self._tr_loss, self._total_loss_scalar = torch.zeros((), device=self.args.device), 0.0
        self._initial_global_step = self._globalstep_last_logged = self.state.global_step
        self._initial_num_input_tokens_seen = self.state.num_input_tokens_seen
        if self.args.activation_checkpointing:
            self.critic.model.activation_checkpointing_enable()
        self.model.train()
        self.critic.model.train()
        if self.is_world_process_zero():
            self.rollout_log.begin(self.state.global_step)
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        return time.time()

    def _minibatches(self, batch: int, episodes: Sequence[Episode]) -> Iterator[list[Episode]]:
        """The episodes of each optimizer step: each epoch goes over all, in an order that seed and batch decide."""
        size = self.settings.effective_batch_size
        for epoch in range(self.settings.num_ppo_epochs):
            order = shuffled(self.settings.seed, MINIBATCHES, (epoch, 0, batch), len(episodes))
            for start in range(0, len(order), size):
                yield [episodes[place] for place in order[start : start + size]]

    @property
    def _policy_waits(self) -> bool:
        """Whether the critic is trained alone."""
        return self.state.global_step < self.settings.critic.warmup_steps

    # --------------------------------------------------------------------------------------------------- the rollouts

    def _roll_out(self, batch: int) -> list[Episode]:
        """The episodes of a rollout batch with all that the update needs; the same list on every process."""
        settings = self.settings
        num_prompts = settings.num_rollouts // settings.num_samples_per_prompt
        rows = prompts_of_batch(settings.seed, batch, num_prompts, len(self.train_dataset))
        mine = self._own_part(self._asked(batch, rows))
        self._generate(batch, mine)
        for episode, score in zip(mine, self.scorer(mine), strict=True):
            episode["score"] = score
        self._look(mine)
        episodes: list[Episode] = gather_object(mine)
        self._look_for_signal(episodes)
        self.state.num_input_tokens_seen += sum(len(one["prompt_ids"]) + len(one["ids"]) for one in episodes)
        self.state.epoch = (batch + 1) * num_prompts / len(self.train_dataset)
        self._set_targets(episodes)
        if self.is_world_process_zero():
            step = self.state.global_step
            self.rollout_log.add_prompts(batch, step, rows)
            first = episodes[:: self.settings.num_samples_per_prompt]
            self.rollout_log.add_samples(batch, step, (as_sample(one, self.train_dataset[one["row"]]) for one in first))
        return episodes

    def _look_for_signal(self, episodes: Sequence[Episode]) -> None:
        """ValueError where rewards have not differed for too long; all processes see the same episodes."""
        rewards = [math.nan if one["score"].reward is None else one["score"].reward for one in episodes]
        self._of_rollouts = rollout_metrics(episodes) | {METRIC: self._signal.add(rewards, len(rewards))}
        is_last = self.state.global_step + self.settings.num_steps_per_rollout >= self.state.max_steps
        is_hopeless = self._signal.is_hopeless(is_last)
        if not is_hopeless and not self._signal.is_warned(is_last):
            return
        rollouts = []
        for one, reward in zip(episodes, rewards, strict=True):
            row, score = self.train_dataset[one["row"]], one["score"]
            asked = one["prompt"][-1]["content"]
            rollouts.append(Shown(asked, one["text"], row["verifier"], row["ground_truth"], shown(score), reward))
        said = without_signal(self._signal, rollouts)
        if is_hopeless:
            raise ValueError(said)
        if self.is_world_process_zero():
            logger.warning("%s", said)

    def _own_part(self, episodes: list[Episode]) -> list[Episode]:
        """Those of this process: as many as every other has, end to end in the order of the processes."""
        size = len(episodes) // self.accelerator.num_processes
        return episodes[self.accelerator.process_index * size :][:size]

    def _asked(self, batch: int, rows: Sequence[int]) -> list[Episode]:
        """Every sample of every prompt. One that comes twice, where two epochs meet, has samples of other numbers."""
        prompts = [self.train_dataset[row]["prompt"] for row in rows]
        ids = ids_of_prompts(self.processing_class, prompts)
        num_samples, seen = self.settings.num_samples_per_prompt, dict.fromkeys(rows, 0)
        episodes: list[Episode] = []
        for row, prompt, one in zip(rows, prompts, ids, strict=True):
            for sample in range(seen[row], seen[row] + num_samples):
                episodes.append({"batch": batch, "row": row, "sample": sample, "prompt": prompt, "prompt_ids": one})
            seen[row] += num_samples
        return episodes

    def _generate(self, batch: int, episodes: list[Episode]) -> None:
        requests = [Request(one["prompt_ids"], batch, one["row"], one["sample"]) for one in episodes]
        for episode, rollout in zip(episodes, self.backend(requests), strict=True):
            text = rollout.ids[:-1] if rollout.stopped else rollout.ids
            episode["ids"], episode["stopped"], episode["sampled_logps"] = rollout.ids, rollout.stopped, rollout.logps
            episode["text"] = self.processing_class.decode(text, skip_special_tokens=True)

    @torch.no_grad()
    def _look(self, episodes: list[Episode]) -> None:
        """Log-probabilities of policy and reference, and values, before the update.

        The policy's are computed anew, by the forward pass of the update: those of generation come from other kernels
        and shapes, and their rounding would stand in ratio and KL term. The weights are those that wrote the rollouts,
        so the ratio of the first update is 1 (Tulu 3 writes rollouts with weights one step older).
        """

        def compute(name: str, model: torch.nn.Module, function: Callable[[Any], torch.Tensor]) -> None:
            def of_batch(batch: list[Episode]) -> torch.Tensor:
                with self.accelerator.autocast():
                    return function(collate(batch, self.processing_class.pad_token_id, self.args.device))

            with gathered(model):
                made = by_episode(episodes, self.args.per_device_train_batch_size, of_batch)
            for episode, values in zip(episodes, made, strict=True):
                episode[name] = values  # type: ignore[literal-required]

        reference, critic = self.reference, self.critic.model
        compute("logps", self.model, lambda batch: token_logps(self.model, batch)[0])
        if reference is not None:
            compute("reference_logps", reference, lambda batch: token_logps(reference, batch)[0])
        elif self.settings.beta > 0:
            with self.model.disable_adapter():
                compute("reference_logps", self.model, lambda batch: token_logps(self.model, batch)[0])
        compute("values", critic, lambda batch: token_values(critic, batch))

    def _set_targets(self, episodes: list[Episode]) -> None:
        """Advantages and returns of a whole rollout batch, in float64, and what is logged of it."""
        settings = self.settings
        graded = [one for one in episodes if num_trained(one)]
        if not graded:
            return
        lengths = torch.tensor([len(one["ids"]) for one in graded])
        mask = response_mask(lengths, int(lengths.max()))

        def grid(name: str) -> torch.Tensor:
            rows = [one[name] for one in graded]  # type: ignore[literal-required]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).double()

        kl = kl_estimate(grid("logps"), grid("reference_logps")) if settings.beta > 0 else None
        scores = torch.tensor([one["score"].reward for one in graded], dtype=torch.float64)
        values = grid("values")
        made = targets(
            token_rewards(scores, kl, mask, settings.beta),
            values,
            mask,
            gamma=settings.gamma,
            gae_lambda=settings.gae_lambda,
            critic_lambda=settings.gae_lambda if settings.critic.gae_lambda is None else settings.critic.gae_lambda,
            is_whitened=settings.whiten_advantages,
        )
        for place, one in enumerate(graded):
            length = int(lengths[place])
            one["advantages"], one["returns"] = made.advantages[place, :length], made.returns[place, :length]
        self._of_rollouts["explained_variance"] = explained_variance(values[mask], made.rewards_to_go[mask])
        self._of_rollouts["values/mean"] = values[mask].mean().item()
        self._of_rollouts["returns/mean"] = made.returns[mask].mean().item()
        if kl is not None:
            self._of_rollouts["kl"] = kl[mask].mean().item()

    # ----------------------------------------------------------------------------------------------------- the update

    def _optimize(self, minibatch: list[Episode], start_time: float) -> None:
        """One optimizer step of both networks, each with its own clip, on the tokens of `minibatch`."""
        self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
        policy_waits, size = self._policy_waits, self.args.per_device_train_batch_size
        num_trained_tokens = max(sum(map(num_trained, minibatch)), 1)
        # Similar lengths together: less padding, and what does not fit into memory fails at once.
        mine = sorted(self._own_part(minibatch), key=lambda one: -len(one["prompt_ids"]) - len(one["ids"]))
        for start in range(0, len(mine), size):
            self._tr_loss += self.training_step(self.model, mine[start : start + size], num_trained_tokens)
        grad_norm = torch.zeros((), device=self.args.device) if policy_waits else self._clipped_norm(self.model)
        critic_norm = self._clipped_norm(self.critic.model)
        # The guard looks at this number: a sum is finite only where both are.
        self._get_grad_norm(self.model, grad_norm.to(critic_norm.device) + critic_norm)
        self.control = self.callback_handler.on_pre_optimizer_step(self.args, self.state, self.control)
        rates = {"critic/learning_rate": self.critic.rate, "critic/grad_norm": critic_norm}
        rate = 0.0 if policy_waits else self._get_learning_rate()
        if not policy_waits:
            self.optimizer.step()
            self.lr_scheduler.step()
        self.critic.step()
        self.control = self.callback_handler.on_optimizer_step(self.args, self.state, self.control)
        self.model.zero_grad()
        self.critic.model.zero_grad()
        for name, value in (rates | self._of_rollouts).items():
            self._of_steps.setdefault(name, []).append(value)
        self.state.global_step += 1
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        self._maybe_log_save_evaluate(
            self._tr_loss, grad_norm, self.model, None, self.state.epoch, None, start_time, learning_rate=rate
        )

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Add the gradients of a micro-batch of episodes to both networks; returns its share of the step's loss.

        Losses are sums over tokens, divided by the tokens of the whole step, so no cut into micro-batches or processes
        changes them.
        """
        settings, device = self.settings, self.args.device
        batch = collate(inputs, self.processing_class.pad_token_id, device)
        # fully_shard averages gradients over processes. Those of whole models are summed, in `_clipped_norm`.
        times = self.accelerator.num_processes if is_sharded(self.model) else 1
        total = torch.zeros((), device=device)
        notes: dict[str, torch.Tensor] = {}
        if not self._policy_waits:
            with self.accelerator.autocast():
                logps, entropy = token_logps(model, batch)
            old = flat(inputs, "logps", device)
            losses, is_clipped = policy_losses(logps, old, flat(inputs, "advantages", device), settings.epsilon)
            weights, of_sampler = importance_weights(
                old, flat(inputs, "sampled_logps", device), settings.importance_sampling_cap
            )
            losses = losses * weights
            loss = losses.sum() / num_items_in_batch
            (loss * times).backward()
            total += loss.detach()
            ratio_logs = logps.detach() - old
            notes = {
                "policy_loss": losses.detach(), "policy_clip_share": is_clipped, "entropy": entropy.detach(),
                "approx_kl": 0.5 * ratio_logs.square(), "ratio": ratio_logs.exp(), "sampler/ratio": of_sampler,
            }  # fmt: skip
        with self.accelerator.autocast():
            values = token_values(self.critic.model, batch)
        losses, is_clipped = value_losses(
            values, flat(inputs, "values", device), flat(inputs, "returns", device), settings.critic.value_clip
        )
        loss = settings.critic.value_coefficient * losses.sum() / num_items_in_batch
        (loss * times).backward()
        total += loss.detach()
        self._note(notes | {"value_loss": losses.detach(), "value_clip_share": is_clipped})
        # The trainer logs the mean over processes.
        return total * self.accelerator.num_processes

    def _clipped_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Sum the gradients of all processes, clip them, and return their norm before."""
        if self.accelerator.num_processes > 1 and not is_sharded(model):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    # None where a process has no tokens for it: the others would wait.
                    own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    parameter.grad = self.accelerator.reduce(own, "sum")
        return whole_tensor(self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm))

    # -------------------------------------------------------------------------------------------------------- the logs

    def _note(self, values: dict[str, torch.Tensor]) -> None:
        for name, of_tokens in values.items():
            count = torch.full((), len(of_tokens), dtype=torch.float64, device=of_tokens.device)
            sums = torch.stack([of_tokens.double().sum(), count])
            self._of_tokens[name] = self._of_tokens.get(name, 0) + sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds means since the last log: over all tokens trained on, whatever the micro-batches, and over steps."""
        if "loss" in logs:
            logs["num_tokens"] = int(self.state.num_input_tokens_seen)
            for name, sums in sorted(self._of_tokens.items()):
                total, count = self.accelerator.reduce(sums, "sum").tolist()
                logs[name] = total / max(count, 1)
            for name, of_steps in self._of_steps.items():
                logs[name] = math.fsum(map(float, of_steps)) / len(of_steps)
            self._of_tokens.clear()
            self._of_steps.clear()
        super().log(logs, start_time)

    # -------------------------------------------------------------------------------------------------- checkpoints

    @property
    def also_trained(self) -> dict[str, Trained]:
        """What a checkpoint holds beside the policy (tasks/trainer/checkpoint.py)."""
        return {"critic": self.critic.trained}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.critic.require_finite(self.accelerator)
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            self._signal.save(self._checkpoint_of_now())

    def _checkpoint_of_now(self) -> Path:
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    # The next two read checkpoints of versions before tasks/trainer/checkpoint.py.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.critic.load_weights(Path(resume_from_checkpoint) / CRITIC_FOLDER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.critic.load_optimizer(Path(checkpoint) / CRITIC_FOLDER)
