"""Mixtures and held-out rows: counts and draws by hand, files as wholes, and what a recipe's keys make of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.data import DataSet
from smoltulu.schemas.mixture import MixtureConfig, MixtureInputs, MixtureOutputs, MixtureRule
from smoltulu.tasks.data import mixture_stage
from smoltulu.tasks.data.held_out import HELD_OUT, LEFT_OUT, TRAINED, asked, split
from smoltulu.tasks.data.mixture import counts, draw, splitmix64
from smoltulu.tasks.stage import StageContext
from tests.rows_file import read_rows, write_rows

LABELS = ("a", "b", "c", "d")


def rules(*given: dict[str, Any]) -> list[MixtureRule]:
    return [MixtureRule(**one) for one in given]


# --- How many --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked_for", "there", "expected"), [
    ([{}, {}], [10, 20], [10, 20]),
    ([{"repeats": 2}, {}], [10, 20], [20, 20]),
    ([{"repeats": 0.25}, {"repeats": 2.5}], [10, 3], [3, 8]),  # 2.5 and 7.5, halves up
    ([{"num_rows": 4}, {}], [10, 20], [4, 20]),
    ([{"num_rows": 25, "max_repeats": 3}, {}], [10, 20], [25, 20]),
    # 70 rows are 0.7 of a set of 100.
    ([{"share": 0.3}, {}], [50, 70], [30, 70]),
    ([{"share": 0.3}, {"share": 0.2}, {"repeats": 2}], [50, 50, 25], [30, 20, 50]),
    ([{"share": 0.5, "max_repeats": 2}, {}], [10, 20], [20, 20]),
    # All have one: 0.25 of 40 is all that the first has.
    ([{"share": 0.25}, {"share": 0.75}], [10, 70], [10, 30]),
    ([{"weight": 1}, {"weight": 3}], [10, 70], [10, 30]),
    ([{"weight": 5}, {"weight": 5}], [10, 70], [10, 10]),
    # Twice at most: 20 of the first; a set of 80.
    ([{"weight": 1, "max_repeats": 2}, {"weight": 3}], [10, 70], [20, 60]),
    # As often as is needed, and no further: the set ends with the second's last row.
    ([{"weight": 1, "max_repeats": 100}, {"weight": 3, "max_repeats": 100}], [10, 90], [30, 90]),
    ([{"share": 0.1}, {"share": 0.2}, {"share": 0.7}], [1000, 1000, 1000], [143, 286, 1000]),
])  # fmt: skip
def test_rows_of_each_source(asked_for: list[dict[str, Any]], there: list[int], expected: list[int]) -> None:
    assert counts(rules(*asked_for), there, LABELS[: len(there)]) == expected


@pytest.mark.parametrize(("asked_for", "there", "said"), [
    ([{"num_rows": 11}, {}], [10, 20], r"a: num_rows 11, and 10 are there.*\(max_repeats of at least 1\.1\)"),
    ([{"share": 0.5}, {}], [10, 20], r"a: share 0\.5 of a set of 40 rows is 20 rows, and 10 are there"),
    ([{"share": 0.5, "max_repeats": 1.5}, {}], [10, 20], r"max_repeats of at least 2\)"),
    ([{"num_rows": 1334}, {}], [1000, 20], r"max_repeats of at least 1\.34\)"),  # 1.33 would be refused again
    ([{"repeats": 0.01}, {}], [10, 20], r"a: repeats 0\.01 of its 10 rows is none"),
    ([{"share": 0.5}, {}], [10, 0], "b: no row is left of it"),
])  # fmt: skip
def test_what_cannot_be_made(asked_for: list[dict[str, Any]], there: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        counts(rules(*asked_for), there, LABELS[: len(there)])


@pytest.mark.parametrize(("given_one", "given_other", "said"), [
    ({"repeats": 2, "share": 0.5}, {}, "repeats 2 and share 0.5 are two answers"),
    ({"repeats": 2, "max_repeats": 3}, {}, "max_repeats 3 bounds num_rows, share or weight"),
    ({"max_repeats": 3}, {}, "none of them is given"),
    ({"held_out": 0.1, "num_held_out": 3}, {}, "held_out 0.1 and num_held_out 3 are two answers"),
    ({"weight": 1}, {}, "1 of 2 sources have one"),
    ({"weight": 1}, {"share": 0.5}, "1 of 2 sources have one"),
    ({"share": 0.4}, {"share": 0.5}, "add up to 0.9, not to 1"),
    ({"share": 1}, {}, "leaves nothing to the sources without one"),
    ({"repeats": 0}, {}, "greater than 0"),
    ({"held_out": 1}, {}, "less than 1"),
])  # fmt: skip
def test_contradictions_are_refused(given_one: dict[str, Any], given_other: dict[str, Any], said: str) -> None:
    source = {"path": "x.jsonl", "format": "messages"}
    with pytest.raises(ValidationError, match=said):
        DataSet.model_validate({"sources": [source | given_one, source | given_other]})


def test_a_seed_that_draws_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="seed 3 draws the rows of a mixture, and no source has"):
        DataSet.model_validate({"sources": [{"path": "x.jsonl", "format": "messages"}], "seed": 3})


# --- Which ------------------------------------------------------------------------------------------------------------


def test_splitmix64_is_the_published_one() -> None:
    """First numbers of the generator with seed 1234567 (Rosetta Code, from Vigna's splitmix64.c)."""
    assert splitmix64(1234567, np.arange(1, 4)).tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423,
    ]  # fmt: skip


def names(wanted: list[int], num_rows: list[int], seed: int = 0) -> list[tuple[int, int, int]]:
    """(source, number, time) of every row that is drawn, in order."""
    sources = np.repeat(np.arange(len(num_rows)), num_rows)
    numbers = np.concatenate([np.arange(count) for count in num_rows])
    made = draw(seed, sources, numbers, wanted)
    return [(int(sources[p]), int(numbers[p]), int(t)) for p, t in zip(made.places, made.times, strict=True)]


FROZEN = [(0, 2, 1), (1, 1, 1), (0, 1, 1), (1, 0, 2), (1, 0, 1)]


def test_a_draw_is_the_same_on_every_machine() -> None:
    """Frozen: another order would be another training under the same key."""
    assert names([2, 3], [4, 2]) == FROZEN
    assert names([2, 3], [4, 2], seed=1) != FROZEN


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.data(), st.integers(0, 2**31))
def test_more_contain_fewer_in_the_same_order(num_rows: list[int], data: st.DataObject, seed: int) -> None:
    fewer = [data.draw(st.integers(1, 3 * count)) for count in num_rows]
    more = [count + data.draw(st.integers(0, 40)) for count in fewer]
    few, many = names(fewer, num_rows, seed), names(more, num_rows, seed)
    assert [sum(one[0] == source for one in few) for source in range(len(num_rows))] == fewer
    assert len(set(many)) == len(many), "each time of a row once"
    assert [one for one in many if one in set(few)] == few
    for source, number, _ in few:  # whole rounds: no row is there twice more than another
        times = Counter(row[1] for row in few if row[0] == source)
        assert max(times.values()) - (min(times.values()) if len(times) == num_rows[source] else 0) <= 1
        assert sorted(row[2] for row in few if row[:2] == (source, number)) == list(range(1, times[number] + 1))


def test_a_source_is_drawn_alike_whatever_else_is_there() -> None:
    with_others, alone = names([5, 7, 9], [10, 10, 10]), names([1, 7, 2], [10, 10, 40])
    assert {one for one in with_others if one[0] == 1} == {one for one in alone if one[0] == 1}


# --- Held out ---------------------------------------------------------------------------------------------------------


def fates(asked_for: list[dict[str, Any]], texts: list[list[int]]) -> list[list[int]]:
    sources = np.repeat(np.arange(len(texts)), [len(one) for one in texts])
    made = split(rules(*asked_for), sources, np.array([t for one in texts for t in one], dtype=np.uint64), LABELS)
    return [made[sources == source].tolist() for source in range(len(texts))]


def test_held_out_rows_by_hand() -> None:
    # The lowest hashes first: two of five.
    assert fates([{"num_held_out": 2}], [[50, 10, 30, 20, 40]]) == [[TRAINED, HELD_OUT, TRAINED, HELD_OUT, TRAINED]]
    assert fates([{"held_out": 0.3}], [[50, 10, 30, 20, 40]]) == [[TRAINED, HELD_OUT, TRAINED, HELD_OUT, TRAINED]]
    # Both rows of text 10 fall on the same side; text 5 stands in three rows and is passed over.
    assert fates([{"num_held_out": 2}], [[5, 10, 5, 10, 5, 20]]) == [[0, HELD_OUT, 0, HELD_OUT, 0, 0]]
    # One wanted: 10 stands in two, so it is 20.
    assert fates([{"num_held_out": 1}], [[10, 10, 20, 30]]) == [[0, 0, HELD_OUT, 0]]
    # What the first source holds out, the second does not train on.
    assert fates([{"num_held_out": 2}, {}], [[10, 20, 30], [40, 10, 50]]) == [
        [HELD_OUT, HELD_OUT, 0], [0, LEFT_OUT, 0],
    ]  # fmt: skip
    # Both hold out: the same text on the same side of both.
    both = fates([{"num_held_out": 2}, {"num_held_out": 2}], [[10, 20, 30], [40, 10, 50]])
    assert both == [[HELD_OUT, HELD_OUT, 0], [HELD_OUT, HELD_OUT, 0]]


@pytest.mark.parametrize(("asked_for", "texts", "said"), [
    ({"num_held_out": 3}, [10, 20, 30], "num_held_out 3 of 3 rows leaves none to train on"),
    ({"held_out": 0.9}, [10, 20, 30], "held_out 0.9 of 3 rows leaves none to train on"),
    ({"num_held_out": 1}, [10, 10, 10], "no row can be held out: each of its texts stands in more than the 1 rows"),
])  # fmt: skip
def test_what_cannot_be_held_out(asked_for: dict[str, Any], texts: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fates([asked_for], [texts])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), min_size=2, max_size=30), min_size=1, max_size=3), st.data())
def test_no_text_is_on_both_sides(texts: list[list[int]], data: st.DataObject) -> None:
    asked_for = [
        {"num_held_out": data.draw(st.integers(1, len(one) - 1))} if data.draw(st.booleans()) else {} for one in texts
    ]
    try:
        made = fates(asked_for, texts)
    except ValueError as error:
        assert "no row can be held out" in str(error)
        return
    sides: dict[int, set[bool]] = {}
    for own, fate, rule in zip(texts, made, asked_for, strict=True):
        assert fate.count(HELD_OUT) <= rule.get("num_held_out", 0)
        for text, one in zip(own, fate, strict=True):
            sides.setdefault(text, set()).add(one == TRAINED)
    assert all(len(side) == 1 for side in sides.values())


def test_what_a_row_asks() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " What is  ２?"},
             {"role": "assistant", "content": "Two."}]  # fmt: skip
    said = asked({"messages": turns})
    assert (
        said == asked({"messages": [turns[1], {"role": "assistant", "content": "Dos."}]}) == '[["user", "what is 2?"]]'
    )
    assert asked({"prompt": turns[:2], "chosen": [turns[2]], "rejected": [turns[2]]}) == said
    more = [*turns, {"role": "user", "content": "And 3?"}, {"role": "assistant", "content": "Three."}]
    assert asked({"messages": more}) != said
    assert asked({"messages": turns[2:]}) == '[["assistant", "two."]]', "asks nothing: all of it"


# --- Files ------------------------------------------------------------------------------------------------------------


def row(source: int, number: int, text: str | None = None) -> dict[str, Any]:
    turns = [("user", text or f"What is {source} plus {number}?"), ("assistant", f"It is {source + number}.")]
    return {"id": f"{source}:{number}", "messages": [{"role": r, "content": c} for r, c in turns]}


def mixed(folder: Path, rows: list[dict[str, Any]], asked_for: list[dict[str, Any]], seed: int = 0,
          **how: Any) -> tuple[MixtureOutputs, list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    source = write_rows(folder / "given.parquet", rows, **how)
    context = StageContext(folder / "out", folder / "work", ComputeSettings(), lambda *args, **kwargs: None)
    config = MixtureConfig(kind="sft", rules=tuple(rules(*asked_for)), seed=seed, labels=LABELS[: len(asked_for)])
    inputs, aside = MixtureInputs(dataset=str(source)), []
    if any(rule.holds_out for rule in config.rules):
        put_aside, _ = mixture_stage.put_aside(config, inputs, context)
        aside = read_rows(folder / "out" / put_aside.file)
        (folder / "out" / put_aside.file).unlink()
    outputs, _ = mixture_stage.mix(config, inputs, context)
    return outputs, read_rows(folder / "out" / outputs.file), aside


#: 0:3 was removed by a check, and the second source repeats a question of the first.
ROWS = [row(0, n) for n in range(10) if n != 3] + [row(1, n) for n in range(4)] + [row(1, 4, "What is 0 plus 7?")]


def test_rows_are_as_they_were_and_ids_tell_repeats(tmp_path: Path) -> None:
    outputs, made, aside = mixed(tmp_path, ROWS, [{"repeats": 2.5}, {"num_rows": 2}])
    first, second = outputs.shares
    assert (first.num_given, first.num_rows, first.num_distinct, first.num_repeated) == (9, 23, 9, 14)
    assert (second.num_given, second.num_rows, second.num_unused) == (5, 2, 3) and aside == []
    ids = [one["id"] for one in made]
    assert len(set(ids)) == len(ids) == outputs.num_rows == 25
    given = {one["id"]: one["messages"] for one in ROWS}
    assert all(one["messages"] == given[one["id"].partition("#")[0]] for one in made)
    times = Counter(one.partition("#")[0] for one in ids if one.startswith("0:"))
    assert sorted(times.values()) == [2] * 4 + [3] * 5 and {one.partition("#")[2] for one in ids} == {"", "2", "3"}
    assert ids != sorted(ids), "shuffled"


@pytest.mark.parametrize("bucket", [1, 400])
def test_the_file_does_not_depend_on_how_it_is_made(
    bucket: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row groups of three rows, and a bucket of one row or of a few."""
    whole = mixed(tmp_path / "whole", ROWS, [{"repeats": 3}, {}])
    monkeypatch.setattr(mixture_stage, "_BUCKET_BYTES", bucket)
    assert mixed(tmp_path / "parts", ROWS, [{"repeats": 3}, {}], group_rows=3) == whole


def test_held_out_rows_are_no_trained_rows(tmp_path: Path) -> None:
    """All but one of the first source's texts are held out, so that the one which both sources ask mostly is."""
    outputs, made, aside = mixed(tmp_path, ROWS, [{"num_held_out": 8, "repeats": 3}, {}])
    assert len(aside) == 8 == outputs.num_held_out and [one["id"] for one in aside] == sorted(
        one["id"] for one in aside
    )
    asked_aside, asked_made = ({asked(one) for one in rows} for rows in (aside, made))
    assert not asked_aside & asked_made and outputs.shares[1].num_left_out == 1
    assert outputs.shares[0].num_rows == 3 and outputs.shares[1].num_rows == 4
    other = mixed(tmp_path / "other", ROWS, [{"num_held_out": 8}, {"repeats": 0.5}], seed=9)
    assert other[2] == aside, "whatever the mixture and its seed"


def test_what_a_turn_has_beside_its_text_stays(tmp_path: Path) -> None:
    """Functions, calls, reasoning and turns that are not trained, repeated and held out like any other row."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    rows = []
    for number in range(6):
        one = row(0, number)
        one["messages"][1] |= {"reasoning_content": f"{number} it is", "tool_calls": [call]}
        one["messages"].append({"role": "tool", "content": str(number), "name": "add"})
        one["messages"].append({"role": "assistant", "content": "Done.", "train": False})
        rows.append(one | {"tools": [{"type": "function", "function": {"name": "add"}}]})
    source = write_rows(tmp_path / "same.parquet", rows)
    given = {one["id"]: one for one in read_rows(source)}
    _, made, aside = mixed(tmp_path, rows, [{"repeats": 2, "num_held_out": 2}])
    assert len(made) == 8 and len(aside) == 2
    for one in (*made, *aside):
        assert {**one, "id": None} == {**given[one["id"].partition("#")[0]], "id": None}
        assert one["messages"][1]["reasoning_content"] and one["tools"]
