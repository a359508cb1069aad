"""Probes: from the seed alone, as long as allowed and no longer, and with nothing that makes one easy."""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltulu.schemas.selection import ProbeSettings
from smoltulu.tasks.selection.probes import Probe, balanced_depths, make_graded_probes, make_probes, most_pairs
from smoltulu.tasks.world.lookups import (
    INSTRUCTION,
    WORD_LISTS,
    Pair,
    as_line,
    as_object,
    draw_copying_text,
    draw_pairs,
)
from tests.families import FAMILIES, family_tokenizer


@cache
def tokenizer(name: str = "tulu") -> Any:
    return family_tokenizer(FAMILIES[name])


SMALL = ProbeSettings(num_probes=8, max_tokens=500, key_length=4, num_shown=2)


def parsed(probe: Probe) -> tuple[dict[str, str], list[Pair]]:
    """The object and the lines after it."""
    instruction, data, *lines = probe.text.split("\n")
    assert instruction == INSTRUCTION
    return json.loads(data), [Pair(*next(iter(json.loads(f"{{{line}}}").items()))) for line in lines]


@given(
    seed=st.integers(0, 10_000),
    num_shown=st.integers(0, 4),
    key_length=st.integers(2, 12),
    max_tokens=st.integers(600, 900),
    family=st.sampled_from(sorted(FAMILIES)),
)
@settings(max_examples=20, deadline=None)
def test_a_probe_is_what_it_says(seed: int, num_shown: int, key_length: int, max_tokens: int, family: str) -> None:
    given_settings = ProbeSettings(
        seed=seed, num_probes=8, num_shown=num_shown, key_length=key_length, max_tokens=max_tokens
    )
    own = tokenizer(family)
    probes = make_probes(own, given_settings, 4)
    assert probes == make_probes(own, given_settings, 4)
    for probe in probes:
        data, lines = parsed(probe)
        assert len(data) == probe.num_pairs and len(lines) == num_shown + 1
        assert all(len(key) == key_length and key.isalnum() for key in data)
        assert all(data[line.key] == line.value for line in lines)
        assert len({line.key for line in lines}) == len(lines), "no question is asked twice"
        assert lines[-1] == (probe.key, probe.value)
        assert list(data)[probe.position] == probe.key
        assert len(probe.input_ids) <= max_tokens
        ids = probe.input_ids
        for first, last in (probe.needle, probe.answer):
            assert own.decode(ids[first:last]).strip().strip('"') == probe.value
        assert ids[slice(*probe.needle)] == ids[slice(*probe.answer)]
        assert probe.needle[1] < probe.answer[0]


def test_as_many_pairs_as_fit() -> None:
    """One more pair would be too long: a pair of these has at most 50 tokens in this tokenizer."""
    for probe in make_probes(tokenizer(), SMALL):
        assert SMALL.max_tokens - 50 < len(probe.input_ids) <= SMALL.max_tokens
    longer = make_probes(tokenizer(), SMALL.model_copy(update={"max_tokens": 700}))
    assert min(probe.num_pairs for probe in longer) > max(probe.num_pairs for probe in make_probes(tokenizer(), SMALL))


def test_what_a_tokenizer_puts_before_a_text_is_there_and_what_it_puts_behind_is_not() -> None:
    (bos,) = tokenizer("llama3")("")["input_ids"]
    assert all(probe.input_ids[0] == bos for probe in make_probes(tokenizer("llama3"), SMALL))
    eos = tokenizer("adds eos").eos_token_id
    assert all(eos not in probe.input_ids for probe in make_probes(tokenizer("adds eos"), SMALL))


def test_probes_depend_on_the_seed_and_the_draw_alone() -> None:
    first = make_probes(tokenizer(), SMALL)
    random.seed(5)
    assert make_probes(tokenizer(), SMALL) == first
    for other in (
        make_probes(tokenizer(), SMALL, draw=1),
        make_probes(tokenizer(), SMALL.model_copy(update={"seed": 1})),
    ):
        assert not {probe.key for probe in other} & {probe.key for probe in first}
    assert make_probes(tokenizer(), SMALL, 3)[0].key == make_probes(tokenizer(), SMALL, 3)[0].key


@given(seed=st.integers(0, 10_000), count=st.integers(1, 60))
def test_needles_stand_equally_often_in_each_part(seed: int, count: int) -> None:
    depths = balanced_depths(random.Random(seed), count)
    assert sorted(int(depth * count) for depth in depths) == list(range(count))


@given(seed=st.integers(0, 10_000), count=st.integers(1, 70))
def test_no_word_tells_the_needle(seed: int, count: int) -> None:
    """Any first pairs of a draw have each word of a list equally often, give or take one."""
    pairs = draw_pairs(random.Random(seed), 70, 4)[:count]
    assert len({pair.key for pair in pairs}) == count
    for number, words in enumerate(WORD_LISTS):
        seen = Counter(pair.value.split()[number] for pair in pairs)
        often = [seen[word] for word in words]
        assert max(often) - min(often) <= 1
    assert {len(pair.value.split()) for pair in pairs} == {len(WORD_LISTS)}


def test_word_lists_share_no_word() -> None:
    words = [word for words in WORD_LISTS for word in words]
    assert len(set(words)) == len(words) and {len(words) for words in WORD_LISTS} == {20}


def test_graded_probes_differ_in_their_lookups_and_not_in_their_length() -> None:
    probes = make_graded_probes(tokenizer(), SMALL.model_copy(update={"max_tokens": 700}), 9)
    shown = [probe.num_shown for probe in probes]
    assert shown == sorted(shown) and shown[0] == 0 and len(set(shown)) >= 4
    lengths = [len(probe.input_ids) for probe in probes]
    assert max(lengths) <= 700 and min(lengths) > 640
    assert all(len(parsed(probe)[1]) == probe.num_shown + 1 for probe in probes)
    assert probes == make_graded_probes(tokenizer(), SMALL.model_copy(update={"max_tokens": 700}), 9)


def test_too_few_tokens_are_refused_with_what_is_needed() -> None:
    with pytest.raises(
        ValueError, match=r"4 pairs with keys of 4 characters and 2 shown answers are \d+ tokens, and max"
    ):
        make_probes(tokenizer(), SMALL.model_copy(update={"max_tokens": 100}))


@pytest.mark.parametrize(("max_tokens", "key_length", "count"), [(40_000, 2, 1_922), (450, 2, 112), (450, 32, 112)])
def test_no_more_pairs_are_drawn_than_there_are_keys(max_tokens: int, key_length: int, count: int) -> None:
    """There are 3,844 keys of two characters: 10,000 different ones would be looked for without end."""
    wide = SMALL.model_copy(update={"max_tokens": max_tokens, "key_length": key_length})
    assert most_pairs(wide) == count
    assert len(draw_pairs(random.Random(0), count, key_length)) == count


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match=r"tells no offsets"):
        make_probes(Slow(), SMALL)  # type: ignore[arg-type]


def test_two_keys_may_share_an_end_and_the_right_one_is_found() -> None:
    from smoltulu.tasks.selection.probes import render

    pairs = [Pair("aab", "red cat box"), Pair("ab", "red cat box"), Pair("b", "blue dog key")]
    text, (start, end), (first, last) = render(pairs, [0, 1])
    assert text.split("\n")[1:] == [as_object(pairs), as_line(pairs[0]), as_line(pairs[1])]
    assert text[start:end] == text[first:last] == "red cat box"
    assert text[:start].endswith('"ab": "') and text[:first].endswith('\n"ab": "') and last == len(text) - 1


def test_copying_texts_can_be_foretold() -> None:
    """At least a third of the words of a text stand in it before."""
    rng = random.Random(0)
    texts = [draw_copying_text(rng) for _ in range(200)]
    assert len(set(texts)) == 200
    repeated = []
    for text in texts:
        words = text.removeprefix(INSTRUCTION).split()
        repeated.append(1 - len(set(words)) / len(words))
    assert sum(repeated) / 200 > 1 / 3
    rng = random.Random(0)
    assert [draw_copying_text(rng) for _ in range(200)] == texts
