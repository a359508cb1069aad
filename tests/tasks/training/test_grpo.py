"""GRPO and RLOO: TRL's losses as our settings make them, against formulas written here, on a two-layer model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.rlvr import GRPOSettings, RLOOSettings, RLVRInputs, RLVRSettings
from smoltulu.tasks.preflight.rollout_memory import num_models_held
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.training.grpo import build
from smoltulu.tasks.training.rlvr import flops_per_token, train_rlvr
from tests.small_runs import training_inputs, turn
from tests.tiny_model import build_tiny_model

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3, "effective_batch_size": 4, "num_generations": 4, "num_steps": 2, "max_prompt_length": 100,
    "max_completion_length": 6, "precision": "float32", "gate": {"num_prompts": 0},
}  # fmt: skip
TRUTH = json.dumps({"kind": "word_count", "count": 2})


def prompts(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"0:{i}", "prompt": [turn("user", f"What is {i} plus {i % 7}?")], "verifier": "constraint",
         "ground_truth": TRUTH} | changes
        for i in range(count)
    ]  # fmt: skip


def arguments_of(
    folder: Path, model: Path, settings: dict[str, Any], rows: list[dict[str, Any]], **compute: Any
) -> tuple[Any, Any, StageContext]:
    for name in ("out", "work/checkpoints", "before"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    machinery = {"device": "cpu", "per_device_train_batch_size": 4, "logging_steps": 1, "num_threads": 1}
    machines = ComputeSettings(**machinery | compute)
    config = RLVRSettings.model_validate(SETTINGS | settings)
    inputs = training_inputs("rlvr", folder / "before", model, rows, config, machines)
    return config, inputs, StageContext(folder / "out", folder / "work", machines, lambda *args, **kwargs: None)


def trainer_of_rollouts(
    folder: Path, model: Path, settings: dict[str, Any], rows: list[dict[str, Any]] | None = None, **compute: Any
) -> Any:
    """The trainer as the stage builds it, before its first step."""
    return build(*arguments_of(folder, model, settings, rows or prompts(8), **compute))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


# --- One batch, its loss by hand ------------------------------------------------------------------------------------

PROMPT_LEN, RESPONSE_LEN = 5, 7
#: (4, 7): answers of several lengths, the last of two tokens.
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0], [1] * 2 + [0] * 5])


def batch_of(trainer: Any) -> dict[str, torch.Tensor]:
    """A micro-batch of rollouts. `old` and `ref` differ from the policy's log-probabilities, so that all is clipped."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 300, (4, PROMPT_LEN + RESPONSE_LEN), generator=generator)
    batch = {
        "prompt_ids": ids[:, :PROMPT_LEN], "prompt_mask": torch.ones(4, PROMPT_LEN, dtype=torch.long),
        "completion_ids": ids[:, PROMPT_LEN:], "completion_mask": MASK,
        "advantages": torch.tensor([1.5, -0.5, 0.25, -1.25]), "num_items_in_batch": MASK.sum(),
    }  # fmt: skip
    with torch.no_grad():
        logps, _ = logps_and_entropies(trainer.model, batch)
    batch["old_per_token_logps"] = logps + 0.6 * torch.randn(logps.shape, generator=generator)
    batch["ref_per_token_logps"] = logps + 0.8 * torch.randn(logps.shape, generator=generator)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return batch


def logps_and_entropies(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(4, 7) each, of the answers' tokens, from plain logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, PROMPT_LEN - 1 : -1]
    every = torch.log_softmax(logits, dim=-1)
    return every.gather(2, batch["completion_ids"][:, :, None])[:, :, 0], -(every.exp() * every).sum(-1)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("kl_form", ["k3", "k3_weighted"])
def test_the_gradient_of_kl_is_that_of_its_form(model: Path, tmp_path: Path, kl_form: str) -> None:
    """By hand, with d = log pi_ref - log pi and the ratio pi / pi_old at 1:

    k3 is e^d - d - 1, its gradient (1 - e^d) grad log pi. Times the ratio, whose own gradient is grad log pi, it is
    (1 - e^d) + (e^d - d - 1) = -d: the gradient of the true KL.
    """
    trainer = trainer_of_rollouts(tmp_path, model, {"beta": 0.3, "kl_form": kl_form})
    batch = batch_of(trainer) | {"advantages": torch.zeros(4)}
    del batch["old_per_token_logps"]  # the policy itself
    got = gradients(trainer.model, trainer.compute_loss(trainer.model, batch))

    logps, _ = logps_and_entropies(trainer.model, batch)
    d = (batch["ref_per_token_logps"] - logps).detach()
    weight = 1 - d.exp() if kl_form == "k3" else -d
    expected = gradients(trainer.model, 0.3 * (weight * logps * MASK).sum() / MASK.sum())
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-6)
    assert max(value.abs().max() for value in expected.values()) > 1e-3


def test_recipes_without_a_form_of_kl_keep_the_one_they_had() -> None:
    settings = RLVRSettings.model_validate(SETTINGS)
    assert isinstance(settings, GRPOSettings) and settings.kl_form == "k3_weighted"


@pytest.mark.parametrize("changes", [
    {}, {"epsilon_high": 0.5}, {"delta": 1.3}, {"importance_sampling_level": "sequence"},
    {"top_entropy_quantile": 0.4}, {"beta": 0.2}, {"beta": 0.2, "kl_form": "k3", "top_entropy_quantile": 0.4},
])  # fmt: skip
def test_losses_are_those_of_the_formulas(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """In float64, token by token."""
    trainer = trainer_of_rollouts(tmp_path, model, {"epsilon": 0.1} | changes)
    batch = batch_of(trainer)
    if "top_entropy_quantile" in changes:
        trainer._find_uncertain_tokens([batch])
    loss = trainer.compute_loss(trainer.model, batch).item()

    with torch.no_grad():
        logps, entropies = (value.double() for value in logps_and_entropies(trainer.model, batch))
    settings, total = trainer.settings, 0.0
    lowest = torch.quantile(entropies[MASK.bool()], 1 - settings.top_entropy_quantile)
    num_clipped = 0
    for i in range(4):
        advantage = batch["advantages"][i].item()
        logs = (logps - batch["old_per_token_logps"])[i]
        if settings.importance_sampling_level == "sequence":
            logs = (logs[: MASK[i].sum()].mean()).repeat(RESPONSE_LEN)
        for t in range(int(MASK[i].sum())):
            ratio = logs[t].exp().item()
            high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
            clipped = min(max(ratio, 1 - settings.epsilon), 1 + high)
            num_clipped += clipped != ratio
            bounded = ratio if settings.delta is None else min(ratio, settings.delta)
            token = -min(bounded * advantage, clipped * advantage)
            if settings.top_entropy_quantile < 1 and entropies[i, t] < lowest:
                token = 0.0
            d = (batch["ref_per_token_logps"] - logps)[i, t].item()
            k3 = torch.tensor(d).exp().item() - d - 1
            token += settings.beta * k3 * (ratio if settings.kl_form == "k3_weighted" else 1)
            total += token
    assert loss == pytest.approx(total / MASK.sum().item(), rel=2e-4)
    assert num_clipped > 3


@pytest.mark.parametrize("changes", [
    {"epsilon_high": 0.5}, {"delta": 1.3}, {"importance_sampling_level": "sequence"}, {"top_entropy_quantile": 0.4},
    {"beta": 0.2, "kl_form": "k3"},
])  # fmt: skip
def test_every_option_changes_the_loss(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = {"beta": changes["beta"]} if "beta" in changes else {}
    losses = []
    for name, settings in (("plain", plain), ("changed", changes)):
        trainer = trainer_of_rollouts(tmp_path / name, model, {"epsilon": 0.1} | settings)
        batch = batch_of(trainer)
        if "top_entropy_quantile" in settings:
            trainer._find_uncertain_tokens([batch])
        loss = trainer.compute_loss(trainer.model, batch)
        losses.append(sum(value.abs().sum().item() for value in gradients(trainer.model, loss).values()))
    assert abs(losses[0] / losses[1] - 1) > 1e-2


# --- Advantages -----------------------------------------------------------------------------------------------------


def give_answers(trainer: Any, answers: list[str], ended: list[bool]) -> None:
    """Have the trainer generate these answers to every group of prompts."""
    tokenizer = trainer.processing_class
    ids = [
        tokenizer(answer)["input_ids"] + ([tokenizer.eos_token_id] if ends else [])
        for answer, ends in zip(answers, ended, strict=True)
    ]
    is_rloo = isinstance(trainer.settings, RLOOSettings)

    def given(prompt_ids: list[Any], *args: Any, **kwargs: Any) -> Any:
        made = [ids[place % len(ids)] for place in range(len(prompt_ids))]
        return made if is_rloo else (made, None)

    trainer._generate_single_turn = given
    trainer.model.train()


def first_batch(trainer: Any) -> dict[str, Any]:
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize("normalize", [False, True])
def test_rloo_compares_with_the_others_of_the_group(model: Path, tmp_path: Path, normalize: bool) -> None:
    """Rewards 10, 0, -10 (no eos) and 0; the mean of the other three is taken off each."""
    changes = {
        "algorithm": "rloo", "beta": 0.0, "reward_correct": 10.0, "non_stop_reward": -10.0,
        "normalize_advantages": normalize,
    }  # fmt: skip
    trainer = trainer_of_rollouts(tmp_path, model, changes)
    give_answers(trainer, ["two words", "one", "two words", "some three words"], [True, True, False, True])
    got = first_batch(trainer)["advantages"]
    expected = torch.tensor([10 - -10 / 3, 0 - 0 / 3, -10 - 10 / 3, 0 - 0 / 3])
    if normalize:
        expected = (expected - expected.mean()) / (expected.std() + 1e-4)
    torch.testing.assert_close(got, expected)


def test_rloo_takes_kl_off_the_reward(model: Path, tmp_path: Path) -> None:
    """k1, log pi - log pi_ref, summed over the answer: of a policy that is no longer the reference."""
    trainer = trainer_of_rollouts(tmp_path, model, {"algorithm": "rloo", "beta": 0.5})
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.mul_(1.3)
    give_answers(trainer, ["two words", "one", "so so", "some three words"], [True] * 4)
    batch = first_batch(trainer)
    with torch.no_grad():
        sums = []
        for one in (trainer.model, trainer.ref_model):
            width = batch["prompt_ids"].shape[1]
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
            every = torch.log_softmax(one(input_ids=ids, attention_mask=mask).logits[:, width - 1 : -1], dim=-1)
            logps = every.gather(2, batch["completion_ids"][:, :, None])[:, :, 0]
            sums.append((logps * batch["completion_mask"]).sum(1))
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0]) - 0.5 * (sums[0] - sums[1])
    torch.testing.assert_close(batch["advantages"], rewards - (rewards.sum() - rewards) / 3, rtol=1e-3, atol=1e-4)
    assert (sums[0] - sums[1]).abs().max() > 0.1


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_answers_without_end_get_no_gradient_where_they_are_masked(model: Path, tmp_path: Path, algorithm: str) -> None:
    trainer = trainer_of_rollouts(tmp_path, model, {"algorithm": algorithm, "mask_truncated_completions": True})
    give_answers(trainer, ["two words", "one", "so so", "some three words"], [True, False, True, False])
    batch = first_batch(trainer)
    assert batch["completion_mask"].any(dim=1).tolist() == [True, False, True, False]
    assert batch["advantages"].count_nonzero() == 4


# --- Settings -------------------------------------------------------------------------------------------------------


def test_every_setting_of_rloo_reaches_trls_trainer(model: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "num_generations": 2, "num_iterations": 2, "max_completion_length": 11, "temperature": 0.7, "beta": 0.25,
        "epsilon": 0.3, "epsilon_high": 0.4, "normalize_advantages": True, "mask_truncated_completions": True,
        "weight_decay": 0.125, "learning_rate": 0.02, "seed": 9,
    }  # fmt: skip
    extra = {"algorithm": "rloo", "effective_batch_size": 8, "steps_per_generation": 3, "num_steps": 12}
    trainer = trainer_of_rollouts(tmp_path, model, changes | extra, prompts(12), save_steps=7)
    assert {name: getattr(trainer.args, name) for name in changes} == changes
    assert (trainer.args.steps_per_generation, trainer.args.generation_batch_size) == (6, 24)
    assert trainer.args.save_steps == 12  # at the border of a generation's six steps


@pytest.mark.parametrize(("changes", "message"), [
    ({"algorithm": "rloo", "kl_form": "k3"}, "kl_form"),
    ({"algorithm": "rloo", "loss_type": "bnpo"}, "loss_type"),
    ({"algorithm": "rloo", "scale_rewards": "none"}, "scale_rewards"),
    ({"algorithm": "rloo", "top_entropy_quantile": 0.2}, "top_entropy_quantile"),
    ({"algorithm": "rloo", "gamma": 1.0}, "gamma"),
    ({"algorithm": "rloo", "num_generations": 1}, "num_generations"),
    ({"normalize_advantages": True}, "normalize_advantages"),
    ({"delta": 1.1}, "delta 1.1 is not above 1 \\+ 0.2, where the ratio is clipped already"),
    ({"delta": 1.3, "epsilon_high": 0.3}, "not above 1 \\+ 0.3"),
    ({"top_p": 0.9}, "no field top_p: rollouts are drawn from the policy itself"),
    ({"algorithm": "ppo", "num_episodes": 8, "top_k": 50}, "no field top_k"),
    ({"algorithm": "rloo", "min_p": 0.1, "repetition_penalty": 1.1}, "no field min_p, repetition_penalty"),
])  # fmt: skip
def test_options_of_another_algorithm_and_cut_sampling_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RLVRSettings.model_validate(SETTINGS | changes)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_fewer_prompts_than_a_batch_of_rollouts_needs_are_refused(model: Path, tmp_path: Path, algorithm: str) -> None:
    """TRL would train no step. Rows of another preflight come here too, so the stage asks for itself."""
    config, inputs, context = arguments_of(tmp_path, model, {"algorithm": algorithm}, prompts(3))
    larger = config.model_copy(update={"effective_batch_size": 8, "steps_per_generation": 2})
    with pytest.raises(ValueError, match="a batch of 16 rollouts needs 4 different prompts, and there are 3; lower"):
        build(larger, inputs, context)


# --- The reward model's score ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_the_reward_models_score_is_added_where_no_penalty_stands(model: Path, tmp_path: Path, algorithm: str) -> None:
    settings = {"algorithm": algorithm, "reward_model_weight": 0.5, "non_stop_reward": -1.0}
    config, inputs, context = arguments_of(tmp_path, model, settings, prompts(8))
    with pytest.raises(ValueError, match="reward_model_weight above 0 needs a reward model, and none was given"):
        build(config, RLVRInputs(**inputs.model_dump()), context)
    folder = build_tiny_model(tmp_path / "reward_model", seed=1, num_labels=1)
    inputs = RLVRInputs(**inputs.model_dump() | {"reward_model": str(folder)})
    trainer = build(config, inputs, context)
    tokenizer, asked = trainer.processing_class, prompts(1)[0]["prompt"]
    words = tokenizer("so good")["input_ids"]
    texts, ids = ["so good", "so", "so good"], [[*words, 0], [*words[:1], 0], words]
    made = trainer.reward(
        prompts=[asked] * 3, completions=[[turn("assistant", text)] for text in texts], completion_ids=ids,
        verifier=["constraint"] * 3, ground_truth=[TRUTH] * 3,
    )  # fmt: skip
    scorer = AutoModelForSequenceClassification.from_pretrained(folder)

    def score(text: str) -> float:
        whole = tokenizer.apply_chat_template([*asked, turn("assistant", text)])["input_ids"]
        with torch.no_grad():
            return float(scorer.score(scorer.model(torch.tensor([whole])).last_hidden_state[0, -1])[0])

    assert made == pytest.approx([1 + 0.5 * score("so good"), 0.5 * score("so"), -1.0], abs=1e-5)
    assert [one.verdict for one in trainer.reward.scores] == ["right", "wrong", "no_eos"]
    assert abs(score("so good")) > 1e-3


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_reward_model_can_be_all_that_differs(model: Path, tmp_path: Path, algorithm: str) -> None:
    """Nothing is right, so without it no gradient came; with it training moves, and the log has its rewards."""
    settings = {"algorithm": algorithm, "reward_model_weight": 2.0, "beta": 0.1}
    config, inputs, context = arguments_of(tmp_path, model, settings, prompts(8, verifier="math", ground_truth="77"))
    folder = build_tiny_model(tmp_path / "reward_model", seed=1, num_labels=1)
    train_rlvr(config, RLVRInputs(**inputs.model_dump() | {"reward_model": str(folder)}), context)
    history = [json.loads(line) for line in (tmp_path / "out" / "logs" / "history.jsonl").open()]
    assert all(step["reward_std"] > 1e-4 for step in history)
    trained = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert any(not torch.equal(trained[name], value) for name, value in load_file(model / "model.safetensors").items())
    plain = config.model_copy(update={"reward_model_weight": 0.0})
    assert flops_per_token(config) == flops_per_token(plain) + 2
    assert (config.bytes_per_parameter, num_models_held(config)) == (plain.bytes_per_parameter + 4, 5)


# --- Samples for a reader -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_samples_with_verdict_and_reason_are_kept_and_a_resume_repeats_none(
    model: Path, tmp_path: Path, algorithm: str
) -> None:
    settings = {"algorithm": algorithm, "num_steps": 3, "effective_batch_size": 8, "num_iterations": 2}
    rows = prompts(16) if algorithm == "grpo" else prompts(16, ground_truth="{}")
    settings |= {"num_steps": 4, "max_rollouts_without_signal": 0}
    config, inputs, context = arguments_of(tmp_path, model, settings, rows, save_steps=2)
    outputs, _ = train_rlvr(config, inputs, context)
    samples = [json.loads(line) for line in (tmp_path / "out" / outputs.samples_file).open()]
    # Two batches of rollouts, of two groups each; one completion a group.
    assert [sample["step"] for sample in samples] == [0, 0, 2, 2]
    assert len({sample["prompt"] for sample in samples[:2]}) == 2
    for sample in samples:
        assert (
            sample["verdict"] in ("right", "wrong") if algorithm == "grpo" else sample["verdict"] == "could_not_grade"
        )
        assert sample["id"].startswith("0:") and sample["reason"] and 0 < sample["num_tokens"] <= 6
        assert sample["reward"] == {"right": 1.0, "wrong": 0.0}.get(sample["verdict"])

    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    shutil.rmtree(tmp_path / "work" / "checkpoints" / "checkpoint-4")
    with (tmp_path / "work" / "logs" / "samples.jsonl").open("a") as file:
        file.write('{"step": 3, "prompt": "cut of')
    outputs, _ = train_rlvr(config, inputs, context)
    assert [json.loads(line) for line in (tmp_path / "out" / outputs.samples_file).open()] == samples
