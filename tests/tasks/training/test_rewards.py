"""What a rollout earns: by its verifier, without its end, and under the control rewards."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from smoltulu.schemas.rlvr import GRPOSettings, PPOSettings, RLVRSettings
from smoltulu.tasks.training.rewards import Answer, VerifiableReward, scores_of

PPO: dict[str, Any] = {
    "algorithm": "ppo", "learning_rate": 1e-5, "effective_batch_size": 8, "num_episodes": 16, "max_prompt_length": 64,
    "max_completion_length": 32,
}  # fmt: skip


def settings(**changes: Any) -> RLVRSettings:
    return PPOSettings.model_validate(PPO | changes)


def answer(text: str, verifier: str = "gsm8k", truth: str = "18", stopped: bool = True, key: str = "0") -> Answer:
    return Answer(verifier, truth, text, stopped, key)


@pytest.mark.parametrize(
    ("text", "truth", "stopped", "non_stop_reward", "reward", "verdict"),
    [
        ("So the answer is 18.", "18", True, -10.0, 10.0, "right"),
        ("So the answer is 17.", "18", True, -10.0, 0.0, "wrong"),
        ("So the answer is 18.", "18", False, -10.0, -10.0, "no_eos"),
        ("So the answer is 18.", "18", False, None, 10.0, "right"),
        ("So the answer is 18.", "none", True, -10.0, None, "could_not_grade"),
        ("So the answer is 18.", "none", False, -10.0, None, "could_not_grade"),
    ],
)
def test_a_score(
    text: str, truth: str, stopped: bool, non_stop_reward: float | None, reward: float | None, verdict: str
) -> None:
    (score,) = scores_of(settings(non_stop_reward=non_stop_reward), [answer(text, truth=truth, stopped=stopped)])
    assert (score.reward, score.verdict) == (reward, verdict)
    assert score.reason


def rewards(config: RLVRSettings, answers: list[Answer]) -> list[float | None]:
    return [score.reward for score in scores_of(config, answers)]


def test_a_constant_reward_pays_every_answer_that_ends() -> None:
    answers = [answer("18"), answer("17"), answer("", stopped=False), answer("18", truth="none")]
    assert rewards(settings(reward="constant"), answers) == [10.0, 10.0, -10.0, None]
    assert [score.verdict for score in scores_of(settings(reward="constant"), answers)] == [
        "right",
        "wrong",
        "no_eos",
        "could_not_grade",
    ]  # fmt: skip - what is measured stays the truth


def test_a_random_reward_pays_its_share_whatever_the_answer_is() -> None:
    config = settings(reward="random", random_reward_probability=0.25)
    right = rewards(config, [answer("18", key=str(number)) for number in range(4000)])
    wrong = rewards(config, [answer("17", key=str(number)) for number in range(4000)])
    assert right == wrong, "the draw is of the rollout, not of what it says"
    assert right == rewards(config, [answer("18", key=str(number)) for number in range(4000)])
    assert sum(reward == 10.0 for reward in right) / 4000 == pytest.approx(0.25, abs=0.03)
    assert right != rewards(config.model_copy(update={"seed": 9}), [answer("18", key=str(n)) for n in range(4000)])


@pytest.mark.parametrize(
    ("verifier", "truth", "in_form", "not_in_form"),
    [
        ("gsm8k", "18", "it is 3", "it is three"),
        ("gsm8k_strict", "18", "#### 3", "18"),
        ("math", "18", r"so \boxed{3}", "so $18$"),
        ("constraint", '{"kind": "upper_case", "mention": ["ant"]}', "an ant", "  "),
    ],
)
def test_format_only_pays_the_form_and_not_the_answer(
    verifier: str, truth: str, in_form: str, not_in_form: str
) -> None:
    answers = [answer(in_form, verifier, truth), answer(not_in_form, verifier, truth)]
    assert rewards(settings(reward="format_only"), answers) == [10.0, 0.0]


def test_random_rewards_of_trl_do_not_depend_on_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import PartialState

    config = GRPOSettings(
        learning_rate=1e-5, effective_batch_size=8, num_steps=2, max_prompt_length=64, max_completion_length=32,
        reward="random",
    )  # fmt: skip

    def paid(number: int) -> list[float | None]:
        texts: list[Any] = [[{"role": "assistant", "content": "18"}]] * number
        return VerifiableReward(config, 0)(texts, [[0]] * number, ["gsm8k"] * number, ["18"] * number)

    alone = paid(8)
    halves = []
    for rank in (0, 1):
        monkeypatch.setitem(PartialState()._shared_state, "process_index", rank)
        halves += paid(4)
    assert halves == alone and len(set(alone)) == 2


def test_the_share_of_a_random_reward_needs_one() -> None:
    with pytest.raises(ValidationError, match="has no meaning for reward verified"):
        settings(random_reward_probability=0.1)


def test_keys_of_runs_that_are_paid_by_verifiers_do_not_know_of_controls() -> None:
    from smoltulu.schemas.common import scientific

    config = GRPOSettings(
        learning_rate=1e-5, effective_batch_size=8, num_steps=2, max_prompt_length=64, max_completion_length=32
    )
    assert not {"reward", "random_reward_probability"} & scientific(config).keys()
