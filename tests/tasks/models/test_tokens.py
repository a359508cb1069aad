"""Tokens of rows: equal to TRL's own, and what must hold of every row. See docs/preflight.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from smoltulu.schemas.training import Overlong
from smoltulu.tasks.models.folders import load_tokenizer
from smoltulu.tasks.models.tokens import (
    IGNORED,
    Conversation,
    Pair,
    conversations,
    fit_conversation,
    fit_pair,
    pairs,
    prompt_ids,
)
from tests.small_runs import turn
from tests.tiny_model import EOS, TULU_TEMPLATE, build_tiny_model, build_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

TOKENIZER: PreTrainedTokenizerFast = build_tokenizer()
Messages = list[dict[str, str]]

#: Texts that a tokenizer or a template may trip over.
ODD = (
    "",
    " ",
    "\n\n\nafter lines",
    "  spaces before and after  ",
    "naïve – “quotes” … 中文 عربي 👩‍👩‍👧 \u200b e\u0301",
    "\u0000\u0007\ufeff",
    "<|user|>\nWhat is 1 plus 1?\n<|assistant|>\n2",
    f"It ends here.{EOS} It goes on.",
    f"{EOS}{EOS}",
    "<pad> {{ messages }} {% generation %}",
    "word " * 80,
)


def odd_conversations() -> list[dict[str, Any]]:
    """Every odd text in every role, and rows of several turns."""
    rows = []
    for text in ODD:
        rows += [
            [turn("user", text), turn("assistant", "Good night.")],
            [turn("user", "Good morning"), turn("assistant", text)],
            [turn("system", text), turn("user", "cat, dog"), turn("assistant", "3")],
            [turn("user", "a"), turn("assistant", text), turn("user", text), turn("assistant", "b" + text)],
        ]
    return [{"messages": row} for row in rows]


def odd_pairs() -> list[dict[str, Any]]:
    rows = []
    for text in ODD:
        before = [turn("user", text), turn("assistant", "Good night.")]
        for prompt in (
            [turn("user", text)],
            [*before, turn("user", "and?")],
            [turn("system", text), turn("user", "?")],
        ):
            rows.append({"prompt": prompt, "chosen": "Good" + text, "rejected": text})
        rows.append({"prompt": [turn("user", "?")], "chosen": text + "x", "rejected": text + "y"})
    return [
        {**row, "chosen": [turn("assistant", row["chosen"])], "rejected": [turn("assistant", row["rejected"])]}
        for row in rows
    ]


# --- The same as TRL ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
    } | changes


def as_dataset(rows: list[dict[str, Any]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(rows)


@pytest.mark.parametrize("max_length", [None, 40])
def test_conversations_are_those_of_trl(model: Path, tmp_path: Path, max_length: int | None) -> None:
    from trl import SFTConfig, SFTTrainer

    rows = odd_conversations()
    config = SFTConfig(**arguments(tmp_path, assistant_only_loss=True, max_length=max_length))
    trainer = SFTTrainer(str(model), config, train_dataset=as_dataset(rows), processing_class=build_tokenizer())
    theirs = [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]

    made = conversations(TOKENIZER, [row["messages"] for row in rows])
    fitted = [fit_conversation(row, max_length or 10**6, "truncate") for row in made]
    ours = [(row.input_ids, row.labels) for row in fitted if row is not None]
    assert ours == theirs
    assert len(ours) == len(rows) if max_length is None else len(ours) < len(rows)


def test_pairs_are_those_of_trl(model: Path, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    rows = odd_pairs()
    trainer = DPOTrainer(
        str(model), args=DPOConfig(**arguments(tmp_path, max_length=None)), train_dataset=as_dataset(rows),
        processing_class=build_tokenizer(),
    )  # fmt: skip
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    theirs = [tuple(row[name] for name in names) for row in trainer.train_dataset]
    made = pairs(TOKENIZER, rows, "last")
    assert [(row.prompt_ids, row.chosen_ids, row.rejected_ids) for row in made] == theirs
    # Where the prompt is stable, TRL counts every token of the completions, and so do we.
    for row in made:
        assert not row.stable or (all(row.chosen_mask) and all(row.rejected_mask))
        assert not any(row.prompt_mask)


def test_pairs_of_a_reward_model_are_those_of_trl(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    rows = odd_pairs()
    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(model, num_labels=1),
        args=RewardConfig(**arguments(tmp_path, max_length=60)), train_dataset=as_dataset(rows),
        processing_class=build_tokenizer(),
    )  # fmt: skip
    theirs = [(row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset]
    made = [fit_pair(row, 60, "drop") for row in pairs(TOKENIZER, rows, "last")]
    ours = [(row.prompt_ids + row.chosen_ids, row.prompt_ids + row.rejected_ids) for row in made if row is not None]
    assert ours == theirs and 0 < len(ours) < len(rows)


# --- Of every row -------------------------------------------------------------------------------------------------

texts = st.one_of(st.text(max_size=30), st.sampled_from(ODD))


@st.composite
def dialogues(draw: st.DrawFn) -> Messages:
    """Alternating turns, perhaps after a system turn; the last is the assistant's."""
    row = [turn("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        row += [turn("user", draw(texts)), turn("assistant", draw(texts))]
    return row


@given(st.lists(dialogues(), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_what_holds_of_every_conversation(rows: list[Messages]) -> None:
    made = conversations(TOKENIZER, rows)
    assert made == [conversations(TOKENIZER, [row])[0] for row in rows], "a row does not depend on its batch"
    for row, whole in zip(rows, made, strict=True):
        assert len(whole.input_ids) == len(whole.mask) == len(whole.labels)
        assert TOKENIZER.decode(whole.input_ids) == TOKENIZER.apply_chat_template(row, tokenize=False)
        for token, trained, label in zip(whole.input_ids, whole.mask, whole.labels, strict=True):
            assert label == (token if trained else IGNORED)
        assert whole.input_ids[-1] == TOKENIZER.eos_token_id and whole.mask[-1] == 1, "the last eos is trained"
        prompt = prompt_ids(TOKENIZER, [row[:-1]])[0]
        assert whole.stable == (whole.input_ids[: len(prompt)] == prompt)


@given(dialogues())
@settings(max_examples=60, deadline=None)
def test_what_is_trained_is_what_the_assistant_says_and_eos(row: Messages) -> None:
    # White space at the beginning of an answer may be one token with the end of its header: see `stable`.
    row = [{**message, "content": message["content"].lstrip()} for message in row]
    (whole,) = conversations(TOKENIZER, [row])
    trained = [token for token, counts in zip(whole.input_ids, whole.mask, strict=True) if counts]
    assert TOKENIZER.decode(trained) == "".join(m["content"] + EOS for m in row if m["role"] == "assistant")


@pytest.mark.parametrize("role", ["system", "user"])
def test_an_eos_that_a_user_writes_is_a_token_and_not_trained(role: str) -> None:
    before = [turn("user", "?")] if role == "system" else []
    row = [turn(role, f"Stop.{EOS} Go on."), *before, turn("assistant", "3")]
    (whole,) = conversations(TOKENIZER, [row])
    places = [place for place, token in enumerate(whole.input_ids) if token == TOKENIZER.eos_token_id]
    assert [whole.mask[place] for place in places] == [0, 1]
    # In an answer it is: the preflight counts such rows (num_special_trained).
    (whole,) = conversations(TOKENIZER, [[turn("user", "?"), turn("assistant", f"Stop.{EOS} Go on.")]])
    places = [place for place, token in enumerate(whole.input_ids) if token == TOKENIZER.eos_token_id]
    assert [whole.mask[place] for place in places] == [1, 1]


def test_headers_that_a_user_writes_are_not_trained() -> None:
    row = [turn("user", "<|assistant|>\nI am the assistant."), turn("assistant", "3")]
    (whole,) = conversations(TOKENIZER, [row])
    trained = [token for token, counts in zip(whole.input_ids, whole.mask, strict=True) if counts]
    assert TOKENIZER.decode(trained) == "3" + EOS


def test_a_prompt_whose_end_merges_with_the_answer_is_not_stable() -> None:
    tokenizer = build_tokenizer(["a\n\nb\n\nc\n\n\n\nd"] * 50)
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    rows = [[turn("user", "a"), turn("assistant", text)] for text in ("b", "\n\nb")]
    assert [row.stable for row in conversations(tokenizer, rows)] == [True, False]
    row = {"prompt": rows[0][:1], "chosen": [turn("assistant", "\n\nb")], "rejected": [turn("assistant", "c")]}
    (pair,) = pairs(tokenizer, [row], "last")
    asked = prompt_ids(tokenizer, [row["prompt"]])[0]
    assert not pair.stable and pair.prompt_ids == asked[: len(pair.prompt_ids)] and len(pair.prompt_ids) < len(asked)


@given(dialogues(), texts, texts, st.sampled_from(["last", "all"]))
@settings(max_examples=60, deadline=None)
def test_what_holds_of_every_pair(dialogue: Messages, chosen: str, rejected: str, trained_turns: Any) -> None:
    prompt = dialogue[:-1]
    row = {"prompt": prompt, "chosen": [turn("assistant", chosen)], "rejected": [turn("assistant", rejected)]}
    (pair,) = pairs(TOKENIZER, [row], trained_turns)
    for side, text, mask in (
        (pair.chosen_ids, chosen, pair.chosen_mask), (pair.rejected_ids, rejected, pair.rejected_mask),
    ):  # fmt: skip
        assert len(side) == len(mask)
        (whole,) = conversations(TOKENIZER, [[*prompt, turn("assistant", text)]])
        assert pair.prompt_ids + side == whole.input_ids
        assert side[-1] == TOKENIZER.eos_token_id and mask[-1] == 1
        assert pair.prompt_mask + mask == whole.mask if trained_turns == "all" else not any(pair.prompt_mask)
        assume(pair.stable)
        assert all(mask)
    assert pair.length == max(len(pair.prompt_ids) + len(side) for side in (pair.chosen_ids, pair.rejected_ids))


# --- Cutting and dropping -----------------------------------------------------------------------------------------

masks = st.lists(st.integers(0, 1), min_size=1, max_size=12)


@given(masks, st.integers(1, 14), st.sampled_from(["truncate", "drop"]))
def test_a_conversation_is_cut_at_its_end_or_dropped(mask: list[int], max_length: int, overlong: Overlong) -> None:
    row = Conversation(list(range(len(mask))), mask, stable=True)
    fitted = fit_conversation(row, max_length, overlong)
    if len(mask) > max_length and overlong == "drop":
        assert fitted is None
    elif not any(mask[1:max_length]):
        assert fitted is None, "nothing predicts the first token"
    else:
        assert fitted is not None
        assert (fitted.input_ids, fitted.mask) == (row.input_ids[:max_length], mask[:max_length])


@given(st.integers(0, 6), masks, masks, st.integers(1, 14), st.sampled_from(["truncate", "drop"]))
def test_the_completions_of_a_pair_are_cut_or_it_is_dropped(
    num_prompt: int, chosen: list[int], rejected: list[int], max_length: int, overlong: Overlong
) -> None:
    def numbers(mask: Sequence[int]) -> list[int]:
        return list(range(len(mask)))

    prompt = [0] * num_prompt
    row = Pair(prompt, prompt, numbers(chosen), chosen, numbers(rejected), rejected, stable=True)
    fitted = fit_pair(row, max_length, overlong)
    room = max(max_length - num_prompt, 0)
    too_long = row.length > max_length
    kept = (chosen[:room], rejected[:room]) if too_long else (chosen, rejected)
    if (too_long and overlong == "drop") or not any(kept[0]) or not any(kept[1]):
        assert fitted is None
        return
    assert fitted is not None and fitted.length <= max_length and fitted.prompt_ids == row.prompt_ids
    assert (fitted.chosen_mask, fitted.rejected_mask) == kept
    assert (fitted.chosen_ids, fitted.rejected_ids) == (numbers(kept[0]), numbers(kept[1]))


def test_nothing_in_nothing_out() -> None:
    assert conversations(TOKENIZER, []) == [] and pairs(TOKENIZER, [], "last") == []
    assert TOKENIZER.chat_template == TULU_TEMPLATE


def test_a_saved_tokenizer_does_not_say_how_it_was_loaded(tmp_path: Path) -> None:
    """The same model had other bytes, and so another digest, with HF_HUB_OFFLINE than without."""
    TOKENIZER.save_pretrained(str(tmp_path / "base"))
    load_tokenizer(tmp_path / "base", TULU_TEMPLATE).save_pretrained(str(tmp_path / "made"))
    saved = json.loads((tmp_path / "made" / "tokenizer_config.json").read_text())
    assert saved.keys() & {"local_files_only", "is_local", "name_or_path"} == set()
