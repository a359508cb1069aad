"""Bases that are set up otherwise than ours: eos as the pad token, dropout under any name."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PersimmonConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from smoltulu.tasks.models.folders import switch_dropout_off
from smoltulu.tasks.trainer.packed_attention import pack
from tests.small_runs import conversations, pairs, run
from tests.tiny_model import build_tiny_model

NUM_TOKENS = 400


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


# ------------------------------------------------------------------------------------------------------- pad was eos


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_eos_is_trained_where_the_base_padded_with_it(base: Path, tmp_path: Path, stage: str) -> None:
    """Its row of the embeddings gets the gradient that it gets where the base pads with another token.

    The head is its own here: the gradient of a tied one would reach the row all the same.
    """
    rows = conversations(4) if stage == "sft" else pairs(4)
    trained = []
    for pad_token_id in (0, 1):
        model = Path(shutil.copytree(base, tmp_path / f"model-{pad_token_id}"))
        weights = load_file(model / "model.safetensors")
        save_file(
            weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()},
            model / "model.safetensors", {"format": "pt"},
        )  # fmt: skip
        config = json.loads((model / "config.json").read_text())
        config |= {"pad_token_id": pad_token_id, "tie_word_embeddings": False}
        (model / "config.json").write_text(json.dumps(config))
        # Two turns, so that an eos stands before something.
        finished = run(stage, tmp_path / str(pad_token_id), model, rows, {"max_steps": 2, "num_train_epochs": 2})
        trained.append(load_file(finished.model / "model.safetensors"))
    embeddings = [weights["model.embed_tokens.weight"] for weights in trained]
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(embeddings[0][0], before[0]) and torch.equal(embeddings[0][1], before[1])
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


# ----------------------------------------------------------------------------------------------------------- dropout


def small(config: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    sizes: dict[str, Any] = {
        "vocab_size": NUM_TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
    }  # fmt: skip
    return config(**sizes | changes)


NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
ATTENTION = {
    "llama": (small(LlamaConfig, intermediate_size=64, attention_dropout=0.25), "attention_dropout 0.25"),
    "gpt2": (small(GPT2Config, **NO_DROPOUT | {"attn_pdrop": 0.25}), "attn_pdrop 0.25"),
    "gpt_neox": (small(GPTNeoXConfig, intermediate_size=64, attention_dropout=0.25), "attention_dropout 0.25"),
    "phi": (small(PhiConfig, intermediate_size=64, attention_dropout=0.25), "attention_dropout 0.25"),
    "opt": (small(OPTConfig, ffn_dim=64, word_embed_proj_dim=32, attention_dropout=0.25), "attention_dropout 0.25"),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_packing_refuses_dropout_in_attention_under_any_name(name: str) -> None:
    config, said = ATTENTION[name]
    model = AutoModelForCausalLM.from_config(config)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"dropout in its attention \(.*{said}.*\).*set compute\.packing to false"):
        pack(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_elsewhere_is_no_matter_of_packing() -> None:
    model = AutoModelForCausalLM.from_config(small(GPT2Config, **NO_DROPOUT | {"resid_pdrop": 0.5}))
    state = torch.get_rng_state()
    pack(model)
    assert torch.equal(torch.get_rng_state(), state)


ALL_DROPOUT = {
    "llama": small(LlamaConfig, intermediate_size=64, attention_dropout=0.5),
    "gpt2": small(GPT2Config, attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5),
    "gpt_neox": small(GPTNeoXConfig, intermediate_size=64, attention_dropout=0.5, hidden_dropout=0.5),
    "phi": small(PhiConfig, intermediate_size=64, attention_dropout=0.5, embd_pdrop=0.5, resid_pdrop=0.5),
    "bloom": BloomConfig(vocab_size=NUM_TOKENS, hidden_size=32, n_layer=2, n_head=2, hidden_dropout=0.5,
                         attention_dropout=0.5),
    "opt": small(OPTConfig, ffn_dim=64, word_embed_proj_dim=32, attention_dropout=0.5, dropout=0.5),
    "mixtral": small(MixtralConfig, intermediate_size=64, attention_dropout=0.5, num_key_value_heads=2,
                     num_local_experts=2, num_experts_per_tok=1),
    # These read a rate from their config in every forward.
    "falcon": small(FalconConfig, attention_dropout=0.5, hidden_dropout=0.5),
    "persimmon": small(PersimmonConfig, intermediate_size=64, attention_dropout=0.5, hidden_dropout=0.5),
}  # fmt: skip


def outputs(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None], use_cache=False).logits


@pytest.mark.parametrize("name", ALL_DROPOUT)
def test_all_dropout_is_switched_off(name: str) -> None:
    model = AutoModelForCausalLM.from_config(ALL_DROPOUT[name])
    expected = outputs(model.eval())
    assert not torch.equal(outputs(model.train()), expected)
    switch_dropout_off(copy.deepcopy(model))
    switch_dropout_off(model)
    assert torch.equal(outputs(copy.deepcopy(model)), expected)
    rates = {name: value for name, value in ALL_DROPOUT[name].to_dict().items() if "drop" in name}
    assert {name: getattr(model.config, name) for name in rates} == rates, "the config that is saved lost its rates"


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("stage", ["dpo", "reward_model"])
def test_stages_without_dropout_take_a_base_that_has_some(
    base: Path, tmp_path: Path, stage: str, packing: bool
) -> None:
    """And train it as one that has none."""
    trained = []
    for rate in (0.5, 0.0):
        model = Path(shutil.copytree(base, tmp_path / f"model-{rate}"))
        config = json.loads((model / "config.json").read_text()) | {"attention_dropout": rate}
        (model / "config.json").write_text(json.dumps(config))
        made = run(
            stage, tmp_path / str(rate), model, pairs(4), {"max_steps": 2, "num_train_epochs": 2}, packing=packing
        )
        trained.append(load_file(made.model / "model.safetensors"))
        assert json.loads((made.model / "config.json").read_text())["attention_dropout"] == rate
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_sft_trains_with_the_dropout_of_a_base_that_is_not_packed(base: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(base, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text()) | {"attention_dropout": 0.5}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"attention_dropout 0\.5.*set compute\.packing to false"):
        run("sft", tmp_path / "packed", model, conversations(4), {"max_steps": 1}, packing=True)
    losses = [
        run("sft", tmp_path / folder.name, folder, conversations(4), {"max_steps": 1}, packing=False).history[0]["loss"]
        for folder in (model, base)
    ]
    assert losses[0] != losses[1]
