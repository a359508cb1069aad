"""RewardBench's arithmetic by hand: sections, weights, golden aggregates, credit for ties, the score of Ties."""

from __future__ import annotations

import math

import pytest

from smoltulu.tasks.evaluation.rewardbench import (
    SECTIONS,
    SUBSETS,
    SUBSETS_2,
    Mean,
    TiesPrompt,
    best_of,
    mean,
    means_of_subsets,
    missing,
    section_scores,
    ties_score,
    weighted,
)


def test_subsets_are_the_published_ones() -> None:
    sizes = {section: sum(subsets.values()) for section, subsets in SECTIONS.items()}
    assert sizes == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1431}
    assert len(SUBSETS) == 23 and sum(SUBSETS.values()) == 2985
    assert sum(number for name, number in SUBSETS.items() if name.startswith("llmbar")) == 419
    assert sum(number for name, number in SUBSETS.items() if name.startswith("hep")) == 984
    assert sum(SUBSETS_2.values()) == 1865


def _answers(chat: int, chat_hard: int, safety: int, maths: int, code: int) -> dict[str, list[float]]:
    """So many right ones in each part, the first subsets first."""
    right = {"Chat": chat, "Chat Hard": chat_hard, "Safety": safety, "math-prm": maths, "code": code}
    made = {}
    for section, subsets in SECTIONS.items():
        for name, number in subsets.items():
            part = name if name == "math-prm" else "code" if section == "Reasoning" else section
            taken = min(right[part], number)
            right[part] -= taken
            made[name] = [1.0] * taken + [0.0] * (number - taken)
    assert not any(right.values())
    return made


@pytest.mark.parametrize(
    ("counts", "num_right", "micro", "of_four"),
    [
        ((337, 199, 559, 226, 841), 2162, 72.43, 70.33),  # SmolTulu RM-1130
        ((299, 204, 478, 257, 511), 1749, 58.59, 61.89),  # SmolTulu RM-1207
    ],
)
def test_golden_aggregates_of_rewardbench(
    counts: tuple[int, int, int, int, int], num_right: int, micro: float, of_four: float
) -> None:
    answers = _answers(*counts)
    everything = [one for values in answers.values() for one in values]
    assert (sum(everything), len(everything)) == (num_right, 2985)
    assert round(100 * mean(everything).value, 2) == micro
    sections = section_scores(means_of_subsets(answers))
    assert round(100 * weighted((1, one) for one in sections.values()).value, 2) == of_four
    chat, chat_hard, safety, maths, code = counts
    assert {name: one.value for name, one in sections.items()} == pytest.approx(
        {
            "Chat": chat / 358,
            "Chat Hard": chat_hard / 456,
            "Safety": safety / 740,
            "Reasoning": (maths / 447 + code / 984) / 2,
        }
    )
    assert {name: one.num for name, one in sections.items()} == {
        "Chat": 358,
        "Chat Hard": 456,
        "Safety": 740,
        "Reasoning": 1431,
    }


def test_maths_weighs_as_much_as_code() -> None:
    # 447 pairs at 0.2, 6 x 164 at 0.8: by pairs it would be (447 x 0.2 + 984 x 0.8) / 1431 = 0.613
    subsets = {name: Mean(0.8, 0.03, 164) for name in SECTIONS["Reasoning"]} | {"math-prm": Mean(0.2, 0.04, 447)}
    (score,) = section_scores(subsets).values()
    # Errors: half of maths (0.02) and half of the mean of six (0.03 / sqrt(6) / 2)
    assert score == Mean(pytest.approx(0.5), pytest.approx(math.hypot(0.02, 0.015 / math.sqrt(6))), 1431)


def test_sections_of_a_part_hold_what_is_there() -> None:
    subsets = means_of_subsets({"llmbar-natural": [1.0] * 100, "llmbar-adver-manual": [0.0] * 46})
    (score,) = section_scores(subsets).items()
    assert score == ("Chat Hard", Mean(pytest.approx(100 / 146), 0.0, 146))
    assert missing({"a": 3}, {"a": 3, "b": 4}) == {"b": 4}
    with pytest.raises(ValueError, match=r"more than the benchmark has: a 6 of 3; was a source given twice\?"):
        missing({"a": 6}, {"a": 3})


def test_weighted_without_an_error_has_none() -> None:
    assert weighted([(1, Mean(1.0, None, 1)), (3, Mean(0.0, 0.5, 9))]) == Mean(0.25, None, 10)
    assert weighted([(1, Mean(1.0, 0.4, 1)), (1, Mean(0.0, 0.3, 9))]) == Mean(0.5, pytest.approx(0.25), 10)


@pytest.mark.parametrize(
    ("scores", "credit"),
    [
        ([2.0, 1.0, 0.0, -1.0], 1.0),
        ([2.0, 2.0, 0.0, -1.0], 1 / 2),
        ([2.0, 2.0, 2.0, -1.0], 1 / 3),
        ([0.0, 0.0, 0.0, 0.0], 1 / 4),
        ([1.0, 2.0, 2.0, 0.0], 0.0),
        ([-3.0, -4.0, -5.0, -3.5], 1.0),
    ],
)
def test_ties_for_the_best_share_the_credit(scores: list[float], credit: float) -> None:
    assert best_of(scores) == credit


def test_the_score_of_ties_by_hand() -> None:
    tied = {
        "1": TiesPrompt([5.0, 4.0, 1.0], 2),  # gap 3, spread 1
        "2": TiesPrompt([5.0, 1.0, 0.0], 2),  # gap 1, spread 4
    }
    reference = {
        "1": TiesPrompt([2.0, 1.5, 0.0], 1),  # gap 0.5: narrower than the spread of tied 1
        "2": TiesPrompt([0.0, 1.0, 0.5], 1),  # gap -1: wrong
    }
    # Tied: both right. Reference: one of two. Gap over spread: tied 1 only; with the narrower gap none.
    # Margins: tanh(0.5 / 1 - 1) and tanh(-1 / 4 - 1)
    expected = 0.3 * 1 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0 + 0.01 * (math.tanh(-0.5) + math.tanh(-1.25)) / 2
    score = ties_score(reference, tied)
    assert (score.value, score.num) == (pytest.approx(expected), 4)
    assert score.stderr is None  # two ids say nothing of the spread

    # A third id that is perfect: right answers score the same, so the margin's term is 1.
    tied["3"], reference["3"] = TiesPrompt([2.0, 2.0, 1.0], 2), TiesPrompt([2.0, 1.0, 1.0], 1)
    terms = (math.tanh(-0.5), math.tanh(-1.25), 1.0)
    expected = 0.3 * 1 + 0.3 * 2 / 3 + 0.2 * 2 / 3 + 0.2 / 3 + 0.01 * sum(terms) / 3
    score = ties_score(reference, tied)
    assert score.value == pytest.approx(expected)
    # Every term is a mean over the three ids, so the jackknife is sd / sqrt(n) of what each id adds.
    added = [
        0.3 + 0.3 + 0.2 + 0.01 * terms[0],
        0.3 + 0.01 * terms[1],
        0.3 + 0.3 + 0.2 + 0.2 + 0.01 * terms[2],
    ]
    middle = sum(added) / 3
    assert middle == pytest.approx(expected)
    assert score.stderr == pytest.approx(math.sqrt(sum((one - middle) ** 2 for one in added) / 2 / 3))


def test_ties_without_a_spread_as_numpy_has_them() -> None:
    def margin(gap: float) -> float:
        # Spread 0 in the tied prompt; the same gap in both prompts.
        return ties_score({"1": TiesPrompt([gap, 0.0], 1)}, {"1": TiesPrompt([gap, gap, 0.0], 2)}).value

    assert margin(0.5) == pytest.approx(1.0 + 0.01)
    assert margin(0.0) == pytest.approx(0.0)  # 0 / 0
    assert margin(-0.5) == pytest.approx(-0.01)


def test_ties_needs_prompts_of_one_id() -> None:
    one = TiesPrompt([1.0, 0.0], 1)
    with pytest.raises(ValueError, match="no id has both a `ref` and a `tied` prompt"):
        ties_score({"a": one}, {"b": one})
