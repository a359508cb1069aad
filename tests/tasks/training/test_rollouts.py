"""What every backend of rollouts must keep, tried on transformers', and the random numbers behind them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from smoltulu.tasks.models.folders import load_language_model
from smoltulu.tasks.training.rollouts import (
    TOKENS,
    Backend,
    Request,
    prompts_of_batch,
    random_words,
    shuffled,
    transformers_backend,
    uniform_draws,
)
from tests.tiny_model import build_tiny_model

STOPS, PAD, LONGEST = [0, *range(200, 240)], 1, 12
PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15, 16, 17, 18], [19, 20], [7, 8, 9]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_language_model(build_tiny_model(tmp_path_factory.mktemp("policy")))


def backend(policy: Any, **options: Any) -> Backend:
    given = {"seed": 3, "max_new_tokens": LONGEST, "temperature": 1.3, "stop_ids": STOPS, "pad_id": PAD}
    return transformers_backend(policy, **given | options)


def requests(batch: int = 0) -> list[Request]:
    return [Request(ids, batch, prompt, sample) for prompt, ids in enumerate(PROMPTS) for sample in range(3)]


# ------------------------------------------------------------------------------------------------------ the contract


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"batch_size": 4}])
def test_ids_end_where_they_should_and_logps_are_those_of_the_policy(policy: Any, options: Any) -> None:
    asked = requests()
    written = backend(policy, **options)(asked)
    assert len(written) == len(asked) and policy.training is False
    assert {len(one.ids) for one in written if not one.stopped} == {LONGEST}
    assert any(one.stopped for one in written) and not all(one.stopped for one in written)
    for request, one in zip(asked, written, strict=True):
        assert one.stopped == (one.ids[-1] in STOPS) and not set(one.ids[:-1]) & set(STOPS)
        ids = torch.tensor([[*request.prompt_ids, *one.ids]])
        with torch.no_grad():
            logps = torch.log_softmax(policy(ids).logits[0, :-1] / 1.3, -1)
        start = len(request.prompt_ids) - 1
        expected = logps[torch.arange(start, start + len(one.ids)), ids[0, start + 1 :]]
        torch.testing.assert_close(torch.tensor(one.logps), expected, rtol=0, atol=2e-5)


def test_a_rollout_depends_on_its_own_request_alone(policy: Any) -> None:
    """Whatever the batches, the order, the neighbours; and what an interrupted run had written already."""
    asked = requests()
    whole = [one.ids for one in backend(policy)(asked)]
    assert [one.ids for one in backend(policy, batch_size=4)(asked)] == whole
    assert [one.ids for one in backend(policy)(asked[::-1])][::-1] == whole
    assert [one.ids for one in backend(policy)(asked[5:])] == whole[5:]
    assert [backend(policy)([request])[0].ids for request in asked] == whole
    assert backend(policy)([]) == []
    # Equal prompts, other numbers: other answers. And so for samples, batches and seeds.
    assert len({tuple(ids) for ids in whole}) == len(whole)
    assert not any(a == b.ids for a, b in zip(whole, backend(policy)(requests(1)), strict=True))
    assert not any(a == b.ids for a, b in zip(whole, backend(policy, seed=4)(asked), strict=True))


def test_every_token_comes_with_its_probability() -> None:
    """Eight tokens, one drawn: no top-k and no top-p, at a temperature; chi-squared with 7 degrees of freedom."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        expected = torch.softmax(model(torch.tensor([[3, 4]])).logits[0, -1] / 0.8, -1)
    assert expected.max() / expected.min() > 10
    count = 4000
    draw = transformers_backend(model, seed=9, max_new_tokens=1, temperature=0.8, stop_ids=[0], pad_id=1)
    seen = Counter(one.ids[0] for one in draw([Request([3, 4], 0, 0, sample) for sample in range(count)]))
    statistic = sum((seen[token] - count * p) ** 2 / (count * p) for token, p in enumerate(expected.tolist()))
    assert statistic < 24.3  # p = 0.001


def test_a_policy_that_trains_keeps_training(policy: Any) -> None:
    policy.train()
    try:
        backend(policy)(requests()[:2])
        assert policy.training
    finally:
        policy.eval()


# ----------------------------------------------------------------------------------------------------- random numbers


def test_draws_are_a_function_of_their_key() -> None:
    """The first words of a counter are fixed: an old checkpoint must go on with the same rollouts for ever."""
    request = Request([1], batch=3, prompt=7, sample=1)
    draws = uniform_draws(123, request, 9)
    assert draws.dtype == np.float32 and draws[:4].tolist() == uniform_draws(123, request, 4).tolist()
    assert random_words(123, TOKENS, (1, 7, 3), 2).tolist() == [9983026837129735861, 17780944775605963010]
    # Token t is in block t // 4 of the counter: it could be drawn alone.
    assert (np.random.Philox(key=[123, TOKENS], counter=[1, 1, 7, 3]).random_raw(4) >> np.uint64(40)).tolist() == [
        int(draw * 2**24) for draw in draws[4:8]
    ]


def test_draws_are_uniform_and_never_one() -> None:
    many = np.concatenate([uniform_draws(1, Request([1], batch, 5, 0), 500) for batch in range(40)])
    counts = np.histogram(many, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # 19 degrees of freedom, p = 0.001
    assert many.min() >= 0 and many.max() < 1
    assert (np.full(1, 2**64 - 1, np.uint64) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24) < 1


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_epochs_lie_end_to_end_and_each_has_every_row_once(num_rows: int, num_prompts: int, seed: int) -> None:
    num_batches = -(-3 * num_rows // num_prompts)
    batches = [prompts_of_batch(seed, batch, num_prompts, num_rows) for batch in range(num_batches)]
    assert {len(lines) for lines in batches} == {num_prompts}
    stream = list(itertools.chain(*batches))
    for epoch in range(3):
        of_epoch: Sequence[int] = stream[epoch * num_rows : (epoch + 1) * num_rows]
        assert sorted(of_epoch) == list(range(num_rows))
        assert of_epoch == shuffled(seed, 2, (epoch, 0, 0), num_rows)
