"""Compiled layers train as others do: losses, weights and rows, whatever the batch looks like."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from tests import small_ppo
from tests.small_runs import Run, conversations, pairs, run
from tests.tiny_model import build_tiny_model

SETTINGS: dict[str, Any] = {"max_steps": 4, "num_train_epochs": 2, "effective_batch_size": 4, "seed": 3}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


def same(one: list[dict[str, float]], other: list[dict[str, float]], *models: tuple[Path, Path]) -> None:
    assert len(one) == len(other) > 1
    for expected, found in zip(one, other, strict=True):
        for name in expected.keys() & {"loss", "grad_norm", "num_tokens", "value_loss", "kl"}:
            assert found[name] == pytest.approx(expected[name], abs=1e-5, rel=1e-5), name
    for folder, its in models:
        weights = load_file(its / "model.safetensors")
        for name, value in load_file(folder / "model.safetensors").items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "compute"),
    [
        ("sft", {}),
        ("dpo", {"packing": False}),
        ("reward_model", {"tokens_per_device": 150, "activation_checkpointing": True}),
    ],
)
def test_the_same_training(base: Path, tmp_path: Path, stage: str, compute: dict[str, Any]) -> None:
    """Layers are compiled once, though every batch has another length."""
    rows = conversations(13) if stage == "sft" else pairs(13)

    def trained(name: str, **more: Any) -> Run:
        return run(stage, tmp_path / name, base, rows, SETTINGS, **compute | more)

    eager = trained("eager")
    assert not counters["stats"]["unique_graphs"]
    compiled = trained("compiled", compile=True)
    # At most what is before and what is behind the attention of a layer, and once more for the first length.
    assert 0 < counters["stats"]["unique_graphs"] <= 6, counters["stats"]
    assert not counters["recompile_limit"], counters["recompile_limit"]
    same(eager.history, compiled.history, (eager.model, compiled.model))


@pytest.mark.slow
def test_ppo_compiles_policy_and_critic_but_no_rollout(tmp_path: Path) -> None:
    inputs = small_ppo.world(tmp_path / "world")
    eager = small_ppo.run(inputs, tmp_path / "eager")
    compiled = small_ppo.run(inputs, tmp_path / "compiled", compile=True)
    assert 0 < counters["stats"]["unique_graphs"] <= 6, counters["stats"]
    assert compiled.log("prompts") == eager.log("prompts")
    models = [(eager.folder / "out" / name, compiled.folder / "out" / name) for name in ("model", "critic")]
    same(eager.log("history"), compiled.log("history"), *models)


def test_where_torch_cannot_compile_it_says_so_and_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with caplog.at_level(logging.WARNING, "smoltulu"):
        made = run("sft", tmp_path / "it", base, conversations(4), SETTINGS | {"max_steps": 2}, compile=True)
    assert len(made.history) == 2
    assert "compute.compile is ignored: torch cannot compile here" in caplog.text
