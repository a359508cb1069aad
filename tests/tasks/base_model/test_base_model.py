"""The base model stage: builds, learns a little, and reloads as any Hugging Face model folder does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from smoltulu.schemas.base_model import BaseModelConfig
from smoltulu.tasks.base_model.scratch import build_base_model

TINY = BaseModelConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    num_steps=20,
    effective_batch_size=4,
    sequence_length=32,
    num_threads=1,
)
TEXTS = [f"Mia has {a} cups and finds {b}: {a}+{b}={a + b}." for a in range(20) for b in range(20)]

Built = tuple[Path, dict[str, float], list[Any]]  # folder, metrics, reports


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("base")
    reports: list[Any] = []
    metrics = build_base_model(TINY, TEXTS, folder, lambda *where, **metrics: reports.append((where, metrics)))
    return folder, metrics, reports


def quiet(step: int, num_steps: int, **metrics: float) -> None:
    """A report that nobody reads."""


def test_it_learns_and_reports(built: Built) -> None:
    _, metrics, reports = built
    assert metrics["loss"] < math.log(TINY.vocab_size) - 1  # what random weights have
    assert metrics["num_tokens"] == 20 * 4 * 32
    assert reports[-1][0] == (20, 20) and {"loss", "tokens_per_second"} <= set(reports[-1][1])


def test_it_reloads(built: Built) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = built[0]
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= {file.name for file in folder.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size <= TINY.vocab_size
    assert model.config.rope_parameters["rope_theta"] == TINY.rope_theta
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>" and tokenizer.pad_token == "<pad>"
    assert tokenizer.chat_template is None
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_tokens_are_digits_and_whole_headers_and_lose_nothing(built: Built) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(built[0])
    text = "<|user|>\nMia has 123 cups, né?\n<|assistant|>\n1+2=3\n\n#### 3 \U0001f98a"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    pieces = [tokenizer.decode([token]) for token in ids]
    assert pieces[:2] == ["<|user|>", "\n"] and "<|assistant|>" in pieces
    assert all(len(piece.strip()) == 1 for piece in pieces if any(letter.isdigit() for letter in piece))
    assert tokenizer("x<|endoftext|>")["input_ids"][-1] == tokenizer.eos_token_id


def test_tokens_of_a_prompt_do_not_depend_on_where_its_last_newline_stands(
    built: Built,
) -> None:
    """lm-eval moves it from the prompt to the answer: with the newline in the header's token the answer was empty."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(built[0])
    prompt, answer = "<|user|>\nHow many?\n<|assistant|>", "\n4"
    whole = tokenizer(prompt + answer)["input_ids"]
    assert whole == tokenizer(prompt)["input_ids"] + tokenizer(answer)["input_ids"]


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build_base_model(TINY, iter(TEXTS), tmp_path / name, quiet)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_a_stream_is_read_only_as_far_as_needed(tmp_path: Path) -> None:
    num_read = 0

    def endless() -> Any:
        nonlocal num_read
        while True:
            num_read += 1
            yield "some text that never ends " * 50

    config = TINY.model_copy(update={"max_texts": 30, "max_text_characters": 100, "num_steps": 0})
    assert build_base_model(config, endless(), tmp_path, quiet) == {"num_tokens": 0}
    assert num_read == 30


def test_no_text_and_odd_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text to learn from"):
        build_base_model(TINY, [" ", ""], tmp_path, quiet)
    with pytest.raises(ValueError, match="less than one sequence"):
        build_base_model(TINY, ["short"], tmp_path, quiet)
    with pytest.raises(ValidationError, match="not a multiple of num_attention_heads"):
        BaseModelConfig(hidden_size=130)
    with pytest.raises(ValidationError, match="above max_position_embeddings"):
        BaseModelConfig(sequence_length=1024)
