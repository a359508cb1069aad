"""A selector model made from scratch: it learns to copy, and has the tokenizer of the base model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from smoltulu.flows.recipe import load_recipe
from smoltulu.schemas.base_model import BaseModelConfig
from smoltulu.schemas.common import scientific
from smoltulu.tasks.base_model import scratch
from smoltulu.tasks.base_model.copying import PLANTED
from smoltulu.tasks.base_model.scratch import build_base_model
from smoltulu.tasks.selection.attention import attend_with_heads

TEXTS = [f"Tom has {number} apples and a red box." for number in range(60)]
BASE = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 512, "num_steps": 3, "effective_batch_size": 2, "sequence_length": 32, "num_threads": 1,
}  # fmt: skip
#: What a model that is to copy must have.
ROOM: dict[str, Any] = {
    "hidden_size": 128, "num_attention_heads": 8, "num_hidden_layers": 2, "tie_word_embeddings": False,
    "rope_theta": 1e8, "initializer_range": 0.02, "texts": "copying",
}  # fmt: skip


def build(folder: Path, **settings: Any) -> dict[str, float]:
    return build_base_model(BaseModelConfig(**BASE | settings), TEXTS, folder, lambda *_, **__: None)


def test_a_selector_model_has_the_base_models_tokenizer_byte_for_byte(tmp_path: Path) -> None:
    build(tmp_path / "base")
    build(tmp_path / "selector", **ROOM | {"num_steps": 2})
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
    build(tmp_path / "copying", **ROOM)
    assert len(learned) >= 100 and not set(learned) & set(TEXTS)
    assert sum('{"' in text for text in learned) > 20
    first = list(learned)
    learned.clear()
    build(tmp_path / "again", **ROOM)
    assert learned == first, "they follow from the seed"
    learned.clear()
    build(tmp_path / "other", **ROOM, seed=1)
    assert learned != first
    learned.clear()
    build(tmp_path / "given")
    assert set(learned) == set(TEXTS)


def test_a_base_model_keeps_its_key_and_other_texts_are_refused() -> None:
    assert "texts" not in scientific(BaseModelConfig())
    assert scientific(BaseModelConfig(**BASE | ROOM))["texts"] == "copying"
    with pytest.raises(ValidationError, match="'given', 'copying'"):
        BaseModelConfig(texts="copies")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_hidden_layers", 1, "num_hidden_layers 1 (allowed: 2 or more)"),
        ("tie_word_embeddings", True, "tie_word_embeddings True (allowed: false)"),
        ("rope_theta", 500.0, "rope_theta 500.0 (allowed: 1e8 or more)"),
        ("num_attention_heads", 16, "hidden_size / num_attention_heads 8 (allowed: 12 or more)"),
        ("num_attention_heads", 4, "num_attention_heads 4 (allowed: 6 or more)"),
        ("mup", {"base_width": 128}, "mup set (allowed: none)"),
    ],
)
@pytest.mark.parametrize("texts", ["copying", "both"])
def test_a_model_without_room_for_the_circuit_is_refused(field: str, value: Any, said: str, texts: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        BaseModelConfig(**BASE | ROOM | {field: value, "texts": texts})


def test_the_first_weights_copy(tmp_path: Path) -> None:
    """Without a step of training: heads of layer 0 look back, and those of layer 1 copy."""
    build(tmp_path, **ROOM | {"num_steps": 0})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    seen: dict[int, torch.Tensor] = {}

    def watch(layer: int, query: Any, key: Any, mask: Any, scaling: float) -> None:
        logits = (query[0] @ key[0].transpose(1, 2) * scaling).masked_fill(~mask[0, 0], -torch.inf)
        seen[layer] = logits.softmax(-1)

    generator = torch.Generator().manual_seed(0)
    segment = torch.randperm(200, generator=generator)[:60] + 40  # no token twice
    ids = torch.cat([segment, segment, segment])
    with torch.no_grad(), attend_with_heads(model, watcher=watch):
        logits = model(input_ids=ids[None]).logits[0]
    places = torch.arange(len(ids))
    num_back = 5
    for number in range(num_back):
        assert torch.equal(seen[0][number].argmax(-1)[10:], places[10:] - number - 1)
        assert seen[0][number].max(-1).values[10:].min() > 0.9
    # Heads of layer 1 look at what followed the same token before, once or twice.
    looked = ids[seen[1][0].argmax(-1)]
    assert (looked[70:-1] == ids[71:]).float().mean() > 0.8
    assert (logits[70:-1].argmax(-1) == ids[71:]).float().mean() > 0.8
    assert (logits[10:59].argmax(-1) == ids[11:60]).float().mean() < 0.1, "what comes for the first time is unknown"
    # One offset more would look one token too far.
    assert (looked[70:-2] == ids[72:]).float().mean() < 0.1
    assert len(tokenizer) == model.config.vocab_size
    assert getattr(model.config, PLANTED) is True, "whoever uses it is told"


def test_the_selector_of_the_recipe_tiny_has_the_tokenizer_of_its_base_model() -> None:
    """What a tokenizer and its files are made of is the same in both."""
    recipe = load_recipe("tiny")
    assert recipe.selection is not None and recipe.selection.model is not None
    one, other = recipe.base_model.scratch, recipe.selection.model.scratch
    assert one is not None and other is not None and other.texts != "given"
    for name in ("vocab_size", "max_texts", "max_text_characters", "max_position_embeddings"):
        assert getattr(one, name) == getattr(other, name), name
    assert recipe.selection.probes.max_tokens <= other.max_position_embeddings
    assert recipe.selection.method == "none", "the recipe selects nothing by itself"
