"""Texts that a selector model for selection learns from: the world's, lookups, or both; the tokenizer is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from smoltulu.schemas.base_model import BaseModelConfig
from smoltulu.tasks.base_model.scratch import _copying_texts, build_base_model
from smoltulu.tasks.models.folders import load_tokenizer

TEXTS = [f"the cat number {number} sat on the mat" for number in range(300)]
SMALL = {"vocab_size": 320, "hidden_size": 72, "intermediate_size": 16, "num_hidden_layers": 2, "sequence_length": 32,
         "num_attention_heads": 6, "tie_word_embeddings": False, "rope_theta": 1e8}  # fmt: skip


def config(texts: str, **changes: int) -> BaseModelConfig:
    return BaseModelConfig.model_validate({**SMALL, "num_steps": 2, "texts": texts, **changes})


def test_both_has_half_as_many_copying_texts_as_copying_and_given_has_none() -> None:
    steps = {"num_steps": 1000}
    numbers = {name: len(_copying_texts(config(name, **steps))) for name in ("given", "copying", "both")}
    tokens = 1000 * 16 * 32
    assert numbers == {"given": 0, "copying": 100 + tokens // 80, "both": 100 + tokens // 160}
    assert _copying_texts(config("copying", **steps))[:50] == _copying_texts(config("both", **steps))[:50]


@pytest.mark.parametrize("texts", ["copying", "both"])
def test_a_selector_model_for_selection_has_the_tokenizer_of_the_texts_given(texts: str, tmp_path: Path) -> None:
    seen = []
    for name in ("given", texts):
        build_base_model(config(name), TEXTS, tmp_path / name, lambda step, number, **metrics: seen.append(metrics))
    one, other = (load_tokenizer(tmp_path / name, "{{ messages }}") for name in ("given", texts))
    assert one.get_vocab() == other.get_vocab() and one(TEXTS[0]).input_ids == other(TEXTS[0]).input_ids
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("given", texts)]
    assert weights[0] != weights[1] and len(seen) == 2
