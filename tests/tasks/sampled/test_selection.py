"""Which samples become a row: by hand, and what must hold of any samples."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltulu.schemas.sampled import AnswerLengths, SelectionRules
from smoltulu.tasks.sampled.selection import (
    Choice,
    Sample,
    answer_lengths,
    distinct,
    length_warning,
    reward_bars,
    right_bars,
    row_of,
    select,
)


def rules(**changes: Any) -> SelectionRules:
    return SelectionRules(**{"score": "verifier", "make": "pairs", **changes})


def samples(*given: tuple[Any, ...]) -> list[Sample]:
    """(text, outcome or reward, ended): numbered in order, two tokens a letter."""
    made = []
    for number, (text, worth, *ended) in enumerate(given):
        scored = {"outcome": worth} if isinstance(worth, str) else {"reward": worth}
        made.append(Sample(number, text, ended[0] if ended else True, 2 * len(text), **scored))
    return made


def chosen(given: list[Sample], of: SelectionRules, prompt: str = "0:0") -> Any:
    """Numbers of the answers, or what became of the prompt."""
    fate, choice = select(prompt, given, of)
    if choice is None:
        return fate
    return choice.chosen.number if choice.rejected is None else (choice.chosen.number, choice.rejected.number)


def test_by_the_verifier() -> None:
    mixed = samples(("a", "wrong"), ("b", "right"), ("c", "could_not_grade"))
    assert chosen(mixed, rules()) == (1, 0)
    assert chosen(mixed, rules(make="best")) == 1
    assert chosen(samples(("a", "wrong"), ("b", "wrong")), rules()) == "nothing_to_choose"
    assert chosen(samples(("a", "right"), ("b", "right")), rules()) == "nothing_to_reject"
    # What could not be graded is neither; where nothing could be, that is said.
    assert chosen(samples(("a", "right"), ("b", "could_not_grade")), rules()) == "nothing_to_reject"
    assert chosen(samples(("a", "could_not_grade")), rules(make="best")) == "ungraded"


def test_what_did_not_end_is_never_chosen_and_rejected_where_the_rules_say_so() -> None:
    cut = samples(("a", "right", False), ("b", "wrong", False))
    assert chosen(cut, rules()) == "nothing_to_choose" == chosen(cut, rules(make="best"))
    one_ends = samples(("a", "right"), ("b", "wrong", False), ("c", "right", False))
    assert chosen(one_ends, rules()) == (0, 1)  # not 2: it may be right
    assert chosen(one_ends, rules(reject_unended=False)) == "nothing_to_reject"
    by_reward = samples(("a", 3.0, False), ("b", 2.0), ("c", 1.0, False))
    assert chosen(by_reward, rules(score="reward_model")) == (1, 2)
    assert chosen(by_reward, rules(score="reward_model", reject_unended=False)) == "nothing_to_reject"


def test_by_the_reward_model() -> None:
    by_reward = rules(score="reward_model")
    given = samples(("a", 1.0), ("b", 2.5), ("c", 2.5), ("d", -1.0))
    assert chosen(given, by_reward) == (1, 3)  # the first of equal ones
    assert chosen(given, rules(score="reward_model", make="best")) == 1
    assert chosen(given, rules(score="reward_model", min_margin=3.5)) == (1, 3)
    assert chosen(given, rules(score="reward_model", min_margin=3.6)) == "too_close"
    assert chosen(samples(("a", 1.0), ("b", 1.0)), by_reward) == "too_close"
    assert chosen(samples(("a", 1.0)), by_reward) == "nothing_to_reject"
    assert chosen(samples(("a", None), ("b", None)), by_reward) == "nothing_to_choose"
    # The best is cut off, and the only one that ends is the worst.
    assert chosen(samples(("a", 2.0, False), ("b", 1.0)), by_reward) == "too_close"


def test_the_reward_model_decides_among_right_and_among_wrong_ones() -> None:
    given = [
        Sample(0, "a", True, 1, "right", 1.0), Sample(1, "b", True, 1, "right", 2.0),
        Sample(2, "c", True, 1, "wrong", 9.0), Sample(3, "d", True, 1, "wrong", 8.0),
        Sample(4, "e", True, 1, "right", None),
    ]  # fmt: skip
    assert chosen(given, rules(ties="reward_model")) == (1, 3)
    # Without a reward only where there is no other.
    assert chosen([given[4], given[2]], rules(ties="reward_model")) == (4, 2)


def test_equals_are_drawn_by_seed_and_prompt_and_every_text_has_one_chance() -> None:
    given = samples(*[("often", "right")] * 9, ("once", "right"), ("never", "wrong"))
    drawn = [chosen(given, rules(), f"0:{prompt}")[0] for prompt in range(400)]
    assert set(drawn) == {0, 9} and 150 < drawn.count(9) < 250
    assert drawn == [chosen(given, rules(), f"0:{prompt}")[0] for prompt in range(400)]
    assert drawn != [chosen(given, rules(seed=1), f"0:{prompt}")[0] for prompt in range(400)]


def test_answers_that_say_the_same_count_once() -> None:
    given = samples(("a", "right", False), ("b", "wrong"), ("a", "right"), ("a", "right"))
    assert [sample.number for sample in distinct(given)] == [1, 2]  # the one that ended
    for text in ("", " \n", "nul\0"):
        assert chosen(samples((text, "right"), ("b", "wrong")), rules()) == "nothing_to_choose"
        assert chosen(samples(("a", "right"), (text, "wrong")), rules()) == "nothing_to_reject"


def test_rows() -> None:
    asked = [{"role": "user", "content": "?"}]
    good, bad = samples(("yes", "right"), ("no", "wrong"))
    assert row_of("0:7", asked, Choice(bad)) == {
        "id": "0:7/1", "messages": [*asked, {"role": "assistant", "content": "no"}],
    }  # fmt: skip
    assert row_of("0:7", asked, Choice(good, bad)) == {
        "id": "0:7/0-1", "prompt": asked,
        "chosen": [{"role": "assistant", "content": "yes"}], "rejected": [{"role": "assistant", "content": "no"}],
    }  # fmt: skip


def test_lengths() -> None:
    one, two, three = samples(("a", "right"), ("bb", "wrong"), ("ccc", "right"))
    assert answer_lengths([Choice(one, two), Choice(three, two)], 10, 50) == AnswerLengths(
        all_samples=5.0, chosen=4.0, rejected=4.0, chosen_longer_share=0.5
    )
    assert answer_lengths([Choice(one)], 1, 2) == AnswerLengths(all_samples=2.0, chosen=2.0)
    assert length_warning(AnswerLengths(chosen=100.0), 1.25) is None
    assert length_warning(AnswerLengths(chosen=100.0, rejected=81.0), 1.25) is None
    longer, shorter = (length_warning(AnswerLengths(chosen=c, rejected=r), 1.25) for c, r in ((100, 80), (80, 100)))
    assert longer is not None and "100 tokens on average and rejected ones 80" in longer and "longer" in longer
    assert shorter is not None and "shorter" in shorter


def test_histograms() -> None:
    bars = right_bars([0, 0, 2, 1, 2], [False, False, True, True, False], 2)
    assert [(bar.label, bar.count, bar.num_chosen) for bar in bars] == [
        ("0 of 2 right", 2, 0), ("1 of 2 right", 1, 1), ("2 of 2 right", 2, 1),
    ]  # fmt: skip
    many = right_bars([0, 1, 50, 99, 100, 100], [True] * 6, 100)
    assert many[0].label == "0 of 100 right" and many[-1].label == "100 of 100 right"
    assert sum(bar.count for bar in many) == 6 and len(many) == 12 and many[-1].count == 2
    rewards = reward_bars([0.0, 1.0, 2.0], chosen=[2.0], rejected=[0.0])
    assert [bar.count for bar in rewards].count(1) == 3 and sum(bar.count for bar in rewards) == 3
    assert rewards[-1].num_chosen == 1 and rewards[0].num_rejected == 1 and rewards[0].label == "0 to 0.1"
    (flat,) = reward_bars([1.5, 1.5], [1.5], [])
    assert (flat.label, flat.count) == ("1.5", 2)
    assert reward_bars([], [], []) == ()


ANY_SAMPLES = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", "d", "", " "]),
        st.booleans(),
        st.sampled_from(["right", "wrong", "could_not_grade"]),
        st.one_of(st.none(), st.integers(-2, 2).map(float)),
    ),
    max_size=8,
).map(lambda given: [Sample(n, text, ended, n + 1, out, reward) for n, (text, ended, out, reward) in enumerate(given)])
ANY_RULES = st.one_of(
    st.builds(rules, make=st.sampled_from(["best", "pairs"]), ties=st.sampled_from(["draw", "reward_model"])),
    st.builds(rules, reject_unended=st.booleans()),
    st.builds(rules, score=st.just("reward_model"), min_margin=st.sampled_from([0.0, 1.0, 2.0])),
    st.builds(rules, score=st.just("reward_model"), make=st.just("best")),
)


@given(ANY_SAMPLES, ANY_RULES)
def test_the_chosen_answer_is_better_and_ended_and_says_something_else(given: list[Sample], of: SelectionRules) -> None:
    fate, choice = select("0:1", given, of)
    assert (fate == "used") == (choice is not None)
    if choice is None:
        return
    good, bad = choice.chosen, choice.rejected
    assert good in given and good.ended and good.text.strip()
    if of.score == "verifier":
        assert good.outcome == "right"
    else:
        assert good.reward is not None
        assert good.reward == max(
            one.reward for one in distinct(given) if one.ended and one.usable and one.reward is not None
        )
    assert (bad is None) == (of.make == "best")
    if bad is not None:
        assert bad in given and bad.text.strip() and bad.text != good.text and (bad.ended or of.reject_unended)
        if of.score == "verifier":
            assert bad.outcome == "wrong"
        else:
            assert bad.reward is not None and good.reward is not None
            assert good.reward > bad.reward and good.reward - bad.reward >= of.min_margin


@given(ANY_SAMPLES, ANY_RULES, st.randoms(use_true_random=False))
def test_the_order_of_the_samples_changes_nothing_but_which_of_equal_texts_is_named(
    given: list[Sample], of: SelectionRules, chance: Any
) -> None:
    """Equal texts have equal worth, as verifiers and reward models give it."""
    worth = {one.text: one for one in given}
    same = [
        Sample(one.number, one.text, True, one.num_tokens, worth[one.text].outcome, worth[one.text].reward)
        for one in given
    ]
    fate, _ = select("0:1", same, of)
    chance.shuffle(same)
    assert select("0:1", same, of)[0] == fate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "reward_model", "ties": "reward_model"}, "ties reward_model is for score verifier"),
        ({"min_margin": 0.5}, "min_margin 0.5 is a difference of the reward model's scores"),
        ({"score": "reward_model", "make": "best", "min_margin": 1}, "has no meaning for score reward_model and make"),
        ({"make": "best", "reject_unended": False}, "make is best, which rejects nothing"),
        ({"max_length_ratio": 1.0}, "greater than 1"),
    ],
)
def test_rules_without_a_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rules(**changes)
