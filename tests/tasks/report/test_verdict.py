"""The verdict in words, computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from smoltulu.schemas.verdict import ModelComparison, ScoreChange, Verdict
from smoltulu.tasks.report.verdict import headline, sentence, sentences, signed, tone


def change(task: str, kind: str, difference: float | None = None, stderr: float = 0.0, **more: Any) -> ScoreChange:
    tested = {} if difference is None else {"difference": difference, "stderr": stderr, "p_value": 0.5, "adjusted": 0.5}
    fixed = {"task": task, "metric": "acc,none", "before": 0.5, "after": 0.5, "is_share": True}
    return ScoreChange.model_validate(fixed | {"change": kind} | tested | more)


def pair(before: str, after: str, *changes: ScoreChange) -> ModelComparison:
    return ModelComparison(before=before, after=after, changes=changes)


RLVR = pair("dpo", "rlvr", change("verified_sampled", "gain", 0.0612, 0.0058), change("greedy", "within noise", 0.002))
OF_BASE = pair("base_model", "rlvr", change("greedy", "gain", 0.3, 0.01), change("other", "drop", -0.024, 0.004))
NONE = pair(
    "base_model", "sft",
    change("greedy", "not comparable", reason="another chat template: none -> ab"),
    change("verified_sampled", "not comparable", reason="was not measured before"),
)  # fmt: skip


def test_a_sentence_says_what_changed_by_how_much_and_what_cannot_be_told() -> None:
    assert sentence(RLVR) == ("RLVR over DPO", "sampled +6.1 ± 0.6, greedy not distinguishable")
    assert sentence(OF_BASE) == ("RLVR over Base model", "greedy +30.0 ± 1.0, other −2.4 ± 0.4")
    alike = pair("sft", "dpo", *(change(name, "same", 0.0) for name in "abc"), change("d", "within noise", 0.0))
    assert sentence(alike)[1] == "d not distinguishable, a, b and c alike on every item"


def test_where_nothing_could_be_compared_nothing_is_claimed() -> None:
    assert sentence(NONE)[1] == (
        "nothing could be compared (greedy not comparable (another chat template: none -> ab); "
        "sampled not measured for Base model)"
    )
    verdict = Verdict(measured=("base_model", "sft"), comparisons=(NONE,))
    assert headline(verdict) == "SFT could not be compared with Base model." and tone(verdict) == "muted"
    alone = Verdict(measured=("sft",))
    assert headline(alone) == "Only SFT has been measured: there is no other model of this run to compare it with."
    assert headline(Verdict()) == "No language model has been measured, so nothing can be said of one."
    assert "better" not in headline(verdict) + headline(alone) + headline(Verdict())


@pytest.mark.parametrize(
    ("changes", "words", "colour"),
    [
        (("gain", "within noise"), "RLVR is better than DPO on 1 of 2 scores.", "good"),
        (("gain", "drop", "same"), "RLVR is better than DPO on 1 of 3 scores and worse on 1.", "warn"),
        (("drop",), "RLVR is worse than DPO on 1 of 1 score.", "bad"),
        (("same", "within noise"), "RLVR cannot be told from DPO on 2 scores.", "muted"),
        (("gain", "not comparable"), "RLVR is better than DPO on 1 of 1 score.", "good"),
    ],
)
def test_the_headline_counts(changes: tuple[str, ...], words: str, colour: str) -> None:
    made = [change(str(i), kind, None if kind == "not comparable" else 0.1) for i, kind in enumerate(changes)]
    verdict = Verdict(measured=("dpo", "rlvr"), comparisons=(pair("dpo", "rlvr", *made),))
    assert (headline(verdict), tone(verdict)) == (words, colour)


def test_the_last_model_is_told_first() -> None:
    verdict = Verdict(measured=("base_model", "sft", "dpo", "rlvr"), comparisons=(NONE, RLVR, OF_BASE))
    assert [which for which, _ in sentences(verdict)] == [
        "RLVR over DPO",
        "RLVR over Base model",
        "SFT over Base model",
    ]
    assert headline(verdict) == (
        "RLVR is better than DPO on 1 of 2 scores and is better than Base model on 1 of 2 scores and worse on 1."
    )


@pytest.mark.parametrize(
    ("difference", "stderr", "is_share", "words"),
    [
        (0.0612, 0.0058, True, "+6.1 ± 0.6"),
        (-0.0004, 0.0001, True, "−0.04 ± 0.01"),  # not −0.0
        (0.0, 0.0, True, "0.0 ± 0.0"),
        (-0.151, 0.0012, False, "−0.151 ± 0.001"),
    ],
)
def test_a_difference_that_is_not_nothing_never_reads_as_nothing(
    difference: float, stderr: float, is_share: bool, words: str
) -> None:
    assert signed(change("a", "gain", difference, stderr, is_share=is_share)) == words


def test_near_chance_is_said() -> None:
    one = pair("sft", "dpo", change("greedy", "gain", 0.02, 0.005, is_near_chance=True))
    assert sentence(one)[1] == "greedy (both near chance) +2.0 ± 0.5"
