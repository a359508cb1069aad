"""Which samples of a prompt become a row. Pure: no files, no model.

Best-of-n takes the best answer that ended by itself; pairs set it against the worst. Answers that say the same count
once, so a draw among right answers is a draw among texts: the likeliest one is not drawn more often than the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smoltulu.schemas.sampled import AnswerLengths, Fate, Outcome, ScoreBar, SelectionRules
from smoltulu.tasks.data.draw import seed_of

#: Bars of the histogram of rewards, and most bars of one for each number of right answers.
_NUM_BARS, _MOST_COUNTS = 20, 16


@dataclass(frozen=True)
class Sample:
    """One answer to a prompt.

    number      among the samples of its prompt
    ended       whether the model ended it
    num_tokens  its end included
    outcome     of the verifier; None: none graded it
    reward      the reward model's score; None: it gave none
    """

    number: int
    text: str
    ended: bool
    num_tokens: int
    outcome: Outcome | None = None
    reward: float | None = None

    @property
    def usable(self) -> bool:
        """Whether it can be an answer of a row at all: text, and none that the stage `dataset` would refuse."""
        return bool(self.text.strip()) and "\0" not in self.text


@dataclass(frozen=True)
class Choice:
    """The answers of a row; without a rejected one for best-of-n."""

    chosen: Sample
    rejected: Sample | None = None


def distinct(samples: Sequence[Sample]) -> list[Sample]:
    """The samples without those that say the same as another one; of these an ended one stays, the first of them."""
    kept: dict[str, Sample] = {}
    for sample in samples:
        before = kept.get(sample.text)
        if before is None or (sample.ended and not before.ended):
            kept[sample.text] = sample
    return sorted(kept.values(), key=lambda sample: sample.number)


def select(prompt: str, samples: Sequence[Sample], rules: SelectionRules) -> tuple[Fate, Choice | None]:
    """What becomes of a prompt, and its row where there is one. prompt: its id, for draws."""
    by_verifier = rules.score == "verifier"
    known = [sample for sample in distinct(samples) if sample.usable]
    if by_verifier and not any(sample.outcome in ("right", "wrong") for sample in known):
        return "ungraded", None
    if by_verifier:
        good = [sample for sample in known if sample.ended and sample.outcome == "right"]
        bad = [sample for sample in known if sample.outcome == "wrong"]
    else:
        bad = [sample for sample in known if sample.reward is not None]
        good = [sample for sample in bad if sample.ended]
    if not good:
        return "nothing_to_choose", None
    chosen = _one(good, rules, f"chosen:{prompt}", best=True)
    if rules.make == "best":
        return "used", Choice(chosen)
    bad = [sample for sample in bad if sample is not chosen and (sample.ended or rules.reject_unended)]
    if not bad:
        return "nothing_to_reject", None
    rejected = _one(bad, rules, f"rejected:{prompt}", best=False)
    if not by_verifier:
        assert chosen.reward is not None and rejected.reward is not None
        margin = chosen.reward - rejected.reward
        if margin <= 0 or margin < rules.min_margin:
            return "too_close", None
    assert chosen.text != rejected.text
    return "used", Choice(chosen, rejected)


def _one(samples: Sequence[Sample], rules: SelectionRules, what: str, best: bool) -> Sample:
    """The best or worst by the reward model, the first of equal ones; or one that is drawn.

    Without a reward it is taken only where none has one.
    """
    if not rules.reads_rewards:
        return samples[seed_of(rules.seed, what) % len(samples)]
    scored = [sample for sample in samples if sample.reward is not None]
    if not scored:
        return samples[seed_of(rules.seed, what) % len(samples)]
    sign = -1 if best else 1
    return min(scored, key=lambda sample: (sign * (sample.reward or 0.0), sample.number))


def row_of(prompt: str, messages: list[dict[str, Any]], choice: Choice) -> dict[str, Any]:
    """The row, as a data source has it. Its id names the prompt and the samples."""
    chosen = {"role": "assistant", "content": choice.chosen.text}
    name = f"{prompt}/{choice.chosen.number}"
    if choice.rejected is None:
        return {"id": name, "messages": [*messages, chosen]}
    rejected = {"role": "assistant", "content": choice.rejected.text}
    return {"id": f"{name}-{choice.rejected.number}", "prompt": messages, "chosen": [chosen], "rejected": [rejected]}


def answer_lengths(choices: Sequence[Choice], num_samples: int, num_tokens: int) -> AnswerLengths:
    """Mean lengths. num_samples, num_tokens: of all samples, chosen or not."""
    pairs = [(one.chosen.num_tokens, one.rejected.num_tokens) for one in choices if one.rejected is not None]
    return AnswerLengths(
        all_samples=num_tokens / num_samples if num_samples else None,
        chosen=_mean([one.chosen.num_tokens for one in choices]),
        rejected=_mean([rejected for _, rejected in pairs]),
        chosen_longer_share=_mean([float(chosen > rejected) for chosen, rejected in pairs]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def length_warning(lengths: AnswerLengths, max_ratio: float) -> str | None:
    """What to say where chosen and rejected answers differ so much in length that length is learned."""
    if not lengths.chosen or not lengths.rejected:
        return None
    ratio = lengths.chosen / lengths.rejected
    if 1 / max_ratio < ratio < max_ratio:
        return None
    longer = "longer" if ratio > 1 else "shorter"
    return (
        f"chosen answers have {lengths.chosen:,.0f} tokens on average and rejected ones {lengths.rejected:,.0f}: what "
        f"is trained on these pairs learns to write {longer} answers, right or not. A loss_type that divides by length "
        "(sigmoid_norm) bears it better; a smaller max_new_tokens or reject_unended: false may even it out"
    )


def right_bars(num_right: Sequence[int], used: Sequence[bool], num_samples: int) -> tuple[ScoreBar, ...]:
    """Prompts by the number of right answers among their samples; `num_chosen`: those that gave a row."""
    if num_samples <= _MOST_COUNTS:
        edges = list(range(num_samples + 1))
    else:  # none and all stand alone
        edges = sorted({0, *(1 + (num_samples - 1) * step // 10 for step in range(10)), num_samples})
    bars = []
    for first, following in zip(edges, [*edges[1:], num_samples + 1], strict=True):
        places = [place for place, count in enumerate(num_right) if first <= count < following]
        last = following - 1
        label = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        made = sum(used[place] for place in places)
        bars.append(ScoreBar(label=f"{label} of {num_samples:,} right", count=len(places), num_chosen=made))
    return tuple(bars)


def reward_bars(rewards: Sequence[float], chosen: Sequence[float], rejected: Sequence[float]) -> tuple[ScoreBar, ...]:
    """Samples by their reward, in bars of one width; of how many each is the chosen or the rejected one."""
    if not rewards:
        return ()
    least, most = min(rewards), max(rewards)
    width = (most - least) / _NUM_BARS
    if width == 0:
        return (ScoreBar(label=f"{least:.3g}", count=len(rewards), num_chosen=len(chosen), num_rejected=len(rejected)),)

    def counts(values: Sequence[float]) -> list[int]:
        found = [0] * _NUM_BARS
        for value in values:
            found[min(int((value - least) / width), _NUM_BARS - 1)] += 1
        return found

    labels = [f"{least + width * bar:.3g} to {least + width * (bar + 1):.3g}" for bar in range(_NUM_BARS)]
    return tuple(
        ScoreBar(label=label, count=count, num_chosen=good, num_rejected=bad)
        for label, count, good, bad in zip(labels, counts(rewards), counts(chosen), counts(rejected), strict=True)
    )
