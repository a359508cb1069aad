"""PPO learns what it should: values of a small Markov decision process that can be enumerated, and a reward.

Six tokens, at most three of them in a response: every state and its true value can be written down.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, TrainingArguments
from trl.trainer.utils import add_fused_lm_head

from smoltulu.schemas.rlvr import PPOSettings
from smoltulu.tasks.generation.engines import TransformersEngine
from smoltulu.tasks.generation.interface import Sampling
from smoltulu.tasks.models.classifiers import keep_in_float32
from smoltulu.tasks.training.critic import Critic
from smoltulu.tasks.training.ppo_batch import Episode
from smoltulu.tasks.training.ppo_trainer import PPOTrainer
from smoltulu.tasks.training.rewards import Score
from smoltulu.tasks.training.rollout_engine import Writer
from smoltulu.tasks.training.rollout_log import RolloutLog

EOS, PAD = 0, 1
PROMPT = (2,)
VOCABULARY, LONGEST, MOST = 6, 3, 1.0
States = dict[tuple[int, ...], float]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<pad>", "q", "a", "b", "c"]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<pad>")
    made.chat_template = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    return made


def models(seed: int) -> tuple[Any, Any]:
    """A policy that is near uniform, and a classifier whose head is zero.

    With a position for every token: without a bos, a Llama cannot tell how often one token was repeated.
    """
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY, "n_positions": 8, "n_embd": 32, "n_layer": 2, "n_head": 2, "pad_token_id": None,
        "bos_token_id": EOS, "eos_token_id": EOS, "num_labels": 1, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }  # fmt: skip
    policy = GPT2LMHeadModel(GPT2Config(**config))
    critic = GPT2ForSequenceClassification(GPT2Config(**config | {"pad_token_id": PAD, "initializer_range": 0.1}))
    torch.nn.init.zeros_(critic.score.weight)
    keep_in_float32(critic.score)
    return policy, critic


def score_of(ids: Sequence[int]) -> float:
    """Between 0 and 1: what a response is worth, which its first token decides most."""
    worth = [0.1, 0.9, 0.0, 1.0, 0.3, 0.6]
    padded = [worth[token] for token in ids] + [0.2] * (LONGEST - len(ids))
    return MOST * (0.5 * padded[0] + 0.3 * padded[1] * padded[0] + 0.2 * padded[2])


def true_values(policy: Any) -> States:
    """Value of every state, by going through all of them: responses so far -> expected score."""
    with torch.no_grad():
        states = [
            ids
            for length in range(LONGEST)
            for ids in itertools.product(range(VOCABULARY), repeat=length)
            if EOS not in ids
        ]
        chances = {
            ids: torch.softmax(policy(torch.tensor([[*PROMPT, *ids]])).logits[0, -1].double(), -1) for ids in states
        }
    values: States = {}
    for ids in sorted(states, key=len, reverse=True):
        after = [(*ids, token) for token in range(VOCABULARY)]
        values[ids] = sum(
            chance * (score_of(one) if one[-1] == EOS or len(one) == LONGEST else values[one])
            for chance, one in zip(chances[ids].tolist(), after, strict=True)
        )
    return values


def errors(critic: Any, values: States) -> torch.Tensor:
    """|value - true value| of every state."""
    with torch.no_grad():
        said = [
            critic.score(critic.base_model(torch.tensor([[*PROMPT, *ids]])).last_hidden_state[0, -1:]).item()
            for ids in values
        ]
    return (torch.tensor(said) - torch.tensor(list(values.values()))).abs()


def trainer(
    folder: Path, policy: Any, values: Any, score: Callable[[Sequence[int]], float], **given: Any
) -> PPOTrainer:
    settings = PPOSettings.model_validate(
        {
            "algorithm": "ppo", "max_prompt_length": 8, "max_completion_length": LONGEST, "precision": "float32",
            "effective_batch_size": 64, "num_samples_per_prompt": 64, "num_ppo_epochs": 1, "beta": 0.0, "seed": 1,
            "adam_epsilon": 1e-8, "non_stop_reward": None,
        }
        | given
    )  # fmt: skip

    def scores(episodes: Sequence[Episode]) -> list[Score]:
        return [Score(score(episode["ids"]), "right") for episode in episodes]

    num_steps = settings.budget.max_steps
    assert num_steps is not None
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=num_steps, learning_rate=settings.learning_rate, lr_scheduler_type="linear",
        per_device_train_batch_size=256, use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1,
        save_strategy="no", remove_unused_columns=False, logging_nan_inf_filter=False,
    )  # fmt: skip
    add_fused_lm_head(policy, outputs=("log_probs", "entropy"))
    rows = Dataset.from_list([{"id": "0", "prompt": [{"role": "user", "content": "q"}]}])
    made = PPOTrainer(
        model=policy, args=arguments, train_dataset=rows,
        processing_class=tokenizer(), settings=settings, critic=Critic(values, settings), reference=None,
        scorer=scores, rollout_log=RolloutLog(folder, 1),
    )  # fmt: skip
    made.backend = Writer(TransformersEngine(policy, pad_id=PAD), Sampling(LONGEST, 1.0, (EOS,), seed=settings.seed))
    return made


def warmed_up(folder: Path, policy: Any, critic: Any, num_steps: int) -> None:
    """Train the critic alone on returns of the fixed policy, as `critic.warmup_steps` does."""
    size = 192
    made = trainer(
        folder, policy, critic, score_of, learning_rate=3e-3, num_episodes=size * (num_steps + 1),
        effective_batch_size=size, num_samples_per_prompt=size,
        critic={"initial": "policy", "warmup_steps": num_steps, "gae_lambda": 1.0},
    )  # fmt: skip
    made.args.max_steps = num_steps  # the policy never moves
    made.train()


def test_the_critic_finds_the_values_of_a_fixed_policy(tmp_path: Path) -> None:
    policy, critic = models(seed=0)
    values = true_values(policy)
    assert len(values) == 1 + 5 + 25 and max(values.values()) - min(values.values()) > 0.5 * MOST
    before, weights = errors(critic, values), [weight.clone() for weight in policy.parameters()]
    warmed_up(tmp_path, policy, critic, num_steps=300)
    after = errors(critic, values)
    print(f"critic of zeros: largest error {before.max():.2f} before, {after.max():.2f} after 300 steps")
    assert after.max() < 0.05 * MOST < before.max()
    assert all(torch.equal(old, new) for old, new in zip(weights, policy.parameters(), strict=True))


@pytest.mark.slow
def test_a_reward_model_is_no_critic_until_it_is_warmed_up(tmp_path: Path) -> None:
    """Trained at the last token, as a reward model is: right there, and elsewhere wrong. Printed, and then mended."""
    policy, critic = models(seed=0)
    texts = [ids for ids in itertools.product(range(VOCABULARY), repeat=LONGEST) if EOS not in ids]
    ids, wanted = torch.tensor([(*PROMPT, *text) for text in texts]), torch.tensor([score_of(text) for text in texts])
    optimizer = torch.optim.AdamW(critic.parameters(), lr=3e-3)
    for _ in range(200):
        loss = (critic.score(critic.base_model(ids).last_hidden_state[:, -1])[:, 0] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3
    values = true_values(policy)
    before = errors(critic, values)
    warmed_up(tmp_path, policy, critic, num_steps=300)
    after = errors(critic, values)
    print(
        f"critic from a reward model: mean and largest error {before.mean():.2f}, {before.max():.2f} before, "
        f"{after.mean():.2f}, {after.max():.2f} after 300 steps of warm-up"
    )
    assert after.max() < 0.05 * MOST < before.max()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_ppo_raises_reward(tmp_path: Path, seed: int) -> None:
    """The paper's settings but for rate and lengths; four epochs, clips, whitening, a critic of zeros."""
    policy, critic = models(seed)
    made = trainer(
        tmp_path, policy, critic, score_of, learning_rate=1e-3, num_episodes=64 * 40, num_ppo_epochs=4, seed=seed,
        critic={"initial": "policy", "learning_rate": 3e-3},
    )  # fmt: skip
    start = true_values(policy)[()]
    made.train()
    end = true_values(policy)[()]
    rewards = [entry["reward"] for entry in made.state.log_history if "reward" in entry]
    assert rewards[0] == pytest.approx(start, abs=0.1) and rewards[-1] == pytest.approx(end, abs=0.1)
    best = max(score_of(ids) for ids in itertools.product(range(VOCABULARY), repeat=LONGEST))
    assert start < 0.5 * best and end > 0.8 * best
    clipped = [entry["policy_clip_share"] for entry in made.state.log_history if "policy_clip_share" in entry]
    assert clipped[0] == 0 and max(clipped) > 0.01


def test_without_a_reward_nothing_is_learned(tmp_path: Path) -> None:
    policy, critic = models(seed=0)
    made = trainer(
        tmp_path, policy, critic, lambda ids: 1.0, learning_rate=1e-3, num_episodes=64 * 10, num_ppo_epochs=2,
        critic={"initial": "policy"}, max_rollouts_without_signal=0,
    )  # fmt: skip
    before = true_values(policy)[()]
    made.train()
    assert true_values(policy)[()] == pytest.approx(before, abs=0.15)
