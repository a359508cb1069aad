"""Rewards of rollouts from the verdicts of their verifiers; the same for every algorithm of RLVR.

`rlvr.reward` other than `verified` is a control: it pays for something else than right answers, so a gain under it does
not come from them (Spurious Rewards, arXiv 2506.10947). All else stays, the reward of a rollout without eos too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from smoltulu.schemas.rlvr import RLVRSettings
from smoltulu.tasks.models.tokens import Messages
from smoltulu.tasks.verifiers import Verdict as GradedAnswer
from smoltulu.tasks.verifiers import canonical_name, grade, grade_all

#: What became of a rollout. Of one that is not graded there is no reward: it is in no loss, and counted.
Verdict = Literal["right", "wrong", "no_eos", "could_not_grade"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

#: Verifier -> the form in which it reads an answer (verifiers/exact.py), for `format_only`. Others read any text.
_FORMS = {"gsm8k": "number", "gsm8k_strict": "hash", "math": "boxed"}


@dataclass(frozen=True)
class Answer:
    """A rollout to be scored.

    text  what the model wrote, without the token that ended it
    key   what is its own among all rollouts of a run, whatever process wrote it: the draw of a random reward
    """

    verifier: str
    ground_truth: str
    text: str
    stopped: bool
    key: str


@dataclass(frozen=True)
class Score:
    """Reward of one rollout (None: could not be graded), what it was given for, and why in words."""

    reward: float | None
    verdict: Verdict
    reason: str = ""


def shown(score: Score) -> str:
    """The verdict for a reader."""
    return f"{score.verdict} ({score.reason})" if score.reason else score.verdict


def scores_of(config: RLVRSettings, answers: Sequence[Answer]) -> list[Score]:
    """Rewards and verdicts of rollouts, in their order. Nothing that a model wrote makes it raise."""
    graded = grade_all((one.verifier, one.text, one.ground_truth) for one in answers)
    paid = _paid(config, answers, graded)
    return [
        score_of(config, answer, verdict, is_paid)
        for answer, verdict, is_paid in zip(answers, graded, paid, strict=True)
    ]


def score_of(config: RLVRSettings, answer: Answer, graded: GradedAnswer, is_paid: bool) -> Score:
    """The reward of one rollout.

    A truth that nobody can grade says nothing about an answer. Else an answer that never ends gets `non_stop_reward`
    in place of its own, as in Tulu 3.
    """
    if graded.outcome == "could_not_grade":
        return Score(None, "could_not_grade", graded.reason)
    if not answer.stopped and config.non_stop_reward is not None:
        return Score(
            config.non_stop_reward, "no_eos", f"it does not end within {config.max_completion_length:,} tokens"
        )
    return Score(config.reward_correct if is_paid else 0.0, graded.outcome, graded.reason)


def _paid(config: RLVRSettings, answers: Sequence[Answer], graded: Sequence[GradedAnswer]) -> list[bool]:
    """Which answers earn `reward_correct`."""
    if config.reward == "verified":
        return [verdict.outcome == "right" for verdict in graded]
    if config.reward == "constant":
        return [True] * len(answers)
    if config.reward == "random":
        share = config.random_reward_probability
        return [random.Random(f"{config.seed}/reward/{answer.key}").random() < share for answer in answers]
    return [_is_in_form(answer) for answer in answers]


def _is_in_form(answer: Answer) -> bool:
    form = _FORMS.get(canonical_name(answer.verifier).partition("@")[0])
    return bool(answer.text.strip()) if form is None else grade("format", answer.text, form).outcome == "right"


class VerifiableReward:
    """The rewards as a TRL reward function, which remembers the scores of its last call.

    `eos_token_id`: every token that ends a completion.
    """

    __name__ = "verifiable_reward"

    def __init__(self, config: RLVRSettings, eos_token_id: int | list[int]) -> None:
        self.config = config
        self.stops = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
        self.answers: list[Answer] = []
        self.scores: list[Score] = []
        #: Adds the reward model's scores of (prompts, ids of completions, answers), where they count.
        self.add: Callable[[list[Messages], list[list[int]], list[Answer], list[Score]], list[Score]] | None = None

    def __call__(
        self,
        completions: list[list[dict[str, str]]],
        completion_ids: list[list[int]],
        verifier: list[str],
        ground_truth: list[str],
        trainer_state: Any = None,
        **columns: Any,
    ) -> list[float | None]:
        """Rewards of this process's rollouts; `completions` are lists of one assistant message."""
        from accelerate import PartialState

        step = trainer_state.global_step if trainer_state is not None else 0
        first = PartialState().process_index * len(completions)  # its place among those of all processes
        self.answers = [
            Answer(name, truth, completion[0]["content"], bool(ids) and ids[-1] in self.stops, f"{step}/{place}")
            for place, (completion, ids, name, truth) in enumerate(
                zip(completions, completion_ids, verifier, ground_truth, strict=True), first
            )
        ]
        self.scores = scores_of(self.config, self.answers)
        if self.add is not None:
            self.scores = self.add(columns["prompts"], completion_ids, self.answers, self.scores)
        return [score.reward for score in self.scores]
