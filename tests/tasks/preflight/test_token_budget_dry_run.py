"""The dry run of a training that cuts its micro-batches by tokens, and what `plan` says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from smoltulu.flows.cli.plan import _made_with
from smoltulu.flows.planning.preflight_figures import PreflightFigures, preflight_figures
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.preflight import DryRun
from smoltulu.tasks.stages import STAGES
from smoltulu.tasks.trainer.token_budget import batch_cost, costliest, row_cost
from tests.tasks.preflight.test_preflight import Flight, fly, rows_for, training_of
from tests.tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def flown(folder: Path, model: Path, subject: str, **compute: Any) -> tuple[Flight, DryRun]:
    asked = training_of(subject, effective_batch_size=8)
    flight = fly(folder, model, rows_for(subject, 12), compute=compute, checks={"dry_run": True}, **asked)
    assert not flight.error and flight.outputs.dry_run is not None
    return flight, flight.outputs.dry_run


def figures(flight: Flight, **compute: Any) -> PreflightFigures:
    config = flight.config
    settings = STAGES[config.subject].config.model_validate(config.training_settings)
    found = preflight_figures(
        "node", config, flight.outputs.model_dump(mode="json"), settings, ComputeSettings(**compute)
    )
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("subject", "packing", "budget"), [("sft", True, 150), ("sft", False, 150), ("dpo", True, 190)]
)
def test_the_dry_run_fills_the_budget_with_the_longest_rows(
    model: Path, tmp_path: Path, subject: str, packing: bool, budget: int
) -> None:
    compute = {"tokens_per_device": budget, "packing": packing}
    flight, run = flown(tmp_path, model, subject, **compute)
    costs = [row_cost(row, packing) for row in flight.rows]
    places = costliest(costs, budget, 8, packing)
    assert 1 < len(places) < 8 and batch_cost([costs[place] for place in places], packing) <= budget
    assert (run.asked_tokens, run.tokens_per_device, run.per_device_train_batch_size) == (budget, budget, len(places))
    if subject == "sft":
        assert run.num_tokens == sum(costs[place] for place in places)
    found = figures(flight, **compute)
    assert found.notes == () and f"micro-batches of up to {budget} tokens" in _made_with(found)
    assert figures(flight, packing=packing).notes[0] == f"tokens_per_device {budget} -> none"


def test_auto_is_the_dry_run_of_fixed_rows(model: Path, tmp_path: Path) -> None:
    flight, run = flown(tmp_path, model, "sft", tokens_per_device="auto", per_device_train_batch_size=2)
    longest = sum(sorted(row_cost(row, True) for row in flight.rows)[-2:])
    assert (run.asked_tokens, run.tokens_per_device, run.num_tokens) == ("auto", longest, longest)
    assert (run.per_device_train_batch_size, run.asked_batch_size) == (2, 2)
    found = figures(flight, tokens_per_device="auto", per_device_train_batch_size=2)
    assert found.notes == () and f"2 rows, micro-batches of up to {longest} tokens (auto), packing" in _made_with(found)
    other = figures(flight, tokens_per_device=900, per_device_train_batch_size=4)
    assert other.notes == ("tokens_per_device auto -> 900",), "the rows decide nothing then"


def test_rlvr_has_no_token_budget(model: Path, tmp_path: Path) -> None:
    compute = {"tokens_per_device": 900, "per_device_train_batch_size": 2}
    flight, run = flown(tmp_path, model, "rlvr", **compute)
    assert (run.asked_tokens, run.tokens_per_device, run.per_device_train_batch_size) == ("none", None, 2)
    assert figures(flight, **compute).notes == ()


@pytest.mark.parametrize(
    "setting", [{"tokens_per_device": 400}, {"tokens_per_device": "auto", "per_device_train_batch_size": 8}]
)
def test_out_of_memory_halves_the_token_budget_until_it_fits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: dict[str, Any]
) -> None:
    real = transformers.Trainer.training_step

    def training_step(trainer: Any, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
        if inputs["input_ids"].numel() > 180:
            raise torch.OutOfMemoryError("CUDA out of memory")
        loss: torch.Tensor = real(trainer, model, inputs, *args)
        return loss

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)
    flight, run = flown(tmp_path, model, "sft", **setting)
    assert run.tokens_per_device is not None and 60 < run.num_tokens == run.tokens_per_device <= 180
    check = flight.check("Memory")
    assert check.status == "noticed"
    if setting["tokens_per_device"] == 400:
        assert f"400 tokens; {run.tokens_per_device} fit" in check.found
        assert f"compute.stages.sft.tokens_per_device to {run.tokens_per_device}" in check.advice
        assert figures(flight, **setting).notes == (f"out of memory with 400 tokens, {run.tokens_per_device} fit",)
    else:
        assert run.asked_batch_size == 8 and run.per_device_train_batch_size in (2, 4)
