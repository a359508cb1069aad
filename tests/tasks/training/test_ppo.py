"""The stage RLVR with PPO on the two-layer model: what a step computes, what it may not depend on, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicLayer

from smoltulu.artifacts.checkpoints import CHECKPOINT_MARKER
from smoltulu.schemas.rlvr import PPOSettings, RLVRInputs
from smoltulu.tasks.models.folders import load_tokenizer
from smoltulu.tasks.models.sizes import model_size
from smoltulu.tasks.preflight.rollout_memory import num_models_held
from smoltulu.tasks.stage import StageStopped
from smoltulu.tasks.trainer.disk import checkpoint_bytes, disk_of_training, model_bytes, training_bytes
from smoltulu.tasks.training import ppo, ppo_trainer
from smoltulu.tasks.training.critic import load_critic
from smoltulu.tasks.training.ppo_batch import Episode, collate, token_logps, token_values
from smoltulu.tasks.training.rewards import Score
from smoltulu.tasks.training.rollout_engine import num_at_once
from tests.rows_file import write_rows
from tests.small_ppo import SETTINGS, Run, context, differing, prompts, run, world
from tests.small_runs import weights_of_checkpoint
from tests.tiny_model import TULU_TEMPLATE, build_tiny_model, build_tokenizer

LENIENT = {"non_stop_reward": None}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> RLVRInputs:
    return world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(inputs: RLVRInputs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An unbroken training of three rollout batches."""
    return run(inputs, tmp_path_factory.mktemp("whole"))


def start(inputs: RLVRInputs, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(Path(inputs.model).parent / name / "model.safetensors")


def trainer_of(inputs: RLVRInputs, folder: Path, settings: dict[str, Any], **compute: Any) -> Any:
    """The trainer before its first step, its optimizers made."""
    made = ppo.build(PPOSettings.model_validate(SETTINGS | settings), inputs, context(folder, **compute))
    made._begin(made.args.max_steps, None)
    return made


# ------------------------------------------------------------------------------------------------- what a run leaves


def test_policy_and_critic_are_trained_and_kept(inputs: RLVRInputs, whole: Run) -> None:
    assert whole.outputs.num_steps == 12 and whole.outputs.critic == "critic"
    assert len(differing(start(inputs), whole.policy)) == len(start(inputs))
    assert len(differing(start(inputs, "reward_model"), whole.critic)) == len(start(inputs, "reward_model"))
    # A critic is a reward model's folder: a later run starts from it.
    again = inputs.model_copy(update={"critic": str(whole.folder / "out" / "critic"), "reward_model": None})
    settings = PPOSettings.model_validate(SETTINGS | {"critic": {"initial": "path", "path": again.critic}})
    tokenizer = load_tokenizer(Path(inputs.model), TULU_TEMPLATE)
    assert torch.equal(load_critic(settings, again, tokenizer).score.weight, whole.critic["score.weight"])


def test_every_step_is_logged(whole: Run) -> None:
    history = whole.log("history")
    assert [row["step"] for row in history] == list(range(1, 13))
    for row in history:
        shares = [row[f"verified/{verdict}"] for verdict in ("right", "wrong", "no_eos", "could_not_grade")]
        assert sum(shares) == pytest.approx(1) and row["completions/clipped_ratio"] == row["verified/no_eos"]
        assert {
            "loss", "value_loss", "policy_loss", "reward", "kl", "entropy", "policy_clip_share", "value_clip_share",
            "approx_kl", "ratio", "explained_variance", "critic/grad_norm", "critic/learning_rate", "grad_norm",
            "learning_rate", "num_tokens", "completions/mean_length",
        } <= row.keys()  # fmt: skip
    first = history[0]
    assert first["kl"] == pytest.approx(0, abs=1e-7) and first["ratio"] == pytest.approx(1, abs=1e-6)
    assert first["policy_clip_share"] == 0 and first["approx_kl"] < 1e-10 < history[1]["approx_kl"]
    assert first["loss"] == pytest.approx(first["policy_loss"] + 0.1 * first["value_loss"], rel=1e-4)
    assert first["sampling_difference"] < 1e-5
    assert [history[line]["num_tokens"] for line in (0, 4, 8)] == sorted({row["num_tokens"] for row in history})


def test_prompts_are_used_in_turn_and_none_twice_in_an_epoch(whole: Run) -> None:
    lines = whole.log("prompts")
    assert [(line["batch"], line["step"]) for line in lines] == [(0, 0), (1, 4), (2, 8)]
    used = [row for line in lines for row in line["rows"]]
    assert len(used) == 24 and sorted(used[:20]) == list(range(20))  # 20 prompts, and four of the next epoch


def test_samples_say_what_was_written_and_why_it_was_paid(whole: Run) -> None:
    samples = whole.log("samples")
    assert len(samples) == 3 * 4 and {row["step"] for row in samples} == {0, 4, 8}
    for row in samples:
        number = row["id"].removeprefix("0:")
        assert row["prompt"].startswith(f"What is {number} plus") and row["num_tokens"] <= 6 and row["reason"]
        assert row["reward"] == {"right": 10, "wrong": 0, "no_eos": -10}[row["verdict"]]


# ----------------------------------------------------------------------------------- what a result may not depend on


@pytest.mark.parametrize(
    ("settings", "compute"),
    [({}, {"per_device_train_batch_size": 1}), ({"rollout_batch_size": 3}, {"per_device_train_batch_size": 2})],
)
def test_cuts_into_micro_batches_and_of_rollouts_change_nothing(
    inputs: RLVRInputs, whole: Run, tmp_path: Path, settings: dict[str, Any], compute: dict[str, int]
) -> None:
    cut = run(inputs, tmp_path, settings, **compute)
    for one, other in zip(whole.log("history"), cut.log("history"), strict=True):
        for name in one.keys() - {"tokens_per_second", "peak_memory_gb", "sampling_difference"}:
            assert other[name] == pytest.approx(one[name], rel=2e-3, abs=2e-4), name
    assert [row["completion"] for row in cut.log("samples")] == [row["completion"] for row in whole.log("samples")]
    before = start(inputs)
    for name, value in whole.policy.items():
        torch.testing.assert_close(cut.policy[name], value, rtol=0, atol=2e-4)
        assert (value - before[name]).abs().max() > 1e-3
    for name, value in whole.critic.items():
        torch.testing.assert_close(cut.critic[name], value, rtol=0, atol=2e-4)


def test_resumed_runs_end_bitwise_the_same(inputs: RLVRInputs, whole: Run, tmp_path: Path) -> None:
    """Its newest checkpoint torn: goes on from the one before, of both networks, with moments at the right step."""
    shutil.copytree(whole.folder / "work", tmp_path / "work")
    (tmp_path / "work" / "checkpoints" / "checkpoint-12" / CHECKPOINT_MARKER).unlink()
    loaded: list[tuple[float, float]] = []
    real = ppo_trainer.PPOTrainer._begin

    def begin(trainer: Any, *args: Any) -> float:
        time = real(trainer, *args)
        for optimizer in (trainer.optimizer, trainer.critic.optimizer):
            states = list(optimizer.state.values())
            assert states and all(state["exp_avg"].abs().max() > 0 for state in states if state["exp_avg"].numel())
            loaded.append((states[0]["step"].item(), len(states)))
        assert trainer.lr_scheduler.last_epoch == trainer.critic.scheduler.last_epoch == 8
        return time

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_trainer.PPOTrainer, "_begin", begin)
        resumed = run(inputs, tmp_path)
    assert (tmp_path / "work" / "resumed.jsonl").read_text() == "8\n"
    assert loaded == [(8, len(start(inputs))), (8, len(start(inputs, "reward_model")))]
    assert differing(whole.policy, resumed.policy) == differing(whole.critic, resumed.critic) == []
    for name in ("prompts", "samples"):
        assert resumed.log(name) == whole.log(name)
    assert [row["step"] for row in resumed.log("history")] == list(range(1, 13))
    assert resumed.outputs.num_tokens == whole.outputs.num_tokens


def test_sigterm_stops_at_the_border_of_a_rollout_batch(inputs: RLVRInputs, whole: Run, tmp_path: Path) -> None:
    real = ppo_trainer.PPOTrainer.training_step

    def step(trainer: Any, *args: Any) -> Any:
        if trainer.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(trainer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_trainer.PPOTrainer, "training_step", step)
        with pytest.raises(StageStopped, match="stopped as asked at step 8 of 12"):
            run(inputs, tmp_path, save_steps=1000)
    resumed = run(inputs, tmp_path)
    assert differing(whole.policy, resumed.policy) == differing(whole.critic, resumed.critic) == []


@pytest.mark.parametrize("broken", ["policy", "critic"])
def test_a_loss_that_is_nan_in_either_network_ends_the_training_with_its_prompts(
    inputs: RLVRInputs, tmp_path: Path, broken: str
) -> None:
    real = ppo_trainer.PPOTrainer._look

    def look(trainer: Any, episodes: list[Any]) -> None:
        real(trainer, episodes)
        if trainer.state.global_step == 8:
            model = trainer.model if broken == "policy" else trainer.critic.model
            with torch.no_grad():
                next(model.parameters())[5:].fill_(torch.nan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_trainer.PPOTrainer, "_look", look)
        with pytest.raises(ValueError, match=r"loss is nan at step 9; .*Its rows: row \d+ 'What is \d+ plus"):
            run(inputs, tmp_path)
    newest = tmp_path / "work" / "checkpoints" / "checkpoint-8"
    assert (newest / CHECKPOINT_MARKER).is_file()
    for who in ("model", "critic"):
        assert all(value.isfinite().all() for value in weights_of_checkpoint(newest, who).values())


def test_checkpoints_lie_between_rollout_batches_only(inputs: RLVRInputs, tmp_path: Path) -> None:
    assert trainer_of(inputs, tmp_path, {}, save_steps=5).args.save_steps == 8


# ------------------------------------------------------------------------------------------------- what a step computes


def episode_of(ids: list[int], prompt: list[int], reward: float | None = 1.0) -> Episode:
    return {
        "prompt_ids": prompt,
        "ids": ids,
        "score": Score(reward, "right"),
        "stopped": True,
        "batch": 0,
        "row": 0,
        "sample": 0,
    }


def test_no_gradient_reaches_a_prompt_a_pad_or_what_is_not_graded(inputs: RLVRInputs, tmp_path: Path) -> None:
    trainer = trainer_of(inputs, tmp_path, {})
    episodes = [episode_of([7, 8, 0], [20, 21, 22]), episode_of([9], [30]), episode_of([5, 6], [40, 41], None)]
    batch = collate(episodes, 1, torch.device("cpu"))
    assert batch["shift_labels"].tolist() == [[-100, -100, 7, 8, 0, -100], [9] + [-100] * 5, [-100] * 6]
    marked = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0] * 6]).bool()
    for model, compute in (
        (trainer.model, lambda: token_logps(trainer.model, batch)[0]),
        (trainer.critic.model, lambda: token_values(trainer.critic.model, batch)),
    ):
        seen: list[torch.Tensor] = []
        note = partial(lambda seen, *args: seen.append(args[-1].last_hidden_state), seen)
        hook = model.base_model.register_forward_hook(note)
        values = compute()
        hook.remove()
        assert values.shape == (4,)
        (gradient,) = torch.autograd.grad(values.square().sum(), seen[0])
        assert gradient[marked].abs().sum(dim=-1).min() > 0 and not gradient[~marked].any()


def test_logps_and_values_are_those_of_each_row_alone(inputs: RLVRInputs, tmp_path: Path) -> None:
    """The value *before* each token, and log-probabilities at the temperature, one sequence at a time."""
    trainer = trainer_of(inputs, tmp_path, {"temperature": 0.7})
    episodes = [episode_of([7, 8, 0], [20, 21, 22]), episode_of([9], [30])]
    with torch.no_grad():
        batch = collate(episodes, 1, torch.device("cpu"))
        logps, entropy = token_logps(trainer.model, batch)
        values = token_values(trainer.critic.model, batch)
        expected: list[list[torch.Tensor]] = [[], [], []]
        for one in episodes:
            start, ids = len(one["prompt_ids"]) - 1, torch.tensor([one["prompt_ids"] + one["ids"]])
            rows = torch.log_softmax(trainer.model(ids).logits[0, start:-1] / 0.7, -1)
            expected[0].append(rows.gather(1, ids[0, start + 1 :, None])[:, 0])
            expected[1].append(-(rows.exp() * rows).sum(-1))
            hidden = trainer.critic.model.model(ids).last_hidden_state[0, start:-1]
            expected[2].append(hidden @ trainer.critic.model.score.weight[0])
    for found, parts in zip((logps, entropy, values), expected, strict=True):
        torch.testing.assert_close(found, torch.cat(parts), rtol=1e-5, atol=1e-5)


def test_lambda_one_and_a_critic_of_zeros_is_reinforce_with_kl_in_the_reward(
    inputs: RLVRInputs, tmp_path: Path
) -> None:
    """One epoch, no whitening: the gradient of the policy in float64, from its definition, to 1e-6 of its size."""
    settings = {
        "critic": {"initial": "policy"}, "gae_lambda": 1.0, "whiten_advantages": False, "num_minibatches": 1,
        "num_ppo_epochs": 1, "beta": 0.3, "max_grad_norm": 1e9, "effective_batch_size": 8, **LENIENT,
    }  # fmt: skip
    trainer = trainer_of(inputs, tmp_path, settings)
    with torch.no_grad():  # the policy has moved away from its reference
        for weight in trainer.reference.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    episodes = trainer._roll_out(0)
    assert all(not one["values"].any() for one in episodes)
    num_tokens = sum(len(one["ids"]) for one in episodes)
    trainer.training_step(trainer.model, episodes, num_tokens)

    policy = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float64)
    reference = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float64)
    reference.load_state_dict(trainer.reference.state_dict())
    total = torch.zeros((), dtype=torch.float64)
    for one in episodes:
        ids, start = torch.tensor([one["prompt_ids"] + one["ids"]]), len(one["prompt_ids"]) - 1

        def logps(model: Any, ids: torch.Tensor = ids, start: int = start) -> torch.Tensor:
            rows = torch.log_softmax(model(ids).logits[0, start:-1], -1)
            return rows.gather(1, ids[0, start + 1 :, None])[:, 0]

        own, other = logps(policy), logps(reference).detach()
        for t in range(len(own)):
            to_go = one["score"].reward - 0.3 * (own[t:] - other[t:]).sum().detach()
            total = total - to_go * own[t] / num_tokens
    total.backward()
    expected = {name: weight.grad for name, weight in policy.named_parameters()}
    largest = max(value.abs().max() for value in expected.values())
    assert largest > 0.01
    for name, weight in trainer.model.named_parameters():
        torch.testing.assert_close(weight.grad.double(), expected[name], rtol=0, atol=1e-6 * float(largest), msg=name)


def test_losses_of_a_step_do_not_depend_on_ungraded_episodes(inputs: RLVRInputs, tmp_path: Path) -> None:
    trainer = trainer_of(inputs, tmp_path, LENIENT)
    scorer = trainer.scorer
    trainer.scorer = lambda episodes: [
        Score(None, "could_not_grade") if place % 3 == 0 else score for place, score in enumerate(scorer(episodes))
    ]
    episodes = trainer._roll_out(0)
    left = [one for one in episodes if one["score"].reward is not None]
    assert len(left) == 5 and trainer._of_rollouts["verified/could_not_grade"] == 3 / 8
    advantages = torch.cat([one["advantages"] for one in left])
    assert advantages.mean().abs() < 1e-6 and advantages.std().item() == pytest.approx(1, abs=1e-4)
    num_tokens = sum(len(one["ids"]) for one in left)
    with_all = trainer.training_step(trainer.model, episodes, num_tokens)
    torch.testing.assert_close(with_all, trainer.training_step(trainer.model, left, num_tokens))
    # Nothing to train on is no error, and moves nothing.
    assert trainer.training_step(trainer.model, [one for one in episodes if one not in left], 1) == 0


def test_a_prompt_that_comes_twice_in_a_batch_gets_other_samples(inputs: RLVRInputs, tmp_path: Path) -> None:
    trainer = trainer_of(inputs, tmp_path, {"num_samples_per_prompt": 2})
    asked = trainer._asked(0, [4, 7, 4])
    assert [(one["row"], one["sample"]) for one in asked] == [(4, 0), (4, 1), (7, 0), (7, 1), (4, 2), (4, 3)]


# -------------------------------------------------------------------------------------------------------- the critic


def test_in_its_warm_up_the_critic_moves_alone(inputs: RLVRInputs, tmp_path: Path) -> None:
    """The policy waits bit for bit, and its schedule counts its own steps."""
    settings = {"critic": {"warmup_steps": 6}, "warmup_ratio": 0.5}
    seen: list[tuple[int, bool, bool]] = []
    real = ppo_trainer.PPOTrainer._optimize

    def optimize(trainer: Any, *args: Any) -> None:
        before = [[w.clone() for w in model.parameters()] for model in (trainer.model, trainer.critic.model)]
        real(trainer, *args)
        moved = [
            any(not torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True))
            for weights, model in zip(before, (trainer.model, trainer.critic.model), strict=True)
        ]
        seen.append((trainer.state.global_step, *moved))  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_trainer.PPOTrainer, "_optimize", optimize)
        made = run(inputs, tmp_path, settings)
    history = made.log("history")
    # Of six steps of the policy three are its warm-up: 0, a third, two thirds, then down from 1. The critic has twelve.
    assert [row["learning_rate"] for row in history] == pytest.approx([0] * 7 + [x * 1e-3 / 3 for x in (1, 2, 3, 2, 1)])
    rates = [x * 1e-3 / 6 for x in (0, 1, 2, 3, 4, 5, 6, 5, 4, 3, 2, 1)]
    assert [row["critic/learning_rate"] for row in history] == pytest.approx(rates)
    # A rate of 0 moves nothing.
    assert seen == [(step, step > 7, step > 1) for step in range(1, 13)]
    assert all("policy_loss" not in row and row["kl"] == 0 for row in history[:6])


def test_two_optimizers_and_two_clips(inputs: RLVRInputs, tmp_path: Path) -> None:
    """The critic's rate, coefficient and gradient do not touch the policy of the first rollout batch."""
    settings = {"num_episodes": 8, "max_grad_norm": 0.05}
    one = run(inputs, tmp_path / "one", settings)
    other = run(
        inputs, tmp_path / "other",
        settings | {"critic": {"learning_rate": 0.02, "value_coefficient": 7.0, "lr_scheduler_type": "constant"}},
    )  # fmt: skip
    assert differing(one.policy, other.policy) == [] and differing(one.critic, other.critic)
    assert [row["critic/learning_rate"] for row in other.log("history")] == [0.02] * 4
    norms = [[row["critic/grad_norm"] for row in made.log("history")] for made in (one, other)]
    assert norms[1][0] == pytest.approx(70 * norms[0][0], rel=1e-4) and norms[0][0] > 0.05


def test_a_critic_whose_optimizer_is_in_cpu_memory_is_the_same(inputs: RLVRInputs, whole: Run, tmp_path: Path) -> None:
    settings = {"critic": {"offload_optimizer": True}}
    made = run(inputs, tmp_path / "whole", settings)
    assert differing(whole.policy, made.policy) == differing(whole.critic, made.critic) == []
    shutil.copytree(made.folder / "work", tmp_path / "again" / "work")
    (tmp_path / "again" / "work" / "checkpoints" / "checkpoint-12" / CHECKPOINT_MARKER).unlink()
    again = run(inputs, tmp_path / "again", settings)
    assert differing(whole.critic, again.critic) == []
    assert num_models_held(PPOSettings.model_validate(SETTINGS | settings)) == 5


def test_a_critic_from_the_policy_says_zero(inputs: RLVRInputs, tmp_path: Path) -> None:
    trainer = trainer_of(inputs, tmp_path, {"critic": {"initial": "policy"}, "beta": 0.0})
    assert not trainer.critic.model.score.weight.any() and trainer.reference is None
    body = {name.removeprefix("model."): value for name, value in start(inputs).items() if name != "lm_head.weight"}
    assert differing(body, dict(trainer.critic.model.model.state_dict())) == []


def test_the_reward_models_score_is_added_where_no_penalty_stands(inputs: RLVRInputs, tmp_path: Path) -> None:
    settings = {"reward_model_weight": 0.5, "max_completion_length": 3}
    trainer = trainer_of(inputs, tmp_path, settings)
    tokenizer, model = trainer.processing_class, load_critic(trainer.settings, inputs, trainer.processing_class)
    row = prompts(1)[0]
    asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    words = tokenizer("so good")["input_ids"]
    texts = [([*words, 0], True, "so good"), (words, False, "so good")]
    episodes: list[Any] = [
        {
            "batch": 0,
            "row": 0,
            "sample": 0,
            "prompt": row["prompt"],
            "prompt_ids": asked,
            "ids": ids,
            "stopped": stopped,
            "text": text,
        }
        for ids, stopped, text in texts
    ]
    ended, cut = trainer.scorer(episodes)
    with torch.no_grad():
        hidden = model.model(torch.tensor([asked + words + [0]])).last_hidden_state[0, -1]
        expected = 10 + 0.5 * (hidden @ model.score.weight[0]).item()
    assert ended.verdict == "right" and ended.reward == pytest.approx(expected, abs=1e-5) and abs(expected - 10) > 1e-3
    assert (cut.verdict, cut.reward) == ("no_eos", -10.0)


# ------------------------------------------------------------------------------------------------------------- LoRA


def test_a_lora_policy_without_its_adapter_is_the_reference(inputs: RLVRInputs, tmp_path: Path) -> None:
    """Trained, merged, and gone on with from a checkpoint bit for bit; the KL term is that of a reference apart."""
    settings = {"lora": {"r": 4, "lora_alpha": 64.0}, "learning_rate": 5e-3}
    made = run(inputs, tmp_path / "whole", settings)
    before, history = start(inputs), made.log("history")
    assert history[0]["kl"] == 0 and history[-1]["kl"] > 1e-4
    assert 0 < len(differing(before, made.policy)) < len(before)
    assert (tmp_path / "whole" / "out" / "adapter" / "adapter_model.safetensors").is_file()

    trainer = trainer_of(inputs, tmp_path / "apart", settings)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    episodes = trainer._roll_out(0)
    apart = ppo._reference(inputs, trainer.processing_class)
    for one in episodes:
        ids, begin = torch.tensor([one["prompt_ids"] + one["ids"]]), len(one["prompt_ids"]) - 1
        with torch.no_grad():
            rows = torch.log_softmax(apart(ids).logits[0, begin:-1], -1)
        expected = rows.gather(1, ids[0, begin + 1 :, None])[:, 0]
        torch.testing.assert_close(one["reference_logps"], expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(one["logps"], expected, atol=1e-3)

    shutil.copytree(made.folder / "work", tmp_path / "again" / "work")
    (tmp_path / "again" / "work" / "checkpoints" / "checkpoint-12" / CHECKPOINT_MARKER).unlink()
    again = run(inputs, tmp_path / "again", settings)
    assert (tmp_path / "again" / "work" / "resumed.jsonl").read_text() == "8\n"
    assert differing(made.policy, again.policy) == differing(made.critic, again.critic) == []
    assert num_models_held(PPOSettings.model_validate(SETTINGS | settings)) == 4


# ------------------------------------------------------------------------------------------------- bfloat16, and disk


def dtypes_of_caches(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Filled with what keys and values are kept in."""
    cached: set[torch.dtype] = set()
    real = DynamicLayer.update

    def update(layer: Any, *args: Any, **kwargs: Any) -> Any:
        made = real(layer, *args, **kwargs)
        cached.update(one.dtype for one in made)
        return made

    monkeypatch.setattr(DynamicLayer, "update", update)
    return cached


def test_bfloat16_as_on_a_gpu(inputs: RLVRInputs, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast over float32 weights; keys and values in bfloat16; values and scores in float32."""
    monkeypatch.setattr("smoltulu.tasks.trainer.loop.use_bfloat16", lambda precision, compute: True)
    cached = dtypes_of_caches(monkeypatch)
    made = run(inputs, tmp_path, {"reward_model_weight": 0.1}, activation_checkpointing=True)
    assert cached == {torch.bfloat16}
    first = made.log("history")[0]
    # Generation rounds otherwise than the forward pass of the update, which is why that is what ratios start from.
    assert 1e-5 < first["sampling_difference"] < 0.1 and first["ratio"] == pytest.approx(1, abs=0.02)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    for trained, exact, before in (
        (made.policy, whole.policy, start(inputs)),
        (made.critic, whole.critic, start(inputs, "reward_model")),
    ):
        assert {value.dtype for value in trained.values()} == {torch.float32} and differing(trained, exact)
        assert all((value - before[name]).abs().max() < 0.1 for name, value in trained.items())


@pytest.mark.gpu
def test_ppo_on_this_gpu(inputs: RLVRInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 to the end, both models saved and the policy asked; then gone on with from an earlier batch."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    settings = {
        # Of the critic's optimizer the numbers of steps lie on the host, of the policy's on the card.
        "precision": "bfloat16", "reward_model_weight": 0.1, "critic": {"offload_optimizer": True},
        "gate": {"num_prompts": 2, "max_new_tokens": 3, "min_stopped_share": 0},
    }  # fmt: skip
    cached = dtypes_of_caches(monkeypatch)
    made = run(inputs, tmp_path / "run", settings, device="cuda")
    assert torch.bfloat16 in cached  # the gate asks in float32
    first = made.log("history")[0]
    assert first["sampling_difference"] < 0.1 and first["ratio"] == pytest.approx(1, abs=0.02)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    for trained, name in ((made.policy, "model"), (made.critic, "reward_model")):
        assert all(torch.isfinite(value).all() for value in trained.values())
        assert differing(trained, start(inputs, name))
    shutil.copytree(made.folder / "work", tmp_path / "again" / "work")
    (tmp_path / "again" / "work" / "checkpoints" / "checkpoint-12" / CHECKPOINT_MARKER).unlink()
    again = run(inputs, tmp_path / "again", settings, device="cuda")
    assert (tmp_path / "again" / "work" / "resumed.jsonl").read_text() == "8\n"
    for one, other in ((made.policy, again.policy), (made.critic, again.critic)):
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-2)


def test_disk_is_that_of_two_models(inputs: RLVRInputs, whole: Run) -> None:
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    policy, out = model_size(Path(inputs.model)), whole.folder / "out"
    one = checkpoint_bytes(policy)
    assert size(whole.folder / "work" / "checkpoints" / "checkpoint-12") == pytest.approx(2 * one, rel=0.1)
    assert size(out / "model") + size(out / "critic") == pytest.approx(2 * model_bytes(policy), rel=0.05)
    assert training_bytes(policy, 0, 3, has_critic=True) == 4 * 2 * one
    settings = PPOSettings.model_validate(SETTINGS)
    compute = context(whole.folder).compute
    assert disk_of_training(settings, Path(inputs.model), Path(inputs.dataset), compute) > 8 * one
    # In memory: policy and critic with two moments each, and the reference; and the reward model where it counts.
    assert num_models_held(settings) == 7
    counted = {"beta": 0, "reward_model_weight": 1, "rollout_batch_size": 3, "effective_batch_size": 8}
    other = PPOSettings.model_validate(SETTINGS | counted | {"num_episodes": 16})
    assert num_models_held(other) == 7 and num_at_once(other, 1) == 3
    assert num_at_once(settings, 1) == 8
    assert num_at_once(other, 8) == 2


# -------------------------------------------------------------------------------------------------------- bad input


def test_models_that_cannot_be_a_critic_are_refused_before_any_weight_is_loaded(
    inputs: RLVRInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smoltulu.tasks.training.ppo.load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    settings = PPOSettings.model_validate(SETTINGS)

    def refusal(folder: str | None) -> str:
        with pytest.raises(ValueError) as error:
            ppo.build(settings, inputs.model_copy(update={"reward_model": folder}), context(tmp_path / "run"))
        return str(error.value)

    assert "critic.initial reward_model needs a reward model, and none was given" in refusal(None)
    assert "not a reward model" in refusal(str(Path(inputs.model)))
    assert "num_labels 3" in refusal(str(build_tiny_model(tmp_path / "three", num_labels=3)))
    other = build_tiny_model(tmp_path / "vocabulary", num_labels=1)
    build_tokenizer(["other words make other merges"], vocab_size=300).save_pretrained(other)
    assert "has another vocabulary" in refusal(str(other))
    template = build_tiny_model(tmp_path / "template", num_labels=1)
    file = template / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|user|>", "<|human|>"))
    assert "another chat template" in refusal(str(template))
    short = build_tiny_model(tmp_path / "short", num_labels=1)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"architectures": None}))
    assert "unnamed architecture" in refusal(str(short))


def test_fewer_prompts_than_a_rollout_batch_takes_are_refused(inputs: RLVRInputs, tmp_path: Path) -> None:
    settings = PPOSettings.model_validate(SETTINGS | {"effective_batch_size": 32, "num_episodes": 64})
    with pytest.raises(ValueError, match=r"needs 64 different prompts, and there are 20; lower effective_batch_size"):
        ppo.build(settings, inputs, context(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_episodes": 25}, "num_episodes 25 is not a multiple of the rollout batch 8"),
        ({"num_episodes": 3}, "give 8"),
        ({"gae_lambda": 1.1}, "less than or equal to 1"),
        ({"gamma": 0}, "greater than 0"),
        ({"epsilon": 1}, "less than 1"),
        ({"critic": {"value_clip": 0}}, "greater than 0"),
        ({"critic": {"gae_lambda": -0.1}}, "greater than or equal to 0"),
        ({"critic": {"warmup_steps": 12}}, "warmup_steps 12 leaves the policy none of the run's 12"),
        ({"critic": {"initial": "path"}}, "give a path"),
        ({"critic": {"lr_scheduler_type": "constant", "warmup_ratio": 0.1}}, "constant has no warm-up"),
        ({"non_stop_reward": 10}, "not below reward_correct"),
        ({"num_generations": 4}, "num_generations"),
        ({"schedule": {"kind": "wsd_s", "budgets": [6, 12]}, "critic": {"warmup_steps": 2}}, "12"),
        ({"lora": {"lora_dropout": 0.1}}, "lora_dropout is 0.1; PPO .* set it to 0"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PPOSettings.model_validate(SETTINGS | settings)


def test_counts() -> None:
    settings = PPOSettings.model_validate(SETTINGS)
    assert (settings.num_rollouts, settings.num_steps_per_rollout, settings.budget.max_steps) == (8, 4, 12)
    # Write, three looks, the reference's; two passes over policy and critic.
    assert ppo.flops_per_token(settings) == 2 + 2 + 2 + 2 + 2 * 6 * 2
    waits = PPOSettings.model_validate(SETTINGS | {"beta": 0, "critic": {"warmup_steps": 3}})
    assert ppo.flops_per_token(waits) == 6 + 2 * 6 * 1.75


# -------------------------------------------------------------------------------------------------------- the signal


def test_a_run_without_signal_stops_and_shows_its_answers(inputs: RLVRInputs, tmp_path: Path) -> None:
    """All rewards of a batch are compared, so the batch is the group. Here nothing is ever right."""
    settings = {"max_rollouts_without_signal": 16, "non_stop_reward": None, "reward_correct": 1e-9}
    rows = [row | {"ground_truth": json.dumps({"kind": "word_count", "count": 500})} for row in prompts(20)]
    never = inputs.model_copy(update={"dataset": str(write_rows(tmp_path / "rows.parquet", rows))})
    with pytest.raises(ValueError, match="no reward differed from the others of its group in 16 rollouts") as caught:
        run(never, tmp_path, settings)
    assert str(caught.value).count("verifier constraint: wrong (") == 3
    # A constant reward never has a signal, and is to have none.
    made = run(never, tmp_path / "constant", settings | {"reward": "constant", "beta": 0.0})
    assert {row["groups_with_signal"] for row in made.log("history") if "reward" in row} == {0.0}
    assert {row["reward"] for row in made.log("samples")} == {1e-9}
