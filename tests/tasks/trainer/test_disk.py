"""Disk that a training needs: parameters from headers, a formula, and the formula against a real training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.training import DPOSettings, SFTSettings
from smoltulu.tasks.models.sizes import ModelSize, adapter_size, model_size
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer.disk import (
    cache_bytes,
    checkpoint_bytes,
    model_bytes,
    num_checkpoints_kept,
    training_bytes,
)
from tests.rows_file import write_rows
from tests.small_runs import training_inputs
from tests.tiny_model import build_tiny_model


def test_disk_by_hand() -> None:
    size = ModelSize(num_parameters=1_000_000, num_tensors=10, other_bytes=500)
    assert checkpoint_bytes(size) == 12_000_000 + 10 * 600 + 12_000
    assert model_bytes(size) == 4_000_500
    # Three that are kept (two newest, the best) and the one being written.
    compute = ComputeSettings(save_total_limit=2)
    assert num_checkpoints_kept(compute, False) == 3 and training_bytes(size, 1000, 3) == 1000 + 4 * 12_018_000
    assert num_checkpoints_kept(compute, True) == 4
    assert num_checkpoints_kept(compute.model_copy(update={"keep_extension_checkpoint": False}), True) == 3
    # Twice the best weights, of policy and critic.
    assert training_bytes(size, 1000, 3, keeps_best=True) == 1000 + 4 * 12_018_000 + 3 * 4_000_000
    assert training_bytes(size, 0, 3, has_critic=True, keeps_best=True) == 4 * 2 * 12_018_000 + 3 * 8_000_000
    # Of rank 4 beside six matrices; at the end the model and the adapter are written, and no checkpoint.
    adapter = adapter_size(replace(size, num_matrices=6, matrix_sides=9000), 4)
    assert adapter == ModelSize(num_parameters=36_000, num_tensors=12, other_bytes=500)
    assert training_bytes(size, 1000, 3, adapter) == 1000 + 3 * (432_000 + 7_200 + 12_000) + 4_000_500 + 144_500


@pytest.mark.parametrize(("stage", "lora"), [("sft", None), ("dpo", None), ("sft", {"r": 4})])
def test_the_formula_against_a_real_training(tmp_path: Path, stage: str, lora: dict[str, int] | None) -> None:
    from smoltulu.tasks.training.dpo import train_dpo
    from smoltulu.tasks.training.sft import train_sft

    def turns(**by_role: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content} for role, content in by_role.items()]

    model, rows = build_tiny_model(tmp_path / "model"), []
    for i in range(400):
        text = f"What is {i} plus 7? Write your answer in upper case and name exactly three animals. " * 3
        row = {"messages": turns(user=text, assistant=text)}
        if stage == "dpo":
            row = {"prompt": turns(user=text), "chosen": turns(assistant=text), "rejected": turns(assistant="no")}
        rows.append(row)
    compute = ComputeSettings(device="cpu", per_device_train_batch_size=2, save_steps=1, logging_steps=1)
    context = StageContext(tmp_path / "out", tmp_path / "work", compute, lambda *args, **kwargs: None)
    context.folder.mkdir()
    (context.work / "checkpoints").mkdir(parents=True)
    settings = {
        "learning_rate": 1e-3, "effective_batch_size": 2, "max_steps": 4, "max_length": 200, "precision": "float32",
        "gate": {"num_prompts": 0}, "lora": lora,
    }  # fmt: skip
    config = SFTSettings(**settings) if stage == "sft" else DPOSettings(**settings)
    (tmp_path / "before").mkdir()
    inputs = training_inputs(stage, tmp_path / "before", model, rows, config, compute)
    file = Path(inputs.dataset)
    (train_sft if stage == "sft" else train_dpo)(config, inputs, context)

    size = model_size(model)
    assert size.num_parameters == 33_440
    saved = sorted((context.work / "checkpoints").glob("checkpoint-*"))
    adapter = adapter_size(size, lora["r"]) if lora else None
    # The embeddings have no adapter: of so small a model they are a good part.
    assert checkpoint_bytes(adapter or size) == pytest.approx(_bytes(saved[-1]), rel=0.4 if lora else 0.05)
    assert model_bytes(size) == pytest.approx(_bytes(context.folder / "model"), rel=0.05)
    # The bound holds with the one more that was there before the oldest went, and is not far off.
    peak = _bytes(context.work) + max(_bytes(saved[-1]), _bytes(context.folder / "model"))
    assert peak <= training_bytes(size, cache_bytes(file), len(saved), adapter) <= (1.3 if lora else 1.1) * peak


def test_the_arrow_copy_of_prompts_is_their_text(tmp_path: Path) -> None:
    from pyarrow import parquet

    rows = [
        {"prompt": [{"role": "user", "content": f"What is {i} plus {i}? " * (i % 9)}], "ground_truth": str(i)}
        for i in range(900)
    ]
    file = write_rows(tmp_path / "rows.parquet", rows)
    assert cache_bytes(file) == pytest.approx(parquet.read_table(file).nbytes, rel=0.05)
    assert cache_bytes(file) > 5 * file.stat().st_size  # not of what is compressed


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
