"""What every engine must keep, tried on those of transformers, and the random numbers behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
)

from smoltulu.tasks.generation.engines import TransformersEngine
from smoltulu.tasks.generation.interface import (
    TOKENS,
    Request,
    Sampling,
    random_words,
    seed_of_request,
    uniform_draws,
)
from smoltulu.tasks.models.folders import load_language_model
from smoltulu.tasks.training.rollout_engine import Writer
from smoltulu.tasks.training.rollouts import Backend
from tests.tiny_model import build_tiny_model

STOPS, PAD, LONGEST = [0, *range(200, 240)], 1, 12
PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15, 16, 17, 18], [19, 20], [7, 8, 9]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_language_model(build_tiny_model(tmp_path_factory.mktemp("policy")))


def backend(policy: Any, batch_size: int | None = None, **options: Any) -> Backend:
    given = {"seed": 3, "max_new_tokens": LONGEST, "temperature": 1.3, "stop_ids": tuple(STOPS)}
    return Writer(TransformersEngine(policy, pad_id=PAD, batch_size=batch_size), Sampling(**given | options))


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


_SMALL: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "initializer_range": 0.3,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**_SMALL, num_key_value_heads=1),
        MistralConfig(**_SMALL, num_key_value_heads=1, sliding_window=5),
        GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3),
    ],
    ids=lambda config: config.model_type,
)
def test_rows_that_ended_are_refilled_and_no_text_changes(config: Any) -> None:
    """Whatever the cache: grouped heads; windows, where a batch is finished first; positions that are learned."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_, **__: passes.append(1))
    random = np.random.default_rng(1)
    lengths = random.integers(20, 50, 24)
    asked = [Request(random.integers(2, 400, length).tolist(), 0, place, 0) for place, length in enumerate(lengths)]
    options: dict[str, Any] = {"max_new_tokens": 16, "temperature": 0.8, "stop_ids": tuple(range(0, 400, 8))}
    alone = [backend(model, **options)([one])[0] for one in asked]
    assert len({len(one.ids) for one in alone}) > 6
    reports: list[tuple[int, int]] = []
    for batch_size in (5, 24):
        reports.clear()
        passes.clear()
        engine, sampling = TransformersEngine(model, pad_id=PAD, batch_size=batch_size), Sampling(seed=3, **options)
        together = engine.generate(asked, sampling, lambda *report: reports.append(report))
        assert [one.ids for one in together] == [one.ids for one in alone]
        for one, other in zip(together, alone, strict=True):
            assert one.logps == pytest.approx(other.logps, abs=1e-4)
        assert reports[-1] == (24, 24) and sorted(reports) == reports
        if batch_size == 5 and config.model_type != "mistral":
            # Full batches: hardly more passes than tokens need, and the last rows and each reading besides.
            assert len(passes) < sum(len(one.ids) for one in alone) / 5 * 1.35 + 16


def test_a_row_that_is_over_takes_no_place_that_no_text_could_have() -> None:
    """The positions are as many as a prompt and its answer need. A row that ended waits for others, and grows."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=36, bos_token_id=0, eos_token_id=0)
    model, random = AutoModelForCausalLM.from_config(config).eval(), np.random.default_rng(0)
    asked = [Request(random.integers(2, 400, 20).tolist(), 0, place, 0) for place in range(30)]
    for seed in range(4):
        options: dict[str, Any] = {"max_new_tokens": 16, "stop_ids": tuple(range(0, 400, 40)), "seed": seed}
        together = backend(model, batch_size=10, temperature=1.0, **options)(asked)
        assert len(together) == 30 and max(len(one.ids) for one in together) == 16


def test_greedy_texts_are_those_of_generate_and_have_no_logps(policy: Any) -> None:
    asked = requests()
    for one in backend(policy, batch_size=4, temperature=0.0)(asked):
        assert one.logps == []
    made = backend(policy, batch_size=4, temperature=0.0, stop_ids=())(asked)
    for request, one in zip(asked, made, strict=True):
        ids = torch.tensor([request.prompt_ids])
        said = policy.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=LONGEST,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=PAD,
        )
        assert one.ids == said[0, ids.shape[1] :].tolist() and not one.stopped


def test_a_callers_own_draws_stand_for_those_of_the_key(policy: Any) -> None:
    sampling = Sampling(LONGEST, 1.3, tuple(STOPS), seed=3)
    own = [Request(one.prompt_ids, 9, 9, 9, uniform_draws(3, one, LONGEST)) for one in requests()]
    engine = TransformersEngine(policy, pad_id=PAD)
    assert engine.generate(own, sampling) == engine.generate(requests(), sampling)


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
    draw = Writer(TransformersEngine(model, pad_id=1), Sampling(1, 0.8, (0,), seed=9))
    seen = Counter(one.ids[0] for one in draw([Request([3, 4], 0, 0, sample) for sample in range(count)]))
    statistic = sum((seen[token] - count * p) ** 2 / (count * p) for token, p in enumerate(expected.tolist()))
    assert statistic < 24.3  # p = 0.001


class _Casts(TorchDispatchMode):
    """Counts casts of matrices to bfloat16: weights of linear layers."""

    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and made.dtype == torch.bfloat16 and made.dim() == 2:
            self.number += 1
        return made


@pytest.mark.parametrize("is_frozen", [False, True])
def test_under_autocast_weights_are_cast_once_not_for_every_token(policy: Any, is_frozen: bool) -> None:
    """Also those of a copy of the policy, and of the model below an adapter, which have no gradients."""
    around = partial(torch.autocast, "cpu", torch.bfloat16)
    engine = TransformersEngine(policy, pad_id=PAD, around=around)
    policy.requires_grad_(not is_frozen)
    try:
        numbers = []
        for length in (2, 12):
            with _Casts() as casts:
                engine.generate(requests(), Sampling(length, 1.3, (), seed=3))
            numbers.append(casts.number)
        assert numbers[0] == numbers[1] > 0
        assert all(one.requires_grad != is_frozen for one in policy.parameters())
    finally:
        policy.requires_grad_(True)


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


def test_an_engine_that_draws_by_itself_gets_a_seed_for_each_request() -> None:
    sampling = Sampling(4, 1.0, (0,), seed=123)
    asked = [Request([1], batch, prompt, sample) for batch in range(5) for prompt in range(5) for sample in range(5)]
    seeds = {seed_of_request(one, sampling) for one in asked}
    assert len(seeds) == 125 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of_request(Request([1], 3, 7, 1), sampling) == 9983026837129735861 >> 1


def test_a_stop_string_ends_a_text_with_the_token_that_completes_it(policy: Any) -> None:
    """Whatever tokens it is made of: the decoder writes 'x' for even ids and 'y' for odd ones."""

    def decode(ids: Sequence[int]) -> str:
        return "".join("xy"[one % 2] for one in ids)

    asked = requests()
    free = backend(policy, stop_ids=())(asked)
    engine = TransformersEngine(policy, pad_id=PAD, batch_size=4, decode=decode)
    made = engine.generate(asked, Sampling(LONGEST, 1.3, (), seed=3, stop_strings=("xyx", "yyyy")))
    lengths = set()
    for one, whole in zip(made, free, strict=True):
        found = [decode(whole.ids).find(stop) + len(stop) for stop in ("xyx", "yyyy") if stop in decode(whole.ids)]
        assert one.ids == whole.ids[: min(found, default=LONGEST)] and not one.stopped
        lengths.add(len(one.ids))
    assert len(lengths) > 3
