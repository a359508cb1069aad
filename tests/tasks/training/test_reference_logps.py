"""The reference's log-probabilities: what they are, that a killed pass goes on, that DPO begins at zero with them."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import smoltulu.tasks.training.reference_logps
from smoltulu.schemas.artifact import Spec
from smoltulu.schemas.common import scientific
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.reference import ReferenceLogpsConfig, ReferenceLogpsInputs
from smoltulu.schemas.training import DPOInputs
from smoltulu.tasks.engine.launch import run_child
from smoltulu.tasks.job import Job
from smoltulu.tasks.stage import Report, StageContext
from smoltulu.tasks.stages import STAGES
from smoltulu.tasks.training.reference_logps import run_reference_logps
from tests.small_runs import pairs, run, stage_arguments
from tests.tiny_model import TULU_TEMPLATE, build_tiny_model

PAIRS = pairs(12)[1:]  # of the first both sides are the same


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenised pairs, assistant's turns in the prompt counted too."""
    _, inputs, _ = stage_arguments("dpo", tmp_path_factory.mktemp("rows"), base, PAIRS, {"trained_turns": "all"})
    return Path(inputs.dataset)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoltulu.tasks.training.reference_logps, "SHARD_PAIRS", 4)


def reference(
    folder: Path, model: Path, rows: Path, report: Report = lambda *args, **kwargs: None, **compute: Any
) -> Path:
    """The stage's file."""
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    machine = ComputeSettings(**{"device": "cpu", "num_threads": 1, "per_device_eval_batch_size": 3} | compute)
    context = StageContext(folder / "out", folder / "work", machine, report)
    inputs = ReferenceLogpsInputs(model=str(model), dataset=str(rows), chat_template=TULU_TEMPLATE)
    outputs, metrics = run_reference_logps(ReferenceLogpsConfig(precision="float32"), inputs, context)
    assert outputs.num_rows == len(PAIRS) and metrics["logps/chosen"] < 0
    return folder / "out" / outputs.file


@pytest.mark.parametrize("packing", [False, True])
def test_sums_of_every_pair_in_their_order(base: Path, rows: Path, tmp_path: Path, packing: bool) -> None:
    """Against float64, one sequence at a time; the stage goes through them by length."""
    made = parquet.read_table(reference(tmp_path, base, rows, packing=packing))
    assert [str(column.type) for column in made.columns] == ["float", "float"]
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float64).eval()
    lengths = set()
    for row, pair in enumerate(parquet.read_table(rows).to_pylist()):
        for side in ("chosen", "rejected"):
            ids = pair["prompt_ids"] + pair[f"{side}_ids"]
            mask = pair["prompt_mask"] + pair[f"{side}_mask"]
            with torch.no_grad():
                logps = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
            expected = sum(float(logps[t - 1, ids[t]]) for t in range(1, len(ids)) if mask[t])
            assert made[side][row].as_py() == pytest.approx(expected, rel=1e-6)
            lengths.add(len(ids))
    assert len(lengths) > 5


def test_a_killed_pass_goes_on_and_gives_the_same_bytes(base: Path, rows: Path, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def die(step: int, num_steps: int, **_: float) -> None:
        assert num_steps == len(PAIRS)
        if step == 8:
            raise KilledError

    unbroken = reference(tmp_path / "unbroken", base, rows).read_bytes()
    with pytest.raises(KilledError):
        reference(tmp_path / "killed", base, rows, die)
    shards = tmp_path / "killed" / "work" / "shards"
    finished = {file.name: file.stat().st_mtime_ns for file in shards.glob("*.npy")}
    assert sorted(finished) == ["000000.npy", "000001.npy"] and not list((tmp_path / "killed" / "out").iterdir())
    # Torn, as by a power cut: made again.
    (shards / "000002.npy").write_bytes((shards / "000001.npy").read_bytes()[:-5])
    steps: list[int] = []
    again = reference(tmp_path / "killed", base, rows, lambda step, *_, **__: steps.append(step))
    assert again.read_bytes() == unbroken and steps == [4, 8, 11]
    assert all((shards / name).stat().st_mtime_ns == written for name, written in finished.items())


def test_shards_of_another_model_are_not_taken(base: Path, rows: Path, tmp_path: Path) -> None:
    """The model of a key may be made again with other weights, between a killed pass and the next."""
    other = build_tiny_model(tmp_path / "other", seed=1)
    first = reference(tmp_path / "run", base, rows).read_bytes()
    assert reference(tmp_path / "run", other, rows).read_bytes() != first
    assert (
        reference(tmp_path / "run", other, rows).read_bytes() == reference(tmp_path / "new", other, rows).read_bytes()
    )


@pytest.mark.parametrize("machine", [{"per_device_eval_batch_size": 11}, {"packing": False}])
def test_machinery_changes_nothing(base: Path, rows: Path, tmp_path: Path, machine: dict[str, Any]) -> None:
    one, other = (
        parquet.read_table(reference(tmp_path / str(number), base, rows, **compute))
        for number, compute in enumerate(({}, machine))
    )
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(one[side].to_numpy(), other[side].to_numpy(), rtol=1e-6)


@pytest.mark.slow
def test_two_processes_make_what_one_makes(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second shard each."""
    monkeypatch.setattr(smoltulu.tasks.training.reference_logps, "SHARD_PAIRS", 512)  # the processes import their own
    many = pairs(1100)[1:]
    _, inputs, context = stage_arguments("dpo", tmp_path, base, many, {})
    assert isinstance(inputs, DPOInputs)
    alone = parquet.read_table(inputs.reference_logps)
    compute = context.compute.model_copy(update={"num_processes": 2, "launcher": "warm"})
    config = ReferenceLogpsConfig(precision="float32")
    own = ReferenceLogpsInputs(**{name: getattr(inputs, name) for name in ReferenceLogpsInputs.model_fields})
    spec = Spec(stage="reference_logps", version=1, config=scientific(config), inputs={}, externals={})
    (tmp_path / "two" / "out").mkdir(parents=True)
    job = Job("reference-logps", STAGES["reference_logps"], config, compute, spec, own)
    run_child(job, tmp_path / "two", tmp_path / "two" / "out", logging.getLogger("test"))
    together = parquet.read_table(tmp_path / "two" / "out" / "reference_logps.parquet")
    assert len(together) == len(many) and together.equals(alone)


def test_pairs_without_a_finite_log_probability_are_named(base: Path, rows: Path, tmp_path: Path) -> None:
    """Only those: the embedding of one token is NaN."""
    model = tmp_path / "model"
    shutil.copytree(base, model)
    weights = load_file(model / "model.safetensors")
    found = parquet.read_table(rows).to_pylist()
    rare = next(
        token
        for token in found[5]["chosen_ids"]
        if sum(token in pair["prompt_ids"] + pair["chosen_ids"] + pair["rejected_ids"] for pair in found) == 1
    )
    # As an input only: the head shares these weights, so it gets its own.
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][rare] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    config = (model / "config.json").read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    (model / "config.json").write_text(config)
    with pytest.raises(ValueError, match=f"no finite log-probability to 1 pairs, of source rows {found[5]['row']};"):
        reference(tmp_path / "run", model, rows)


@pytest.mark.parametrize("packing", [False, True])
def test_dpo_begins_at_its_reference(base: Path, tmp_path: Path, packing: bool) -> None:
    """log 2, with rewards that are zero but for rounding."""
    settings = {"max_steps": 1, "loss_type": "sigmoid", "beta": 0.1}
    first = run("dpo", tmp_path, base, PAIRS, settings, packing=packing, per_device_train_batch_size=11).history[0]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert abs(first["rewards/chosen"]) < 1e-5 and abs(first["rewards/rejected"]) < 1e-5
