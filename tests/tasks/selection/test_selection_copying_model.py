"""A selector model made from scratch: it learns to copy, and has the tokenizer of the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from smoltulu.schemas.base_model import BaseModelConfig
from smoltulu.schemas.common import scientific
from smoltulu.tasks.base_model import scratch
from smoltulu.tasks.base_model.scratch import build_base_model

TEXTS = [f"Tom has {number} apples and a red box." for number in range(60)]
BASE = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64, "num_steps": 3, "effective_batch_size": 2, "sequence_length": 32, "num_threads": 1,
}  # fmt: skip


def build(folder: Path, **settings: Any) -> dict[str, float]:
    return build_base_model(BaseModelConfig(**BASE | settings), TEXTS, folder, lambda *_, **__: None)


def test_a_selector_model_has_the_base_models_tokenizer_byte_for_byte(tmp_path: Path) -> None:
    build(tmp_path / "base")
    build(tmp_path / "selector", texts="copying", hidden_size=32, num_hidden_layers=2, rope_theta=10_000.0, num_steps=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "base" / name).read_bytes() == (tmp_path / "selector" / name).read_bytes()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("base", "selector")]
    assert weights[0] != weights[1]


def test_it_learns_from_lookups_and_not_from_the_texts_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[str] = []
    original = scratch._pack

    def pack(tokenizer: Any, texts: list[str], config: Any) -> Any:
        learned.extend(texts)
        return original(tokenizer, texts, config)

    monkeypatch.setattr(scratch, "_pack", pack)
    build(tmp_path / "copying", texts="copying")
    assert len(learned) >= 100 and not set(learned) & set(TEXTS)
    assert sum('{"' in text for text in learned) > 20
    first = list(learned)
    learned.clear()
    build(tmp_path / "again", texts="copying")
    assert learned == first, "they follow from the seed"
    learned.clear()
    build(tmp_path / "other", texts="copying", seed=1)
    assert learned != first
    learned.clear()
    build(tmp_path / "given")
    assert set(learned) == set(TEXTS)


def test_a_base_model_keeps_its_key_and_other_texts_are_refused() -> None:
    assert "texts" not in scientific(BaseModelConfig())
    assert scientific(BaseModelConfig(texts="copying"))["texts"] == "copying"
    with pytest.raises(ValidationError, match="'given' or 'copying'"):
        BaseModelConfig(texts="copies")  # type: ignore[arg-type]
