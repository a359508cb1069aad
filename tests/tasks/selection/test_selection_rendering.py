"""Rows for scoring: the preflight's tokens, turns and steps as token ranges, and why a row cannot be scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from smoltulu.schemas.data import DatasetKind
from smoltulu.tasks.models.turns import spans_by_turn
from smoltulu.tasks.selection import scores_file
from smoltulu.tasks.selection.rendering import (
    Rendered,
    Renderer,
    check_template,
    repetition,
    step_starts,
    tokenizer_difference,
)
from tests import small_runs
from tests.rich_rows import ASKED, HERMES, TOOLS
from tests.small_runs import turn
from tests.tasks.preflight.test_preflight import fly, prompts
from tests.tiny_model import PICKY_TEMPLATE, REFUSED, build_tiny_model, build_tokenizer

FREE = {"max_overlong_share": 1, "max_faulty_share": 1, "max_unstable_share": 1}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def rendered(tokenizer: Any, rows: list[dict[str, Any]], kind: DatasetKind = "sft", **settings: Any) -> list[Rendered]:
    rows = [{"id": f"0:{number}"} | row for number, row in enumerate(rows)]
    return Renderer(tokenizer, kind, **{"max_length": 200} | settings)(enumerate(rows))


def sft(*turns: dict[str, Any], **row: Any) -> dict[str, Any]:
    return {"messages": list(turns)} | row


# --- Tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "preference", "rlvr"])
def test_counts_are_those_of_the_preflight(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: DatasetKind
) -> None:
    model = build_tiny_model(tmp_path / "model")
    rows = {
        "sft": small_runs.conversations(12),
        "preference": [row for row in small_runs.pairs(12) if row["chosen"] != row["rejected"]],
        "rlvr": prompts(12),
    }[kind]
    names = {"sft": "conversations", "preference": "pairs", "rlvr": "prompts"}
    flight = fly(tmp_path / "flight", model, rows, names[kind], max_length=200, checks=FREE)
    ours = rendered(tokenizer, rows, kind)
    assert [row.problem for row in ours] == [""] * len(rows)
    if kind == "sft":
        assert sum(len(row.ids) for row in ours) == flight.outputs.num_tokens
        assert sum(sum(row.mask) for row in ours) == flight.outputs.num_trained_tokens
    elif kind == "preference":  # the preflight has both sides, the score the chosen one
        written = flight.rows
        assert [row.ids for row in ours] == [row["prompt_ids"] + row["chosen_ids"] for row in written]
        assert [row.mask for row in ours] == [row["prompt_mask"] + row["chosen_mask"] for row in written]
    else:
        lengths = [len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
                   for row in rows]  # fmt: skip
        assert [len(row.ids) for row in ours] == lengths and not any(any(row.mask) for row in ours)
        assert ours[0].scored(whole=True) == list(range(1, lengths[0]))


def test_pairs_train_what_the_recipe_trains(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = small_runs.pairs(1)  # its prompt has an answer
    (last,) = rendered(tokenizer, rows, "preference")
    (both,) = rendered(tokenizer, rows, "preference", trained_turns="all")
    assert last.ids == both.ids and sum(both.mask) > sum(last.mask) > 0


def test_turns_that_are_not_trained_and_rich_ones() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = HERMES
    asked = sft(*ASKED, tools=TOOLS)
    whole, without = rendered(
        tokenizer, [asked, sft(ASKED[0], {**ASKED[1], "train": False}, *ASKED[2:], tools=TOOLS)],
        max_length=600, by="turn",
    )  # fmt: skip
    assert whole.ids == without.ids
    assert [part.turn for part in whole.parts] == [1, 3] and [part.turn for part in without.parts] == [3]
    assert whole.parts[1] == without.parts[0]
    part = whole.parts[0]
    said = tokenizer.decode(whole.ids[part.first : part.last])
    assert said.startswith("<think>\nI must look.") and said.endswith("</tool_call><|im_end|>")
    assert sum(without.mask) == without.parts[0].last - without.parts[0].first
    # Tools, call and result are text of the row too.
    assert whole.num_characters > 100 and whole.digest != without.digest


# --- Problems -----------------------------------------------------------------------------------------------------


def test_why_a_row_is_not_scored(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = PICKY_TEMPLATE
    user, answer = turn("user", "Name three."), turn("assistant", "cat, dog, cow")
    rows = {
        "": sft(user, answer),
        scores_file.TOO_LONG: sft(user, turn("assistant", "cat " * 300)),
        scores_file.NO_TRAINED_TOKEN: sft(user, {**answer, "train": False}),
        scores_file.EMPTY_ANSWER: sft(user, turn("assistant", " \n")),
        scores_file.NOT_RENDERED: sft(turn("user", REFUSED), answer),
    }
    found = rendered(tokenizer, list(rows.values()))
    assert [row.problem for row in found] == list(rows)
    assert set(rows) - {""} | {scores_file.NO_NUMBER} == set(scores_file.PROBLEMS)
    assert found[1].ids and not found[4].ids  # how long it is, is known
    # One empty answer of two is none; a conversation that nobody answers trains nothing.
    (mixed, asked) = rendered(tokenizer, [sft(user, turn("assistant", ""), user, answer), sft(user)])
    assert mixed.problem == "" and asked.problem == scores_file.NO_TRAINED_TOKEN
    pair = {"prompt": [user], "chosen": [turn("assistant", "")], "rejected": [answer]}
    (empty,) = rendered(tokenizer, [pair], "preference")
    assert empty.problem == scores_file.EMPTY_ANSWER


@pytest.mark.parametrize("kind", ["sft", "rlvr"])
def test_a_template_that_cannot_be_used(kind: DatasetKind) -> None:
    tokenizer = build_tokenizer()
    check_template(tokenizer, kind)
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(ValueError, match="cannot render rows for the selector model: it refuses: never"):
        check_template(tokenizer, kind)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    if kind == "rlvr":
        check_template(tokenizer, kind)  # a prompt trains nothing anyway
    else:
        with pytest.raises(ValueError, match="marks no token of an answer"):
            check_template(tokenizer, kind)


# --- Turns and steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("one", ["one"]),
        ("one\n\ntwo\nstill two\n \n\nthree<e>", ["one\n\n", "two\nstill two\n \n\n", "three<e>"]),
        ("one\ntwo\n  three", ["one\n", "two\n  ", "three"]),  # no blank line: lines
        ("\n\n  one\n\ntwo", ["\n\n  one\n\n", "two"]),
        ("one\n\ntwo\n\n", ["one\n\n", "two\n\n"]),
        ("one\n\ntwo\n\n<e>", ["one\n\n", "two\n\n<e>"]),  # what closes the turn is no step
        ("one\n<e>", ["one\n<e>"]),
        ("\n\n", ["\n\n"]),
        ("", [""]),
    ],
)
def test_steps_by_hand(text: str, steps: list[str]) -> None:
    starts = [0, *step_starts(text, ["<e>"])]
    assert [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)] == steps


def test_parts_as_token_ranges(tokenizer: PreTrainedTokenizerFast) -> None:
    row = sft(turn("user", "a\n\nb"), turn("assistant", "one\n\ntwo"), turn("user", "c"), turn("assistant", "x\ny"))
    (turns,) = rendered(tokenizer, [row], by="turn")
    (steps,) = rendered(tokenizer, [row], by="step")

    def said(row: Rendered) -> list[tuple[int, int, str]]:
        return [(part.turn, part.step, tokenizer.decode(row.ids[part.first : part.last])) for part in row.parts]

    end = "<|endoftext|>"
    assert said(turns) == [(1, 0, f"one\n\ntwo{end}"), (3, 0, f"x\ny{end}")]
    assert said(steps) == [(1, 0, "one\n\n"), (1, 1, f"two{end}"), (3, 0, "x\n"), (3, 1, f"y{end}")]
    (whole,) = rendered(tokenizer, [row])
    assert whole.parts == () and whole.ids == steps.ids


_TEXT = st.text(st.sampled_from("ab\n <é"), max_size=12)


@given(st.lists(_TEXT, min_size=1, max_size=3), st.sampled_from(["turn", "step"]))
def test_parts_cover_the_trained_tokens_once(answers: list[str], by: str) -> None:
    tokenizer = build_tokenizer()
    row = sft(*(one for answer in answers for one in (turn("user", "q"), turn("assistant", answer))))
    (made,) = rendered(tokenizer, [row], by=by)
    if made.problem:
        assert made.problem == scores_file.EMPTY_ANSWER and not any(answer.strip() for answer in answers)
        return
    covered = [place for part in made.parts for place in range(part.first, part.last) if made.mask[place]]
    assert covered == made.scored(whole=False)
    assert [(part.turn, part.step) for part in made.parts] == sorted({(part.turn, part.step) for part in made.parts})


def test_blocks_of_a_turn_that_several_share() -> None:
    """A template that closes a turn in a block of its own: the block belongs to the turn before it."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for turn in messages %}{% if turn['role'] == 'assistant' %}A: {% generation %}{{ turn['content'] }}"
        "{% endgeneration %}{% generation %}<end>{% endgeneration %}{% else %}Q: {{ turn['content'] }}{% endif %}"
        "{% endfor %}"
    )
    row = sft(turn("user", "q"), turn("assistant", "yes"), turn("user", "q"), turn("assistant", "no"))
    text, spans = spans_by_turn(tokenizer, row["messages"], None)
    assert [(number, text[slice(*span)]) for number, span in spans] == [
        (1, "yes"), (1, "<end>"), (3, "no"), (3, "<end>"),
    ]  # fmt: skip
    (made,) = rendered(tokenizer, [row], by="turn")
    said = [tokenizer.decode(made.ids[part.first : part.last]).strip() for part in made.parts]
    assert said == ["yes<end>", "no<end>"]


# --- Figures and tokenizers ---------------------------------------------------------------------------------------


def test_repetition_by_hand() -> None:
    assert repetition("a b") == 0.0
    assert repetition("a b c d") == 0.0
    assert repetition("a b c a b c") == pytest.approx(1 - 3 / 4)  # abc bca cab abc
    assert repetition("so " * 12) == pytest.approx(1 - 1 / 10)


def test_tokenizers_that_may_give_other_tokens() -> None:
    base = build_tokenizer()
    assert tokenizer_difference(base, build_tokenizer()) is None
    assert "vocabulary" in str(tokenizer_difference(base, _with_tokens_swapped()))
    assert "of the model" in str(tokenizer_difference(base, build_tokenizer(vocab_size=390)))
    more = build_tokenizer()
    more.add_tokens(["<user>"])
    assert tokenizer_difference(base, more) == "added tokens, e.g. '<user>'"
    # What differs only in padding, or in how much it takes, gives the same tokens.
    same = build_tokenizer()
    same.model_max_length, same.padding_side = 9, "left"
    same.backend_tokenizer.enable_truncation(4)
    assert tokenizer_difference(base, same) is None
    spaced = build_tokenizer()
    from tokenizers import pre_tokenizers

    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert tokenizer_difference(base, spaced) == "pre-tokenizer"


def _with_tokens_swapped() -> PreTrainedTokenizerFast:
    """The same tokens and merges, but two ids are exchanged: no length of any text would show it."""
    import json

    from tokenizers import Tokenizer

    made = json.loads(build_tokenizer().backend_tokenizer.to_str())
    vocabulary = made["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(made)))
