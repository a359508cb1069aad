"""Retrieval scores: the row that generates a token is read, on models whose copying heads are known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from smoltulu.schemas.selection import HeadSettings
from smoltulu.tasks.selection import retrieval
from smoltulu.tasks.selection.heads import choose_heads
from smoltulu.tasks.selection.masking import masked, masked_passes
from smoltulu.tasks.selection.probes import Probe
from smoltulu.tasks.selection.retrieval import (
    Reading,
    attended_positions,
    batch_of,
    choices,
    generating_rows,
    hits_of,
    read_probes,
    retrieval_scores,
)
from tests.induction_model import PREVIOUS_TOKEN_HEAD, induction_model, induction_probes


def only(num_layers: int, num_heads: int, heads: Sequence[tuple[int, int]]) -> list[list[float]]:
    return [[float((layer, head) in heads) for head in range(num_heads)] for layer in range(num_layers)]


@pytest.mark.parametrize("num_key_value_heads", [4, 2])
def test_the_one_induction_head_scores_one_and_all_others_zero(num_key_value_heads: int) -> None:
    readings = read_probes(induction_model((2,), num_key_value_heads=num_key_value_heads), induction_probes(), 0)
    assert all(reading.is_right for reading in readings)
    assert retrieval_scores(readings) == only(2, 4, [(1, 2)])


def test_a_reader_of_the_row_of_the_answer_itself_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by one, as a public port reads: row t looks for what follows w."""
    assert generating_rows((7, 10)) == [6, 7, 8]
    monkeypatch.setattr(retrieval, "generating_rows", lambda answer: [row + 1 for row in generating_rows(answer)])
    monkeypatch.setattr(retrieval, "choices", lambda model, hidden, probe: torch.ones(3, dtype=torch.bool))
    readings = read_probes(induction_model((2,)), induction_probes(), 0)
    assert retrieval_scores(readings) == only(2, 4, [])


def accuracy(model: LlamaForCausalLM, probes: Sequence[Probe], heads: Sequence[tuple[int, int]]) -> float:
    with torch.no_grad():
        _, hidden = masked_passes(model, [heads], "uniform", batch_of(probes, 0, "cpu"))
        return sum(bool(choices(model, hidden[n], probe).all()) for n, probe in enumerate(probes)) / len(probes)


def test_six_heads_that_do_the_same_are_too_many_for_the_top_five_percent() -> None:
    """The redundancy case: two of 32 heads are the top 5 %, and without them nothing changes."""
    copying, probes = (0, 1, 3, 4, 6, 7), induction_probes()
    model = induction_model(copying, num_layers=4, num_heads=8)
    scores = retrieval_scores(read_probes(model, probes, 0))
    assert scores == only(4, 8, [(1, head) for head in copying])
    share = choose_heads(scores, HeadSettings(rule="top_share", top_share=0.05))
    assert share.heads == [(1, 0), (1, 1)] and share.tied == [(1, 3), (1, 4), (1, 6), (1, 7)]
    assert accuracy(model, probes, share.heads) == 1
    threshold = choose_heads(scores, HeadSettings())
    assert threshold.rule == "threshold" and not threshold.tied
    assert threshold.heads == [(1, head) for head in copying]
    assert accuracy(model, probes, threshold.heads) == 0
    assert accuracy(model, probes, [(1, 2), (1, 5), (2, 0), (2, 1), (3, 0), (3, 1)]) == 1


def test_a_head_upstream_breaks_the_lookup_and_has_no_score() -> None:
    """So a control set that holds it is not neutral."""
    model, probes = induction_model((2,)), induction_probes()
    layer, head = PREVIOUS_TOKEN_HEAD
    assert retrieval_scores(read_probes(model, probes, 0))[layer][head] == 0
    assert accuracy(model, probes, [PREVIOUS_TOKEN_HEAD]) == 0
    assert accuracy(model, probes, [(0, 0)]) == 1


def test_probes_that_the_model_cannot_do_count_for_nothing() -> None:
    hits = [[1.0, 0.5]]
    assert retrieval_scores([Reading(hits, [True, True, False]), Reading([[0.0, 0.0]], [False] * 3)]) == hits
    assert retrieval_scores([Reading(hits, [True, False]), Reading(hits, [False, False])]) == [[0.0, 0.0]]
    assert Reading(hits, [True, True]).is_right and not Reading(hits, [True, False]).is_right


def test_a_hit_is_the_same_token_inside_the_needle_and_the_models_own_choice() -> None:
    ids = torch.tensor([5, 7, 8, 9, 5, 7, 8, 9])  # the needle is 7 8 9, at 1 to 3; the answer stands at 5 to 7
    attended = torch.tensor([[1, 2, 3], [2, 2, 3], [5, 2, 3], [0, 0, 0]])
    every = torch.ones(3, dtype=torch.bool)
    made = hits_of(attended, ids, (1, 4), (5, 8), every)
    # All; one other token of the needle; the right token outside of the needle; nothing.
    assert made.tolist() == pytest.approx([1, 2 / 3, 2 / 3, 0])
    assert hits_of(attended, ids, (1, 4), (5, 8), torch.tensor([True, False, True])).tolist() == pytest.approx(
        [2 / 3, 1 / 3, 1 / 3, 0]
    )


@given(seed=st.integers(0, 10_000), left=st.integers(0, 3), right=st.integers(0, 3), chunk=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_attended_positions_are_those_of_the_full_attention(seed: int, left: int, right: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    length = 12
    query = torch.randn(6, length, 8, generator=generator)
    key = torch.randn(2, length, 8, generator=generator)
    visible = torch.ones(length, length).tril().bool()
    visible[:, :left] = False
    visible[:, length - right :] = False
    rows = list(range(left, length - right))
    logits = (query @ key.repeat_interleave(3, 0).transpose(1, 2)).masked_fill(~visible, -torch.inf) * 0.3
    before, retrieval.CHUNK_ROWS = retrieval.CHUNK_ROWS, chunk
    try:
        found = attended_positions(query, key, visible, rows, 0.3)
    finally:
        retrieval.CHUNK_ROWS = before
    assert torch.equal(found, logits[:, rows].softmax(-1).argmax(-1))


def test_positions_equal_those_of_eager_attention_in_any_batch() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.5, attn_implementation="eager", pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    probes = [*induction_probes(2), *induction_probes(2, needle_length=5)]
    alone = [read_probes(model, [probe], 0)[0] for probe in probes]
    assert read_probes(model, probes, 0) == alone
    for probe, reading in zip(probes, alone, strict=True):
        ids = torch.tensor([probe.input_ids])
        rows = generating_rows(probe.answer)
        with torch.no_grad():
            made = model(input_ids=ids, output_attentions=True)
        truth = torch.stack([layer[0, :, rows].argmax(-1) for layer in made.attentions])
        chosen = made.logits[0, rows].argmax(-1) == ids[0, probe.answer[0] :]
        assert reading.chosen == chosen.tolist()
        assert reading.hits == hits_of(truth, ids[0], probe.needle, probe.answer, chosen).tolist()


def test_reading_leaves_the_model_as_it_was_and_other_heads_can_be_masked() -> None:
    model, probes = induction_model((2,)), induction_probes(2)
    ids = torch.tensor([probes[0].input_ids])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        read_probes(model, probes, 0)
        with masked(model, [(1, 2)]):
            other = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, before) and not torch.equal(other, before)
