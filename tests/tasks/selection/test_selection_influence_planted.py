"""Planted rows: lookups among ordinary rows, scored by a model whose weights make it copy and nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from smoltulu.tasks.selection.scores_file import RowScore
from smoltulu.tasks.world.lookups import WORD_LISTS, as_line, as_object, draw_pairs
from tests.induction_model import lookup_model
from tests.small_runs import turn
from tests.tasks.selection.scored import scored

WORDS = [word for words in WORD_LISTS for word in words]
COPYING = (2, 3)
HEADS = [(1, head) for head in COPYING]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lookup_model(tmp_path_factory.mktemp("model"), COPYING)


def _words(rng: random.Random, *counts: int) -> list[str]:
    """Texts of so many words each. No two words stand beside each other twice, so nothing can be copied."""
    chosen = [rng.choice(WORDS)]
    beside: set[tuple[str, str]] = set()
    while len(chosen) < sum(counts):
        pair = (chosen[-1], rng.choice(WORDS))
        if pair not in beside:
            beside.add(pair)
            chosen.append(pair[1])
    ends = list(accumulate(counts))
    return [" ".join(chosen[end - count : end]) for end, count in zip(ends, counts, strict=True)]


def lookup(rng: random.Random, num_pairs: int = 5, num_asked: int = 2) -> tuple[str, str]:
    """A question that only copying can answer."""
    pairs = draw_pairs(rng, num_pairs, key_length=3)
    return as_object(pairs), "\n".join(as_line(pair) for pair in rng.sample(pairs, num_asked))


def prose(rng: random.Random, num_asked: int = 12, num_answered: int = 12) -> tuple[str, str]:
    """Words of one kind in question and answer."""
    question, answer = _words(rng, num_asked, num_answered)
    return question, answer


def repeated(rng: random.Random, times: int) -> tuple[str, str]:
    """A question said again and again, and an answer that says something else."""
    question, answer = prose(rng, 8, 12)
    return "\n".join([question] * times), answer


def _scores(folder: Path, model: Path, rows: Sequence[tuple[str, str]], **settings: Any) -> list[RowScore]:
    made = [
        {"id": f"0:{number}", "messages": [turn("user", question), turn("assistant", answer)]}
        for number, (question, answer) in enumerate(rows)
    ]
    lines, outputs, _ = scored(folder, model, made, **{"heads": HEADS, "max_length": 500} | settings)
    assert outputs.num_unscored_rows == 0
    return lines


def _values(lines: Sequence[RowScore]) -> list[float]:
    return [line.score if line.score is not None else float("nan") for line in lines]


def test_lookups_rank_on_top_of_their_domain(tmp_path: Path, model: Path) -> None:
    rng = random.Random(0)
    rows = [prose(rng, rng.randint(5, 60), rng.randint(5, 40)) for _ in range(18)]
    planted = rng.sample(range(24), 6)
    for place in sorted(planted):
        rows.insert(place, lookup(rng, rng.randint(3, 8), rng.randint(1, 3)))
    scores = _values(_scores(tmp_path, model, rows))
    ranking = sorted(range(24), key=lambda row: -scores[row])
    assert set(ranking[:6]) == set(planted)
    assert scores[ranking[5]] > 0.3 and scores[ranking[6]] < 0.1
    # Heads that copy nothing give no such ranking: it is these heads that do it.
    others = _values(_scores(tmp_path / "others", model, rows, heads=[(0, 2), (1, 0)]))
    assert max(map(abs, others)) < 1e-5


def test_a_ranking_over_all_returns_one_domain(tmp_path: Path, model: Path) -> None:
    """A source of lookups beside one of prose with a few: the best fifth of all is of the first alone."""
    rng = random.Random(1)
    lookups = _scores(tmp_path / "lookups", model, [lookup(rng, 6, 3) for _ in range(10)])
    halves = [
        (question, f"{answer} {_words(rng, 12)[0]}") for question, answer in (lookup(rng, 3, 1), lookup(rng, 3, 1))
    ]
    other = _scores(tmp_path / "mixed", model, [prose(rng) for _ in range(8)] + halves)
    everything = [(score, "lookups") for score in _values(lookups)] + [(score, "mixed") for score in _values(other)]
    assert {domain for _, domain in sorted(everything)[-4:]} == {"lookups"}
    # Within its domain the half of a lookup is the best that there is.
    best = sorted(range(10), key=lambda row: -_values(other)[row])[:2]
    assert set(best) == {8, 9}


def test_length_and_repetition_alone_win_nothing(tmp_path: Path, model: Path) -> None:
    """Length-matched: a row ten times as long is not better, and a lookup beats every other row of its length."""
    rng = random.Random(2)
    kinds = {
        "lookups": [lookup(rng, num_pairs, 2) for num_pairs in (2, 7, 20)],
        "prose": [prose(rng, num_asked, 10) for num_asked in (20, 80, 220)],
        "repeated": [repeated(rng, times) for times in (3, 10, 28)],
        "long answers": [prose(rng, 4, num_answered) for num_answered in (20, 80, 220)],
    }
    lines = {name: _scores(tmp_path / name.replace(" ", "-"), model, rows) for name, rows in kinds.items()}
    for number in range(3):
        lengths = [own[number].num_tokens for own in lines.values()]
        assert max(lengths) < 1.5 * min(lengths), lengths  # of about one length
        found = {name: _values(own)[number] for name, own in lines.items()}
        assert found["lookups"] > 0.3 and max(found["prose"], found["repeated"], found["long answers"]) < 0.1
    for name in ("prose", "repeated", "long answers"):
        shortest, _, longest = lines[name]
        assert longest.num_tokens > 3 * shortest.num_tokens
        assert abs((longest.score or 0) - (shortest.score or 0)) < 0.1, name
    assert lines["repeated"][2].repetition > 0.9


def test_an_answer_that_repeats_itself_is_copied_too(tmp_path: Path, model: Path) -> None:
    """What the score cannot tell from a lookup: so the file has the repetition beside it, and the report shows it."""
    rng = random.Random(3)
    question, answer = prose(rng, 8, 8)
    rows = [(question, " ".join([answer] * 8)), prose(rng, 8, 64)]
    again, plain = _scores(tmp_path, model, rows)
    assert again.num_tokens == plain.num_tokens and (again.score or 0) > 0.3 > 0.1 > (plain.score or 0)
    assert again.repetition > 0.7 and plain.repetition == 0


def test_influence_grows_with_what_is_copied(tmp_path: Path, model: Path) -> None:
    """Rows of one length, in which none, one, two, three of three answers are in the object."""
    rng = random.Random(4)
    rows: list[tuple[str, str]] = []
    for num_copied in (0, 1, 2, 3) * 3:
        pairs, strangers = (draw_pairs(rng, 6, key_length=3) for _ in range(2))
        rows.append((as_object(pairs), "\n".join(map(as_line, pairs[:num_copied] + strangers[num_copied:3]))))
    scores = _values(_scores(tmp_path, model, rows))
    by_copied = [mean(scores[place] for place in range(copied, 12, 4)) for copied in range(4)]
    assert by_copied == sorted(by_copied) and by_copied[3] > by_copied[0] + 0.3


def test_steps_are_ranked_by_what_they_copy(tmp_path: Path, model: Path) -> None:
    rng = random.Random(5)
    question, answer = lookup(rng, 5, 1)
    rows = [(question, f"{prose(rng)[0]}\n\n{answer}\n\n{prose(rng)[0]}")]
    (line,) = _scores(tmp_path, model, rows, by="step")
    scores: list[Any] = [part.score for part in line.parts]
    assert len(scores) == 3 and scores[1] == max(scores) > 0.3
