"""Rows laid end to end: none sees another, and everything is as if each stood alone.

The other side of every comparison is transformers' own attention over one row at a time or over padded rows, or the
definition of a segment as a dense mask; in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from smoltulu.tasks.trainer import packed_attention
from smoltulu.tasks.trainer.packed_attention import (
    PACKED,
    Segment,
    Segments,
    groups_of,
    pack,
    segments_of_lengths,
    segments_of_pairs,
)

VOCAB = 64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
# Short and long, so that they fall into several groups; one row of a single token.
LENGTHS = [7, 150, 1, 40, 149]


class Norm(torch.nn.Module):
    """RMSNorm that stays in float64; transformers' goes through float32 and hides what is below 1e-7."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden * (hidden.square().mean(dim=-1, keepdim=True) + self.epsilon).rsqrt()


def exact(model: Any) -> Any:
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = (
            Norm(layer.input_layernorm),
            Norm(layer.post_attention_layernorm),
        )
    model.model.norm = Norm(model.model.norm)
    return model.double().eval()


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return exact(LlamaForCausalLM(LlamaConfig(**SHAPE | changes)))


def grouped_queries() -> Any:
    """Grouped-query attention (four heads, two of keys), biases."""
    torch.manual_seed(0)
    return exact(Qwen2ForCausalLM(Qwen2Config(**SHAPE | {"num_key_value_heads": 2})))


def rows_of(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths]


def packed(rows: list[torch.Tensor]) -> dict[str, Any]:
    segments = segments_of_lengths([len(row) for row in rows])
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.tensor([segments.position_ids]),
        "segments": segments,
    }


def alone(model: Any, row: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of a row of its own, by transformers' plain attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    logits = model(input_ids=row[None]).logits[0]
    model.set_attn_implementation(before)
    return logits


def gradients(model: Any, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def weighted(logits: torch.Tensor) -> torch.Tensor:
    """A loss in which every logit counts differently."""
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()


# ----------------------------------------------------------------------------------------------------- segments by hand


def test_segments_of_rows_and_of_pairs_by_hand() -> None:
    rows = segments_of_lengths([3, 1, 2])
    assert rows.parts == (Segment((0, 3), ((0, 3),)), Segment((3, 4), ((3, 4),)), Segment((4, 6), ((4, 6),)))
    assert rows.num_tokens == 6 and rows.position_ids == [0, 1, 2, 0, 0, 1]

    # p p p c r r | p c c r: the rejected tokens go on where the prompt ends.
    pairs = segments_of_pairs([3, 1], [1, 2], [2, 1])
    assert pairs.parts == (
        Segment((0, 4), ((0, 4),)),
        Segment((4, 6), ((0, 3), (4, 6))),
        Segment((6, 9), ((6, 9),)),
        Segment((9, 10), ((6, 7), (9, 10))),
    )
    assert pairs.position_ids == [0, 1, 2, 3, 3, 4, 0, 1, 2, 1]
    assert segments_of_pairs([0], [1], [2]).parts[1] == Segment((1, 3), ((1, 3),))
    assert hash(pairs) == hash(segments_of_pairs([3, 1], [1, 2], [2, 1]))


def test_segments_that_leave_a_gap_are_refused() -> None:
    with pytest.raises(AssertionError, match="end to end"):
        Segments((Segment((0, 2), ((0, 2),)), Segment((3, 4), ((3, 4),))))


def test_groups_pad_only_where_it_costs_less_than_a_call() -> None:
    assert groups_of([30, 18, 25, 43]) == [[3, 0, 2, 1]]
    assert groups_of([1000, 990, 30, 40]) == [[0], [1], [3, 2]]
    assert groups_of([]) == []


# ------------------------------------------------------------------------------------------------------------- the same


@pytest.mark.parametrize("make", [llama, grouped_queries])
def test_packed_rows_are_as_alone(make: Callable[[], Any]) -> None:
    """Logits and the gradient of every parameter, to 1e-12 in float64."""
    model, rows = make(), rows_of(LENGTHS)
    expected = torch.cat([alone(model, row) for row in rows])
    expected_gradients = gradients(model, weighted(expected))
    pack(model)
    logits = model(**packed(rows)).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    for name, value in gradients(model, weighted(logits)).items():
        torch.testing.assert_close(value, expected_gradients[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [llama, grouped_queries])
def test_padded_rows_are_as_before(make: Callable[[], Any]) -> None:
    """Without segments, a packed model masks padding as SDPA does, and generates as it does."""
    model, rows = make(), rows_of([5, 9])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[0] * 4 + [1] * 5, [1] * 9])}
    model.set_attn_implementation("sdpa")
    expected = model(**batch).logits, model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
    pack(model)
    assert model.config._attn_implementation == PACKED
    assert torch.equal(model(**batch).logits, expected[0])
    assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0), expected[1])
    assert PACKED not in model.config.to_json_string()


@pytest.mark.parametrize("make", [llama, grouped_queries])
def test_pairs_with_one_prompt_are_two_rows(make: Callable[[], Any]) -> None:
    """Logits of prompt, chosen and rejected, and gradients, the prompt's computed once."""
    model = make()
    lengths = [(20, 30, 9), (110, 5, 60), (3, 1, 1)]
    expected, ids = [], []
    for index, (prompt_length, *others) in enumerate(lengths):
        prompt, chosen, rejected = rows_of([prompt_length, *others], seed=index)
        first, second = alone(model, torch.cat([prompt, chosen])), alone(model, torch.cat([prompt, rejected]))
        torch.testing.assert_close(first[:prompt_length], second[:prompt_length], rtol=0, atol=1e-12)
        expected += [first, second[prompt_length:]]
        ids += [prompt, chosen, rejected]
    want = torch.cat(expected)
    want_gradients = gradients(model, weighted(want))
    pack(model)
    segments = segments_of_pairs(*(list(side) for side in zip(*lengths, strict=True)))
    assert segments.num_tokens == sum(map(sum, lengths))
    positions = torch.tensor([segments.position_ids])
    logits = model(input_ids=torch.cat(ids)[None], position_ids=positions, segments=segments).logits[0]
    torch.testing.assert_close(logits, want, rtol=0, atol=1e-12)
    for name, value in gradients(model, weighted(logits)).items():
        torch.testing.assert_close(value, want_gradients[name], rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------------------------------------- no row sees another


def embedded(model: Any, rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, Segments]:
    """Input embeddings (1, T, d) that take a gradient, and logits (T, V)."""
    batch = packed(rows)
    inputs = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    return inputs, model(inputs_embeds=inputs, **batch).logits[0], batch["segments"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [llama, grouped_queries])
@pytest.mark.parametrize("row", range(len(LENGTHS)))
def test_a_row_is_bitwise_the_same_whatever_the_others_say(make: Callable[[], Any], dtype: Any, row: int) -> None:
    """Every token of every other row changed: the same logits, the same gradients; none reaches the others."""
    model = make().to(dtype)
    pack(model)
    before = rows_of(LENGTHS)
    after = [tokens if index == row else (tokens + 1 + index) % VOCAB for index, tokens in enumerate(before)]
    seen = []
    for rows in (before, after):
        inputs, logits, segments = embedded(model, rows)
        start, end = segments.parts[row].query
        by_parameter = gradients(model, weighted(logits[start:end]))
        outside = torch.cat([inputs.grad[0, :start], inputs.grad[0, end:]])
        assert torch.count_nonzero(outside) == 0 and torch.count_nonzero(inputs.grad[0, start:end]) > 0
        seen.append({"logits": logits[start:end], "inputs": inputs.grad[0, start:end], **by_parameter})
    assert [name for name in seen[0] if not torch.equal(seen[0][name], seen[1][name])] == []


def test_not_even_a_nan_goes_from_one_row_to_another() -> None:
    """All rows share one padded call here; a NaN in one would reach the others through any shared key, or 0 x NaN."""
    model = llama()
    pack(model)
    rows = rows_of([30, 25, 28])
    assert len(groups_of([len(row) for row in rows])) == 1
    _, clean, _ = embedded(model, rows)
    batch = packed(rows)
    inputs = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    inputs[0, 30:55] = torch.nan
    inputs.requires_grad_()
    logits = model(inputs_embeds=inputs, **batch).logits[0]
    assert torch.equal(logits[:30], clean[:30]) and torch.equal(logits[55:], clean[55:])
    assert logits[30:55].isnan().all()
    logits.sum().backward()
    assert inputs.grad[0, :30].isfinite().all() and inputs.grad[0, 55:].isfinite().all()


def test_rejected_tokens_do_not_see_the_chosen_ones_nor_the_other_way_round() -> None:
    model = llama()
    pack(model)
    segments = segments_of_pairs([10, 4], [8, 5], [6, 7])
    inputs = torch.randn(1, segments.num_tokens, 32, dtype=torch.float64, requires_grad=True)
    logits = model(inputs_embeds=inputs, position_ids=torch.tensor([segments.position_ids]), segments=segments).logits[
        0
    ]
    for start, end, seen in ((0, 18, range(18)), (18, 24, [*range(10), *range(18, 24)])):
        inputs.grad = None
        weighted(logits[start:end]).backward(retain_graph=True)
        touched = inputs.grad[0].abs().sum(dim=1).nonzero().flatten().tolist()
        assert touched == list(seen)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_attention_is_its_definition_as_a_dense_mask(data: st.DataObject) -> None:
    """Any pairs and any rows: softmax over the keys that a mask, written from the definition, lets through."""
    length = st.integers(1, 130)
    if data.draw(st.booleans()):
        sides = data.draw(st.lists(st.tuples(st.integers(0, 130), length, length), min_size=1, max_size=4))
        segments = segments_of_pairs(*(list(side) for side in zip(*sides, strict=True)))
    else:
        segments = segments_of_lengths(data.draw(st.lists(length, min_size=1, max_size=8)))
    num_tokens, generator = segments.num_tokens, torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(num_tokens, heads, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)
    )
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for part in segments.parts:
        keys = part.key_indices()
        for back, token in enumerate(reversed(range(*part.query))):
            mask[token, keys[: len(keys) - back]] = True
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(2, dim=1)) / 8**0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    expected = torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(2, dim=1))
    actual = packed_attention._by_sdpa(query, key, value, segments, None)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------- inside a real training


@pytest.mark.parametrize("reentrant", [False, True])
def test_segments_survive_the_recomputation_of_activation_checkpointing(reentrant: bool) -> None:
    """Through TRL's fused LM head, in training mode: the same gradients, bitwise, as with stored activations."""
    rows = rows_of(LENGTHS)
    results = []
    for checkpointing in (False, True):
        model = llama().float().train()
        pack(model)
        add_fused_lm_head(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        batch = packed(rows)
        output = model(**batch, labels=batch["input_ids"], fused_lm_head=True)
        results.append(gradients(model, output.loss))
    assert [name for name in results[0] if not torch.equal(results[0][name], results[1][name])] == []


class Shapes(TorchDispatchMode):
    """Shapes of all tensors that are made inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else [result]
        self.seen.update(tuple(value.shape) for value in outputs if isinstance(value, torch.Tensor))
        return result


def test_no_tensor_of_length_by_length_is_made() -> None:
    """Neither by transformers, which makes a dense mask for SDPA where positions begin again, nor by us."""
    lengths = [100] * 9

    def squares(model: Any, batch: dict[str, Any]) -> list[tuple[int, ...]]:
        with Shapes() as shapes:
            model(**batch, use_cache=False).last_hidden_state.sum().backward()
        return [shape for shape in shapes.seen if sum(size >= sum(lengths) for size in shape) > 1]

    model, batch = llama().train(), packed(rows_of(lengths))
    pack(model)
    assert squares(model.model, batch) == []
    model.set_attn_implementation("sdpa")
    batch.pop("segments")
    assert squares(model.model, batch) == [(1, 1, 900, 900)]


def test_bfloat16_autocast_casts_queries_and_keys_too() -> None:
    """RoPE makes them float32 again; the result is that of padded rows under the same autocast."""
    model, rows = llama().float(), rows_of([20, 33])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.set_attn_implementation("sdpa")
        expected = torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
        pack(model)
        logits = model(**packed(rows)).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-2)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_models_that_cannot_be_packed_are_refused_with_what_to_do() -> None:
    sizes = {name: value for name, value in SHAPE.items() if name != "tie_word_embeddings"}
    sliding = MistralForCausalLM(MistralConfig(**sizes, sliding_window=16))
    dropout = LlamaForCausalLM(LlamaConfig(**SHAPE | {"attention_dropout": 0.1}))
    for model, reason in ((sliding, "sliding_window"), (dropout, "attention_dropout 0.1")):
        with pytest.raises(ValueError, match=f"{reason}.*set compute.packing to false"):
            pack(model)


def test_a_model_that_loses_the_argument_on_its_way_is_refused() -> None:
    class Forgetful(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, position_ids: Any = None, segments: Any = None, **kwargs: Any) -> Any:
            return super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)

    with pytest.raises(ValueError, match=r"Forgetful does not pass `segments` on.*packing to false"):
        pack(Forgetful(LlamaConfig(**SHAPE)))


def test_what_the_varlen_kernel_is_told_by_hand() -> None:
    """Lengths of queries and keys, cumulated, and which keys; then the call itself, for shapes only, without a GPU."""
    segments = segments_of_pairs([3, 1], [1, 2], [2, 1])
    layout = packed_attention._varlen(segments, torch.device("cpu"))
    assert layout.cu_queries.tolist() == [0, 4, 6, 9, 10] and layout.cu_queries.dtype == torch.int32
    assert layout.cu_keys.tolist() == [0, 4, 9, 12, 14] and layout.cu_keys.dtype == torch.int32
    assert (layout.max_queries, layout.max_keys) == (4, 5)
    assert layout.keys is not None
    assert layout.keys.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 5, 6, 7, 8, 6, 9]
    assert packed_attention._varlen(segments_of_lengths([3, 2]), torch.device("cpu")).keys is None

    with FakeTensorMode(allow_non_fake_inputs=True):
        query, key, value = (
            torch.empty(10, heads, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)
        )
        output = packed_attention._by_varlen(query, key, value, segments, 0.25)
        output.sum().backward()
        assert output.shape == (10, 4, 16)
        assert key.grad is not None and key.grad.shape == (10, 2, 16)


@pytest.mark.parametrize("torch_2_11", [False, True])
def test_the_varlen_kernel_of_either_signature_is_told_the_same(
    monkeypatch: pytest.MonkeyPatch, torch_2_11: bool
) -> None:
    """By its definition, on a CPU: that of torch 2.11 has no `enable_gqa`."""

    def kernel(query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *,
               scale: float, window_size: tuple[int, int]) -> torch.Tensor:  # fmt: skip
        assert window_size == (-1, 0) and query.shape[1] == key.shape[1]
        made = []
        for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
            assert b - a <= max_q and d - c <= max_k
            scores = scale * torch.einsum("qhd,khd->hqk", query[a:b], key[c:d])
            later = torch.ones(b - a, d - c, dtype=torch.bool).triu(d - c - (b - a) + 1)
            made.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), value[c:d]))
        return torch.cat(made)

    def newer(query: Any, key: Any, value: Any, *args: Any, enable_gqa: bool = False, **kwargs: Any) -> torch.Tensor:
        assert enable_gqa
        return kernel(query, *(side.repeat_interleave(2, dim=1) for side in (key, value)), *args, **kwargs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel if torch_2_11 else newer)
    torch.manual_seed(0)
    segments = segments_of_pairs([3, 1], [1, 2], [2, 1])
    query, key, value = (torch.randn(10, heads, 16) for heads in (4, 2, 2))
    expected = packed_attention._by_sdpa(query, key, value, segments, 0.25)
    torch.testing.assert_close(packed_attention._by_varlen(query, key, value, segments, 0.25), expected)


# ------------------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_key_heads", [4, 2])
@pytest.mark.parametrize("pairs", [False, True])
def test_the_varlen_kernel_is_the_attention_by_sdpa(dtype: torch.dtype, num_key_heads: int, pairs: bool) -> None:
    """Outputs and gradients, against float32 on the same rounded inputs: within a few units of half precision."""
    torch.manual_seed(0)
    segments = segments_of_pairs([20, 300], [30, 5], [9, 100]) if pairs else segments_of_lengths([7, 300, 1, 64])
    shapes = [(segments.num_tokens, heads, 64) for heads in (4, num_key_heads, num_key_heads)]
    half = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    full = [tensor.detach().float().requires_grad_() for tensor in half]
    assert packed_attention._has_varlen(half[0]) and not packed_attention._has_varlen(full[0])
    weight = torch.randn(shapes[0], device="cuda")
    actual = packed_attention._by_varlen(half[0], half[1], half[2], segments, None)
    expected = packed_attention._by_sdpa(full[0], full[1], full[2], segments, None)
    (actual.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(actual.float(), expected, rtol=2e-2, atol=2e-2)
    for one, other in zip(half, full, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad.float(), other.grad, rtol=5e-2, atol=5e-2)
