"""vLLM as an engine: what it is asked, what is refused, what is made of its answers. vLLM itself is not run."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.preflight import PreflightConfig, PreflightInputs, PreflightSettings
from smoltulu.schemas.rlvr import RLVRSettings
from smoltulu.tasks.generation.interface import Request, Sampling, Written, seed_of_request
from smoltulu.tasks.generation.vllm_engine import (
    _own,
    check_vllm,
    grown_fault,
    length_fault,
    needed_bytes,
    parameters_of,
    room_fault,
    version_fault,
    written,
)
from smoltulu.tasks.models.sizes import model_size
from smoltulu.tasks.preflight.rollout_memory import rollout_bytes, vllm_bytes
from smoltulu.tasks.preflight.stage import run_preflight
from smoltulu.tasks.stages import STAGES
from smoltulu.tasks.training.rollout_engine import check_engine, ignored_settings
from tests.small_ppo import context
from tests.tiny_model import build_tiny_model

SAMPLING = Sampling(8, 0.7, (0, 5), seed=3)
GIB = 2**30


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, "vllm, 0.22.0 to 0.31.0, which is not installed: see docs/stages/rlvr.md"),
        ("0.21.9", "0.21.9 is installed; install one of these"),
        ("0.31.1", "0.31.1 is installed"),
        ("1.0", "1.0 is installed"),
        ("0.22.0", None),
        ("0.31.0+cu128", None),
        ("0.25.0rc1", None),
    ],
)
def test_versions_out_of_range_are_refused(version: str | None, said: str | None) -> None:
    found = version_fault(version)
    assert found is None if said is None else said in str(found) and "engine: transformers" in str(found)


@pytest.mark.parametrize(
    ("needed", "share", "free", "said"),
    [
        (24 * GIB, 0.3, 60 * GIB, None),  # 0.3 x 80 = 24
        (25 * GIB, 0.3, 60 * GIB, r"0.3 of the device's .* need .* Raise compute.vllm_memory_share"),
        (10 * GIB, 0.5, 39 * GIB, r"0.5 of the device's .* lower compute.vllm_memory_share"),
    ],
)
def test_without_room_it_is_refused(needed: int, share: float, free: int, said: str | None) -> None:
    found = room_fault(needed, share, free, 80 * GIB)
    if said is None:
        assert found is None
    else:
        with pytest.raises(ValueError, match=said):
            raise ValueError(found)


def test_weights_and_one_text_need_so_many_bytes(tmp_path: Path) -> None:
    """Two layers of keys and values, (32 / 4) x 4 heads wide: 2 x 2 x 32 x 2 bytes a token."""
    folder = build_tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"] * config["num_key_value_heads"]
    of_text = needed_bytes(folder, 100) - needed_bytes(folder, 0)
    assert of_text == 100 * config["num_hidden_layers"] * 2 * width * 2


def test_memory_of_a_training_whose_rollouts_are_written_elsewhere(tmp_path: Path) -> None:
    """What a writer on another device reads is not counted; vLLM beside the training has a share of its own."""
    folder = build_tiny_model(tmp_path)
    of_texts = 4 * 2 * (needed_bytes(folder, 100) - needed_bytes(folder, 0))  # four at once, in float32

    def needed(engine: str = "transformers", **compute: Any) -> int:
        return rollout_bytes(rlvr(engine=engine), folder, 100, ComputeSettings(**compute), bfloat16=False)

    weights = 4 * model_size(folder).num_parameters
    assert needed("vllm") == needed(generation_device="cuda:1") == needed(generation_device="cpu")
    assert needed() - needed("vllm") == of_texts
    assert needed(generation_device="cuda") - needed() == weights


def test_a_request_asks_for_the_whole_distribution_and_has_a_seed_of_its_own() -> None:
    request = Request([1, 2], 4, 5, 6)
    assert parameters_of(request, SAMPLING) == {
        "n": 1, "temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 8,
        "stop_token_ids": [0, 5], "stop": None, "ignore_eos": True, "logprobs": 0,
        "seed": seed_of_request(request, SAMPLING),
    }  # fmt: skip


def test_answers_become_what_every_engine_gives() -> None:
    places = [{7: SimpleNamespace(logprob=-0.5), 9: SimpleNamespace(logprob=-0.1)}, {5: SimpleNamespace(logprob=-2)}]
    assert _own([7, 5], places) == [-0.5, -2.0]
    assert math.isnan(_own([8], places[:1])[0])
    for ids, logps in (([], []), ([7, 5], [-0.5]), ([7], [None]), ([7], [math.nan])):
        with pytest.raises(RuntimeError, match="gave no log-probabilities"):
            written(ids, logps, SAMPLING)
    assert written([7, 5], [-0.5, -2.0], SAMPLING) == Written([7, 5], True, [-0.5, -2.0])
    assert written([7, 8], [-0.5, -2.0], SAMPLING) == Written([7, 8], False, [-0.5, -2.0])
    assert written([7], [-0.5], Sampling(8, 0.0, (0,))) == Written([7], False, [])


def rlvr(**given: Any) -> RLVRSettings:
    return RLVRSettings.model_validate(
        {"algorithm": "ppo", "max_prompt_length": 16, "max_completion_length": 8, "num_episodes": 8,
         "learning_rate": 1e-5, "effective_batch_size": 4, **given}
    )  # fmt: skip


def test_a_machine_that_cannot_run_it_says_so_before_weights_are_loaded(tmp_path: Path) -> None:
    """Here: it is not installed. Nor is there a card, which is told where it is."""
    with pytest.raises(ValueError, match="engine vllm needs the package vllm"):
        check_engine(rlvr(engine="vllm"), tmp_path, ComputeSettings())
    with pytest.raises(ValueError, match="engine vllm needs the package vllm"):
        check_vllm(tmp_path, ComputeSettings(), "cuda", 100)


@pytest.mark.parametrize("temperature", [0.005, 2.5])
def test_temperatures_that_vllm_changes_or_refuses_are_refused(tmp_path: Path, temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"temperature is {temperature:g}; engine vllm takes 0.01 to 2"):
        check_engine(rlvr(engine="vllm", temperature=temperature), tmp_path, ComputeSettings())


def test_models_that_vllm_would_take_for_others_are_refused(tmp_path: Path) -> None:
    """Fewer positions than prompt and answer have; embeddings that grew for the tokenizer."""
    folder = build_tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    positions, rows = config["max_position_embeddings"], config["vocab_size"]
    assert length_fault(folder, positions) is None and grown_fault(folder, rows) is None
    assert f"has {positions:,} positions" in str(length_fault(folder, positions + 1))
    assert f"has {rows + 8:,} embeddings" in str(grown_fault(folder, rows + 8))
    (folder / "config.json").write_text("{}")
    assert length_fault(folder, 1 << 20) is None and grown_fault(folder, 8) is None


def test_its_share_of_the_device_counts_beside_the_training() -> None:
    vllm, share = rlvr(engine="vllm"), ComputeSettings(vllm_memory_share=0.25)
    assert vllm_bytes(vllm, share, 80 * GIB) == 20 * GIB
    assert vllm_bytes(rlvr(), share, 80 * GIB) == 0
    assert vllm_bytes(vllm, ComputeSettings(vllm_server="http://gpu:8000"), 80 * GIB) == 0


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_refused(tmp_path: Path, device: str) -> None:
    import torch

    if torch.cuda.device_count() > 1:
        pytest.skip("it is there")
    with pytest.raises(ValueError, match=rf"_device is {device}, and torch finds \d CUDA devices? here; name one"):
        check_engine(rlvr(), tmp_path, ComputeSettings(generation_device=device))


@pytest.mark.parametrize("device", ["gpu1", "cuda:", "cuda:x", "meta", ""])
def test_names_of_devices_that_are_none_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="generation_device"):
        ComputeSettings(generation_device=device)


def test_settings_that_say_nothing_to_the_engine_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And no others: a stage gets all settings written out, those that nobody set too."""
    placed = {"vllm_sleep": False, "vllm_memory_share": 0.5, "generation_device": "cpu"}
    told = [[], ["vllm_memory_share", "vllm_sleep"]]
    for compute, names in zip((ComputeSettings(), ComputeSettings(**placed)), told, strict=True):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "smoltulu"):
            check_engine(rlvr(), tmp_path, ComputeSettings.model_validate(compute.model_dump(mode="json")))
        assert [one.getMessage() for one in caplog.records] == [
            f"compute.{name} says nothing to this rlvr.engine transformers, and is ignored" for name in names
        ]
    assert ignored_settings(rlvr(engine="vllm"), ComputeSettings(**placed)) == ["generation_device"]
    served = ComputeSettings(**placed, vllm_server="http://gpu:8000")
    assert ignored_settings(rlvr(engine="vllm"), served) == ["generation_device", "vllm_memory_share", "vllm_sleep"]


@pytest.mark.parametrize(
    ("settings", "compute", "said"),
    [
        ({"engine": "vllm"}, {}, "engine vllm needs the package vllm"),
        ({}, {"generation_device": "cuda:7"}, "generation_device is cuda:7"),
    ],
)
def test_the_preflight_refuses_it_before_it_reads_a_row(
    tmp_path: Path, settings: dict[str, Any], compute: dict[str, Any], said: str
) -> None:
    config = PreflightConfig.model_construct(
        subject="rlvr", training_settings=rlvr(**settings).model_dump(mode="json"), settings=PreflightSettings()
    )
    inputs = PreflightInputs(model=str(build_tiny_model(tmp_path / "model")), dataset="none", chat_template="")
    with pytest.raises(ValueError, match=said):
        run_preflight(config, inputs, context(tmp_path, **compute), STAGES)
