"""muP: multipliers and rates by hand, activations that do not grow with width, and a trainer that follows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.recipe import RecipeError, load_recipe
from smoltulu.schemas.base_model import BaseModelConfig, MupSettings
from smoltulu.schemas.training import SFTSettings
from smoltulu.tasks.base_model.scratch import build_base_model, new_model, train_tokenizer
from smoltulu.tasks.models import mup
from smoltulu.tasks.surface.ladder import growth
from tests.small_runs import conversations, run, trainer_of

TEXTS = [f"Mia has {a} cups and finds {b}: {a}+{b}={a + b}." for a in range(20) for b in range(20)]
CONVERSATIONS = conversations(24)


def config(width: int, base_width: int | None, **changes: Any) -> BaseModelConfig:
    """Heads of 16; initial weights as each parametrisation has them."""
    values: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 16,
        "max_position_embeddings": 256,
        "num_steps": 0,
        "sequence_length": 32,
        "initializer_range": 0.02 if base_width is None else 0.1,
        "mup": None if base_width is None else MupSettings(base_width=base_width),
        "num_threads": 1,
    }
    return BaseModelConfig(**{**values, **changes})


def model_of(settings: BaseModelConfig) -> Any:
    return new_model(settings, train_tokenizer(TEXTS[:20], settings))


def test_multipliers_by_hand() -> None:
    """MiniCPM's: width 64 of base width 32, two layers, four heads of 16."""
    assert mup.multipliers(MupSettings(base_width=32), 64, 2, 4) == pytest.approx(
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 1.4 / 2**0.5,
            "attention_multiplier": 1 / 4,
            "logits_scaling": 2.0,
        }
    )


def test_initial_weights_and_rates_of_four_times_the_base_width() -> None:
    model = model_of(config(128, 32))
    embeddings = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embeddings  # tied
    assert float(embeddings.detach().std()) == pytest.approx(0.1, rel=0.05)
    assert float(model.model.layers[0].mlp.up_proj.weight.detach().std()) == pytest.approx(0.1 / 4**0.5, rel=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.8, weight_decay=0.5)
    mup.scale_rates(optimizer, model, 32)
    rest, wide = optimizer.param_groups
    assert (rest["lr"], rest["weight_decay"]) == (0.8, 0.5)
    assert (wide["lr"], wide["weight_decay"]) == (0.2, 2.0)
    assert len(wide["params"]) == 2 * 7 and len(rest["params"]) == 1 + 2 * 2 + 1  # embeddings, norms
    assert {id(one) for group in optimizer.param_groups for one in group["params"]} == {
        id(one) for one in model.parameters()
    }


def test_an_output_head_of_its_own_keeps_its_rate() -> None:
    model = model_of(config(64, 32, tie_word_embeddings=False))
    assert "lm_head.weight" not in dict(mup.matrices(model))
    assert float(model.lm_head.weight.detach().std()) == pytest.approx(0.1, rel=0.05)


def magnitudes(width: int, base_width: int | None) -> list[float]:
    """Mean |activation| of the layers and the logits after five steps at a rate of 2^-5."""
    torch.manual_seed(0)
    model = model_of(config(width, base_width, seed=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2**-5, weight_decay=0.0)
    if base_width is not None:
        mup.scale_rates(optimizer, model, base_width)
    ids = torch.randint(2, 270, (8, 32), generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        made = model(input_ids=ids, output_hidden_states=True)
    return [float(one.abs().mean()) for one in (*made.hidden_states[:-1], made.logits)]


def test_coordinate_check() -> None:
    """With muP no activation grows with width after large steps; without, that of the first layer grows faster."""
    widths = (32, 64, 128)
    with_mup = growth(widths, np.array([magnitudes(width, 32) for width in widths]))
    without = growth(widths, np.array([magnitudes(width, None) for width in widths]))
    assert np.abs(with_mup[:-1]).max() < 0.15 and with_mup[-1] < 0.1, with_mup
    assert without[1] > 1, without


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, base_width in (("mup", 16), ("plain", None)):
        made[name] = tmp_path_factory.mktemp(name)
        build_base_model(config(32, base_width, num_steps=2), TEXTS, made[name], lambda *where, **metrics: None)
    return made


def test_a_trainer_follows_and_its_model_is_a_granite(bases: dict[str, Path], tmp_path: Path) -> None:
    settings = {"mup_base_width": 16, "learning_rate": 0.01, "max_steps": 2, "effective_batch_size": 8}
    trainer = trainer_of("sft", tmp_path / "a", bases["mup"], CONVERSATIONS, settings)
    trainer.create_optimizer_and_scheduler(2)
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.01, 0.01, 0.005])
    wide = trainer.optimizer.param_groups[-1]["params"]
    assert {id(one) for one in wide} == {id(one) for _, one in mup.matrices(trainer.model)}
    made = run("sft", tmp_path / "b", bases["mup"], CONVERSATIONS, settings)
    reloaded = AutoModelForCausalLM.from_pretrained(made.model)
    assert reloaded.config.model_type == "granite" and reloaded.config.logits_scaling == 2.0


@pytest.mark.parametrize("schedule", [None, {"kind": "wsd", "decay_ratio": 0.5}])
def test_a_resume_goes_on_with_the_rates_of_every_group(
    bases: dict[str, Path], tmp_path: Path, schedule: dict[str, Any] | None
) -> None:
    settings = {
        "mup_base_width": 16, "learning_rate": 0.01, "max_steps": 4, "effective_batch_size": 8, "weight_decay": 0.1,
        "warmup_ratio": 0.0, "schedule": schedule,
    }  # fmt: skip
    whole = run("sft", tmp_path / "whole", bases["mup"], CONVERSATIONS, settings)
    shutil.copytree(tmp_path / "whole" / "work", tmp_path / "resumed" / "work")
    shutil.rmtree(tmp_path / "resumed" / "work" / "checkpoints" / "checkpoint-4")
    resumed = run("sft", tmp_path / "resumed", bases["mup"], CONVERSATIONS, settings)
    assert (tmp_path / "resumed" / "work" / "resumed.jsonl").read_text() == "3\n"
    weights = [(one.model / "model.safetensors").read_bytes() for one in (whole, resumed)]
    assert weights[0] == weights[1]


def test_packed_rows_have_the_loss_of_padded_ones(bases: dict[str, Path], tmp_path: Path) -> None:
    losses = []
    for packing in (False, True):
        trainer = trainer_of(
            "sft", tmp_path / str(packing), bases["mup"], CONVERSATIONS[:8], {"mup_base_width": 16}, packing=packing
        )
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
        losses.append(float(trainer.compute_loss(trainer.model.double().train(), batch).detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_model_of_another_parametrisation_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    for name, base_width in (("plain", 16), ("mup", 32)):
        with pytest.raises(ValueError, match=f"mup_base_width {base_width} needs a model that was made with it"):
            trainer_of("sft", tmp_path / name, bases[name], CONVERSATIONS, {"mup_base_width": base_width})


def test_a_recipe_has_one_base_width() -> None:
    """Known before a base is made; a training that does not follow it is told."""
    sft = {"sft.mup_base_width": 16}
    with pytest.raises(
        RecipeError, match=r"sft.mup_base_width is 16, and base_model.scratch.mup is not set; give both"
    ):
        load_recipe("tiny-skills", sft)
    base = {"base_model.scratch.mup": {"base_width": 32}}
    with pytest.raises(RecipeError, match=r"sft.mup_base_width is 16, and .*mup has base_width 32; give both"):
        load_recipe("tiny-skills", sft | base)
    following = load_recipe("tiny-skills", base | {"sft.mup_base_width": 32})
    assert following.mup_notes() == []
    assert Graph(following).key("sft") != Graph(load_recipe("tiny-skills", base)).key("sft")
    assert load_recipe("tiny-skills").mup_notes() == []
    (note,) = load_recipe("tiny-skills", base).mup_notes()
    assert note.startswith("sft: base_model.scratch.mup is set, and this") and note.endswith("; set sft.mup_base_width")


def test_adapters_have_no_width() -> None:
    with pytest.raises(ValidationError, match=r"mup_base_width 16 scales .* lora trains none of them; keep one"):
        SFTSettings(learning_rate=1e-3, effective_batch_size=8, max_length=64, mup_base_width=16, lora={})  # type: ignore[arg-type]
