"""One pass over a context serves all its choices: the sums are lm-eval's of separate passes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltulu.tasks.evaluation.choices import cut, pack, passes, shared_contexts, why_not_shared
from smoltulu.tasks.evaluation.lm_eval import wrap
from tests.tiny_model import build_tiny_model, build_tokenizer

MAX_LENGTH = 24
NATS = 1e-4


# Which requests share a context.


def test_a_request_is_cut_from_the_left_as_lm_eval_cuts_it() -> None:
    assert cut(([1, 2, 3], [4, 5]), 4) == ((1, 2, 3), (4, 5))  # 5 tokens, 4 of them inputs
    assert cut(([1, 2, 3], [4, 5]), 3) == ((2, 3), (4, 5))
    assert cut(([1, 2, 3], [4, 5]), 2) == ((3,), (4, 5))
    assert cut(([1, 2, 3], [4, 5, 6]), 2) == ((3,), (5, 6))  # longer than there is room: it loses its beginning


def test_items_hold_each_request_once_and_the_longest_comes_first() -> None:
    requests = [([1, 2], [7]), ([3, 4], [5, 6]), ([1, 2], [8, 9, 9]), ([1, 2], [7])]
    first, second = shared_contexts(requests, 10)
    assert (first.context, first.continuations, first.num_tokens) == ((1, 2), {(7,): [0, 3], (8, 9, 9): [2]}, 4)
    assert (second.context, second.continuations, second.num_tokens) == ((3, 4), {(5, 6): [1]}, 3)
    # One token of continuation more than there is room: that request is cut, and has another context.
    cut_away = shared_contexts([([1, 2], [7]), ([1, 2], [8, 9, 9])], 3)
    assert [(item.context, list(item.continuations)) for item in cut_away] == [((2,), [(8, 9, 9)]), ((1, 2), [(7,)])]
    # Together they would be longer than the model reads: two items with the same context.
    two = shared_contexts([([1, 2], [7, 7, 7]), ([1, 2], [8, 8, 8])], 4)
    assert [item.num_tokens for item in two] == [4, 4]


def test_a_pass_has_room_for_one_item_at_least() -> None:
    items = shared_contexts([([n] * size, [1]) for n, size in enumerate((9, 4, 3, 3))], 20)
    assert [[item.num_tokens for item in batch] for batch in passes(items, 7)] == [[9], [4, 3], [3]]
    assert list(passes([], 7)) == []


def test_the_mask_by_hand() -> None:
    (item,) = shared_contexts([([5, 6], [7, 8]), ([5, 6], [9, 3]), ([5, 6], [4])], 10)
    (other,) = shared_contexts([([2], [1])], 10)
    packed = pack([item, other])
    assert packed.ids.tolist() == [5, 6, 7, 9, 2]
    assert packed.positions.tolist() == [0, 1, 2, 2, 0]
    assert packed.seen.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],  # the second choice does not see the first
        [0, 0, 0, 0, 1],  # nor an item another one
    ]
    assert packed.targets.tolist() == [7, 8, 9, 3, 4, 1]
    # Column 1, the context's last, predicts the first token of all three choices.
    assert packed.kept[packed.where].tolist() == [1, 2, 1, 3, 1, 4]


# Equal to lm-eval.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def wrapped(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    with_weights(model)
    return wrap(model, build_tokenizer(), batch_size=2, max_length=MAX_LENGTH, chat=False)


def with_weights(model: Any) -> None:
    """Make what was read matter: a model of small random weights gives nearly the same whatever it reads."""
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)


def plain(wrapped: Any, ask: Any) -> list[tuple[float, bool]]:
    """What HFLM itself says."""
    before, wrapped._why_not_shared = wrapped._why_not_shared, "asked for by a test"
    try:
        return ask()
    finally:
        wrapped._why_not_shared = before


def assert_same(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=NATS, rel=0)


_TOKENS = st.lists(st.integers(2, 390), min_size=1, max_size=12)
_CONTEXTS = st.lists(st.lists(st.integers(2, 390), min_size=1, max_size=40), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(contexts=_CONTEXTS, data=st.data())
def test_random_requests_equal_lm_evals_separate_passes(wrapped: Any, contexts: list[list[int]], data: Any) -> None:
    requests = data.draw(st.lists(st.tuples(st.sampled_from(contexts), _TOKENS), min_size=1, max_size=10))
    asked = [(("", ""), context, continuation) for context, continuation in requests]
    ours = wrapped._loglikelihood_tokens(asked)
    assert wrapped._why_not_shared == ""
    assert_same(ours, plain(wrapped, lambda: wrapped._loglikelihood_tokens(asked, disable_tqdm=True)))
    # The same answers in another order, and alone.
    order = data.draw(st.permutations(range(len(asked))))
    again = wrapped._loglikelihood_tokens([asked[number] for number in order])
    assert_same(again, [ours[number] for number in order])
    assert_same(wrapped._loglikelihood_tokens(asked[:1]), ours[:1])


def _instances(*arguments: tuple[str, str]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(arguments)]


def test_texts_equal_lm_eval_with_an_empty_context_and_moved_white_space(wrapped: Any) -> None:
    asked = _instances(
        ("", "Tom has 12"),
        ("", "Tom"),
        ("What is 3 plus 5? ", "8"),  # the space moves into the continuation, and so does the newline below
        ("What is 3 plus 5?", " 8"),
        ("What is 3 plus 5?\n\n", "eight"),
        ("What is 3 plus 5?\n\n", "eight apples"),
        ("apples " * 30, "more"),
        ("apples " * 30, "more apples than there is room for here"[:20]),
    )
    ours = wrapped.loglikelihood(asked, disable_tqdm=True)
    assert_same(ours, plain(wrapped, lambda: wrapped.loglikelihood(asked, disable_tqdm=True)))
    assert ours[2][0] == pytest.approx(ours[3][0], abs=NATS)


def test_a_rolling_text_equals_lm_eval(wrapped: Any) -> None:
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood_rolling", {}, ("Good morning, good night. " * 9,), 0)]
    ours = wrapped.loglikelihood_rolling(asked, disable_tqdm=True)
    theirs = plain(wrapped, lambda: wrapped.loglikelihood_rolling(asked, disable_tqdm=True))  # type: ignore[arg-type]
    assert ours == pytest.approx(theirs, abs=NATS)


def test_a_continuation_longer_than_the_model_reads_is_scored_as_far_as_it_fits(wrapped: Any) -> None:
    tokens = list(range(10, 10 + MAX_LENGTH + 5))
    ((value, _),) = wrapped._loglikelihood_tokens([(("", ""), [3, 4], tokens)])
    ((last, _),) = wrapped._loglikelihood_tokens([(("", ""), [4], tokens[-MAX_LENGTH:])])
    assert value == last


@dataclasses.dataclass
class Counted:
    """Tokens that a model read."""

    num_tokens: int = 0
    num_logits: int = 0


def test_a_context_is_read_once_and_single_tokens_are_free(wrapped: Any) -> None:
    counted = Counted()

    def count(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        counted.num_tokens += kwargs["input_ids"].numel()
        counted.num_logits += output.logits.shape[1]

    handle = wrapped.model.register_forward_hook(count, with_kwargs=True)
    try:
        letters = [(("", ""), [5, 6, 7, 8], [letter]) for letter in range(20, 30)]
        wrapped._loglikelihood_tokens(letters)
        assert counted == Counted(4, 1)
        wrapped._loglikelihood_tokens([(("", ""), [5, 6, 7, 8], [20, 21, 22]), (("", ""), [5, 6, 7, 8], [30, 31])])
        assert counted == Counted(4 + 4 + 2 + 1, 1 + 1 + 2 + 1)
    finally:
        handle.remove()


def test_every_answer_is_told_to_the_hook(wrapped: Any) -> None:
    told: list[Any] = []
    before = wrapped.cache_hook
    wrapped.cache_hook = type("Hook", (), {"add_partial": lambda _self, *args: told.append(args)})()
    try:
        asked = _instances(("a b", " c"), ("a b", " d"), ("x", " c"))
        answers = wrapped.loglikelihood(asked, disable_tqdm=True)
    finally:
        wrapped.cache_hook = before
    expected = [("loglikelihood", one.args, answer) for one, answer in zip(asked, answers, strict=True)]
    assert sorted(told) == sorted(expected)


# What cannot be scored.


def test_an_empty_choice_is_refused(wrapped: Any) -> None:
    with pytest.raises(ValueError, match=r"a choice has no tokens of its own: '' after …'Which one\?'"):
        wrapped.loglikelihood(_instances(("Which one?", " this"), ("Which one?", "")), disable_tqdm=True)


@pytest.mark.parametrize("shared", [True, False])
def test_a_log_likelihood_that_is_no_number_ends_the_evaluation(folder: Path, shared: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    broken = wrap(
        AutoModelForCausalLM.from_pretrained(str(folder)).eval(),
        build_tokenizer(),
        batch_size=2,
        max_length=MAX_LENGTH,
        chat=False,
    )
    broken._why_not_shared = "" if shared else "asked for by a test"
    with torch.no_grad():
        broken.model.lm_head.weight[7] = math.nan
    with pytest.raises(ValueError, match=r"no number \(NaN\): ' this' after …'Which one\?'"):
        broken.loglikelihood(_instances(("Which one?", " this")), disable_tqdm=True)


# Other architectures.


def _small(kind: str, **more: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    names = {
        "gpt2": {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "bloom": {"vocab_size": 400, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **names.get(kind, sizes), **more)).eval()
    with_weights(model)
    return model


@pytest.mark.parametrize(
    ("kind", "more", "reason"),
    [
        ("qwen2", {}, ""),
        ("qwen3", {}, ""),
        ("gpt2", {}, ""),
        ("olmo2", {}, ""),
        ("gemma3_text", {"sliding_window": 64}, ""),
        ("gemma3_text", {"sliding_window": 8}, "reaches back 8 tokens, and prompts may have 24"),
        ("mistral", {"sliding_window": 8}, "reaches back 8 tokens"),
        ("bloom", {}, "it takes no position_ids"),
    ],
)
def test_other_architectures_equal_lm_eval_and_those_that_cannot_share_do_not(
    kind: str, more: dict[str, Any], reason: str
) -> None:
    model = _small(kind, **more)
    why_not = why_not_shared(model, MAX_LENGTH)
    assert reason in why_not and bool(reason) == bool(why_not)
    lm = wrap(model, build_tokenizer(), batch_size=2, max_length=MAX_LENGTH, chat=False)
    asked = [(("", ""), list(range(5, 5 + n)), list(range(40, 40 + m))) for n in (3, 9, 30) for m in (1, 4, 7)]
    ours = lm._loglikelihood_tokens(asked, disable_tqdm=True)
    assert_same(ours, plain(lm, lambda: lm._loglikelihood_tokens(asked, disable_tqdm=True)))
