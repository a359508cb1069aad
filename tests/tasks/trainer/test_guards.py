"""What ends a training: bad losses at any step, corrupt weights, divergence, want of memory; and what it says then."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import smoltulu.tasks.engine.launch
import smoltulu.tasks.trainer.loop
from smoltulu.artifacts.checkpoints import newest_checkpoint
from smoltulu.artifacts.store import Store
from smoltulu.schemas.artifact import Spec
from smoltulu.schemas.common import scientific
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.engine.launch import run_child
from smoltulu.tasks.engine.runner import Job, run_stage
from smoltulu.tasks.process import is_out_of_memory
from smoltulu.tasks.stages import STAGES
from smoltulu.tasks.trainer.guards import LossMeans, fault_of_step, has_diverged, rows_of
from smoltulu.tasks.training.preference_batch import PairCollator
from smoltulu.tasks.training.reward_batch import PairCollator as RewardCollator
from smoltulu.tasks.training.sft import RowCollator, collate_packed
from tests.small_runs import Run, conversations, pairs, run, stage_arguments, weights_of_checkpoint
from tests.tiny_model import PAD, build_tiny_model, build_tokenizer

LOG = logging.getLogger("test")
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


# --------------------------------------------------------------------------------------------------- rules, by hand


@pytest.mark.parametrize(
    ("losses", "grad_norms", "zero_is_fault", "expected"),
    [
        ([0.5], [1.0], True, None),
        ([NAN], [NAN], True, "loss is nan"),
        ([INF], [1.0], True, "loss is inf"),
        ([0.5], [INF], True, "gradient norm is inf (loss 0.5)"),
        ([0.5, NAN], [NAN, NAN], True, "loss is nan"),
        ([0.5, 0.25], [1.0, NAN], True, "gradient norm is nan (loss 0.25)"),
        ([0.0], [0.0], True, "loss is exactly 0"),
        ([0.5, 0.0], [1.0, 1.0], True, "loss is exactly 0"),
        ([0.0], [0.0], False, None),
        ([-0.3], [1.0], False, None),
        ([1e-30], [0.0], True, None),
    ],
)
def test_fault_of_a_step(
    losses: list[float], grad_norms: list[float], zero_is_fault: bool, expected: str | None
) -> None:
    assert fault_of_step(losses, grad_norms, zero_is_fault) == expected


def means(history: list[tuple[int, float]], num_warmup_steps: int) -> tuple[float, float] | None:
    counted = LossMeans(num_warmup_steps)
    for step, loss in history:
        counted.add(step, loss)
    return counted.early_and_late()


def test_windows_of_fifty_steps_after_warm_up() -> None:
    rising = [(step, float(step)) for step in range(1, 121)]
    assert means(rising[:99], 0) is None
    assert means(rising[:100], 0) == (25.5, 75.5)
    assert means(rising, 0) == (25.5, 95.5)
    assert means(rising[:109], 10) is None
    assert means(rising, 10) == (35.5, 95.5)
    # Logged every 20 steps: entries 20, 40, 60 hold the first fifty; 160, 180, 200 the last.
    assert means([(step, float(step)) for step in range(20, 201, 20)], 0) == (40.0, 180.0)
    # Logged every 200: one entry is enough, and two do not overlap.
    assert means([(200, 2.0), (400, 5.0)], 0) == (2.0, 5.0)
    # Steps that are logged again count once.
    assert means([*rising[:100], (100, 1e9)], 0) == (25.5, 75.5)


def test_divergence_is_half_as_much_again_and_not_a_small_loss_that_wobbles() -> None:
    assert has_diverged(1.0, 1.51) and not has_diverged(1.0, 1.5)
    assert not has_diverged(0.001, 0.09) and has_diverged(0.001, 0.102)
    # DPO's robust loss falls below 0 where it learns.
    assert not has_diverged(-2.0, -1.5) and has_diverged(-2.0, -0.9) and not has_diverged(-0.5, -0.3)


# -------------------------------------------------------------------------------------------------- which rows it was


def test_rows_of_padded_and_of_packed_batches_are_named_by_their_source() -> None:
    tokenizer = build_tokenizer()
    rows = [tokenizer(f"row number {n} " + "so " * n)["input_ids"] for n in range(6)]
    dataset = Dataset.from_dict({"row": [10 * n for n in range(6)], "input_ids": rows, "labels": rows})
    expected = [
        f"row 40 {('row number 4 ' + 'so ' * 4)!r}",
        f"row 10 {'row number 1 so '!r}",
    ]
    for collate in (collate_packed, DataCollatorForLanguageModeling(tokenizer.convert_tokens_to_ids(PAD))):
        batch = RowCollator(collate)([dataset[4], dataset[1]])
        assert rows_of(batch, dataset, tokenizer) == expected


@pytest.mark.parametrize("packing", [True, False])
def test_pairs_carry_their_row(packing: bool) -> None:
    tokenizer = build_tokenizer()
    prompt, one, other = (tokenizer(text)["input_ids"] for text in ("What is 3 plus 5?", " so 8 #### 8", " so 9"))
    pair = {"prompt_ids": prompt, "prompt_mask": [0] * len(prompt), "chosen_ids": one, "chosen_mask": [1] * len(one),
            "rejected_ids": other, "rejected_mask": [1] * len(other)}  # fmt: skip
    rows = [{"row": 7, **pair}, {"row": 3, **pair}]
    for collator in (PairCollator, RewardCollator):
        found = rows_of(collator(1, packing)(rows), Dataset.from_list(rows), tokenizer)
        assert [name.split(" 'What is 3 plus 5?")[0] for name in found] == ["row 7", "row 3"]


def test_prompts_of_grpo_are_named_once() -> None:
    prompts = [[{"role": "user", "content": f"question {n}"}] for n in range(3)]
    batch = [{"prompt": prompts[2]}, {"prompt": prompts[2]}, {"prompt": prompts[0]}]
    dataset = Dataset.from_dict({"prompt": prompts})
    assert rows_of(batch, dataset, build_tokenizer()) == ["row 2 'question 2'", "row 0 'question 0'"]


# ------------------------------------------------------------------------------------------------------ real trainings


def with_a_poisonous_token(base: Path, folder: Path, token: str) -> Path:
    """The base model, its embeddings no longer tied to its head, that is NaN for every row with `token`."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][build_tokenizer().convert_tokens_to_ids(token)] = NAN
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return folder


def rows_with_a_bad_one(number: int) -> list[dict[str, Any]]:
    rows = conversations(12)
    rows[number]["messages"][0]["content"] = "~ " + rows[number]["messages"][0]["content"]
    return rows


def poisoned(base: Path, folder: Path, **compute: Any) -> tuple[str, int]:
    """SFT over twelve rows, number 5 of which is poisonous, logged never; what is said, and the newest checkpoint."""
    settings = {"effective_batch_size": 2, "num_train_epochs": 1}
    with pytest.raises(ValueError) as raised:
        run("sft", folder, base, rows_with_a_bad_one(5), settings, logging_steps=1000, save_steps=1, **compute)
    newest = newest_checkpoint(folder / "work" / "checkpoints", full=True)
    assert newest is not None
    weights = weights_of_checkpoint(newest[1])
    assert len(weights) > 1
    assert all(value.isfinite().all() for name, value in weights.items() if name != "model.embed_tokens.weight")
    return str(raised.value), newest[0]


@pytest.mark.parametrize("packing", [True, False])
def test_nan_is_seen_between_two_logs_names_its_row_and_writes_no_checkpoint(
    base: Path, tmp_path: Path, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_a_poisonous_token(base, tmp_path / "model", "~")
    # The embeddings are what is poisoned: every other weight is looked at.
    monkeypatch.setattr("smoltulu.tasks.trainer.guards.all_finite", lambda model, accelerator: True)
    text, newest = poisoned(model, tmp_path / "run", packing=packing, per_device_train_batch_size=1)
    assert f"loss is nan at step {newest + 1}; the checkpoints before it are kept" in text
    assert "Its rows: row 5 '" in text and "~ You are helpful" in text and text.count("row ") == 1
    assert "lower learning_rate" in text


def test_weights_that_are_not_finite_are_not_stored(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoltulu.tasks.trainer.loop, "learning_rate_factor", lambda *arguments: 1e42)
    settings = {"max_steps": 3, "schedule": {"kind": "constant"}}
    with pytest.raises(ValueError, match=r"weights hold NaN or infinity after step 1, .* no checkpoint of them"):
        run("sft", tmp_path, base, conversations(4), settings)
    assert newest_checkpoint(tmp_path / "work" / "checkpoints") is None


def test_weights_that_are_not_finite_are_not_kept_for_a_larger_budget(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That checkpoint is asked for by a callback, which must come before the guard."""
    monkeypatch.setattr(smoltulu.tasks.trainer.loop, "learning_rate_factor", lambda *arguments: 1e42)
    settings = {"max_steps": 2, "schedule": {"kind": "wsd", "decay_steps": 1}}
    with pytest.raises(ValueError, match=r"weights hold NaN or infinity after step 1, .* no checkpoint of them"):
        run("sft", tmp_path, base, conversations(4), settings, save_steps=100)
    assert newest_checkpoint(tmp_path / "work" / "checkpoints") is None


def test_loss_of_exactly_zero_ends_dpo_but_not_with_the_hinge(base: Path, tmp_path: Path) -> None:
    """With an absurd beta the first step takes every pair beyond all doubt: -log sigmoid(1e9) is 0."""
    settings = {"beta": 1e9, "max_steps": 3, "num_train_epochs": 3}
    rows = pairs(4)[1:]
    with pytest.raises(ValueError, match=r"loss is exactly 0 at step 2; .* row .*whether these rows have tokens"):
        run("dpo", tmp_path / "sigmoid", base, rows, {**settings, "effective_batch_size": 3},
            per_device_train_batch_size=3)  # fmt: skip
    hinge = {**settings, "effective_batch_size": 3, "loss_type": "hinge"}
    assert run("dpo", tmp_path / "hinge", base, rows, hinge, per_device_train_batch_size=3).history[1]["loss"] == 0


def test_no_alarm_in_a_normal_training_nor_in_one_that_overfits(base: Path, tmp_path: Path) -> None:
    """110 steps each: the windows are full, so that the rule was asked."""
    common = {"max_steps": 110, "effective_batch_size": 2, "warmup_ratio": 0.05}
    sft = run("sft", tmp_path / "sft", base, conversations(40), common, save_steps=200)
    dpo = run("dpo", tmp_path / "dpo", base, pairs(4)[1:], {**common, "effective_batch_size": 1},
              save_steps=200, per_device_train_batch_size=1)  # fmt: skip
    for finished in (sft, dpo):
        measured = means([(int(row["step"]), row["loss"]) for row in finished.history], 6)
        assert measured is not None and not has_diverged(*measured)
    assert dpo.history[-1]["loss"] < 0.1  # it has overfitted


def test_divergence_ends_a_training(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule that goes wild after sixty steps."""

    def wild(schedule: Any, step: int, num_steps: int, num_tokens: int) -> float:
        return 1.0 if step < 60 else 2000.0

    monkeypatch.setattr(smoltulu.tasks.trainer.loop, "learning_rate_factor", wild)
    settings = {"max_steps": 200, "effective_batch_size": 2, "schedule": {"kind": "constant"}}
    with pytest.raises(ValueError, match=r"the training diverges: at step \d+ the mean loss of the last 50 steps is"):
        run("sft", tmp_path, base, conversations(20), settings, save_steps=1000, logging_steps=5)


def test_a_resume_with_other_micro_batches_goes_on_at_the_right_row(base: Path, tmp_path: Path) -> None:
    """4 x 2 to step 4, in the second epoch, then 2 x 4: as unbroken. Another row would change the loss."""
    for stage, rows in (("sft", conversations(24)), ("dpo", pairs(25)[1:])):
        settings = {"effective_batch_size": 8, "max_steps": 6}
        whole = run(stage, tmp_path / stage / "whole", base, rows, settings, per_device_train_batch_size=4)
        resumed = tmp_path / stage / "resumed"
        (resumed / "work").mkdir(parents=True)
        shutil.copytree(whole.checkpoints.parent, resumed / "work", dirs_exist_ok=True)
        for path in (resumed / "work" / "checkpoints").iterdir():
            if path.name != "checkpoint-5" and path.name.startswith("checkpoint-"):
                shutil.rmtree(path)
        again = run(stage, resumed, base, rows, settings, per_device_train_batch_size=2)
        assert (resumed / "work" / "resumed.jsonl").read_text() == "5\n"
        assert same_losses(again, whole)
        one, other = (load_file(done.model / "model.safetensors") for done in (again, whole))
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=0, atol=1e-4)


def same_losses(one: Run, other: Run) -> bool:
    return [row["loss"] for row in one.history] == pytest.approx([row["loss"] for row in other.history], rel=1e-5)


# ------------------------------------------------------------------------------------------- processes, out of memory


def job(stage: str, folder: Path, model: Path, rows: list[dict[str, Any]], settings: Any, **compute: Any) -> Job:
    config, inputs, context = stage_arguments(stage, folder, model, rows, settings, **compute)
    machine = context.compute.model_copy(update={"min_free_disk_gb": 0})
    spec = Spec(stage=stage, version=1, config=scientific(config), inputs={}, externals={})
    return Job(stage, STAGES[stage], config, machine, spec, inputs)


def test_an_alarm_of_any_process_ends_the_stage_and_is_told(base: Path, tmp_path: Path) -> None:
    """Two ranks, one row each in a step: the rank with the bad row is not always the first."""
    model = with_a_poisonous_token(base, tmp_path / "model", "~")
    settings = {"effective_batch_size": 2, "num_train_epochs": 1}
    asked = job("sft", tmp_path, model, rows_with_a_bad_one(5), settings, num_processes=2, save_steps=100,
                logging_steps=100, per_device_train_batch_size=1)  # fmt: skip
    with pytest.raises(ValueError, match=r"sft: loss is nan at step \d; .* Its rows: row 5 '") as raised:
        run_stage(asked, Store(tmp_path / "store"), LOG)
    assert str(raised.value).count("row ") == 1


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)  # more than any machine has
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(ValueError("no memory"))


def scripted(monkeypatch: pytest.MonkeyPatch, setting: str, most: int) -> list[int]:
    """Stages run out of memory with more than `most` rows; the sizes of the attempts. No process is started."""
    tried: list[int] = []

    def run_once(asked: Job, compute: ComputeSettings, *_: Any) -> str | None:
        tried.append(getattr(compute, setting))
        return "CUDA out of memory" if tried[-1] > most else None

    monkeypatch.setattr(smoltulu.tasks.engine.launch, "_run_once", run_once)
    return tried


@pytest.mark.parametrize(
    ("stage", "setting", "sizes"),
    [
        ("dpo", "per_device_train_batch_size", [6, 3, 1]),  # of 6 pairs a step
        ("reference_logps", "per_device_eval_batch_size", [9, 4, 2]),
        ("evaluation", "per_device_eval_batch_size", [9, 4, 2]),
    ],
)
def test_the_batch_that_fits_is_remembered_until_compute_is_another(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    stage: str, setting: str, sizes: list[int],
) -> None:  # fmt: skip
    tried = scripted(monkeypatch, setting, 2)
    asked = job("dpo", tmp_path / "job", base, pairs(7)[1:], {}, **{setting: sizes[0]})
    asked = dataclasses.replace(asked, node=stage, stage=STAGES[stage])
    work, output = tmp_path / "work", tmp_path / "work" / "output"
    output.mkdir(parents=True)
    (output / "half").touch()
    with caplog.at_level(logging.INFO, "test"):
        run_child(asked, work, output, LOG)
        assert tried == sizes and not list(output.iterdir())
        run_child(asked, work, output, LOG)  # as after a kill
    assert tried == [*sizes, sizes[-1]]
    same = ", same effective batch" if stage == "dpo" else ""
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        *(f"{stage}: out of memory with {setting} {a}: goes on with {b}{same}" for a, b in pairwise(sizes)),
        f"{stage}: begins with {setting} {sizes[-1]}, which fitted into memory before",
    ]
    larger = asked.compute.model_copy(update={"activation_checkpointing": True})
    run_child(dataclasses.replace(asked, compute=larger), work, output, LOG)
    assert tried[4:] == sizes
    (work / "fits.json").write_text('{"asked": ')
    run_child(asked, work, output, LOG)
    assert tried[7:] == sizes


@pytest.mark.parametrize(
    ("stage", "setting", "advice"),
    [
        (
            "dpo",
            "per_device_train_batch_size",
            "size 1, and no smaller one gives the same effective batch; set compute",
        ),
        ("reference_logps", "per_device_eval_batch_size", "size 1; take a machine with more memory"),
        ("dataset", "per_device_train_batch_size", "dataset: out of memory. It said: CUDA"),
    ],
)
def test_where_not_even_one_row_fits_it_says_what_to_change(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, stage: str, setting: str, advice: str
) -> None:
    tried = scripted(monkeypatch, setting, 0)
    asked = job("dpo", tmp_path / "job", base, pairs(7)[1:], {}, **{setting: 2})
    asked = dataclasses.replace(asked, node=stage, stage=STAGES[stage])
    (tmp_path / "output").mkdir()
    with pytest.raises(ValueError, match=re.escape(advice)):
        run_child(asked, tmp_path, tmp_path / "output", LOG)
    assert tried == ([2] if stage == "dataset" else [2, 1])


def hungry_job(folder: Path, size: int) -> Job:
    """SFT whose activations, of rows with wide layers between, are most of what it needs: 130 MB a row."""
    answer = {"role": "assistant", "content": "so " * 400}
    rows = [{"id": f"0:{n}", "messages": [{"role": "user", "content": f"{n}?"}, answer]} for n in range(27)]
    settings = {"effective_batch_size": 27, "max_steps": 1, "max_length": 256}
    return job("sft", folder / str(size), folder / "model", rows, settings, per_device_train_batch_size=size)


class Watched(threading.Thread):
    """Looks at new children of this process: how much address space they mapped; sets them a limit, if one is given."""

    def __init__(self, limit: int | None = None) -> None:
        super().__init__(daemon=True)
        self.limit, self.most, self.ended = limit, 0, threading.Event()

    def run(self) -> None:
        limited: set[int] = set()
        while not self.ended.wait(0.01):
            for child in set(psutil.Process().children()) - self.before:
                try:
                    if self.limit is not None and child.pid not in limited:
                        child.rlimit(psutil.RLIMIT_AS, (self.limit, self.limit))
                        limited.add(child.pid)
                    status = Path(f"/proc/{child.pid}/status").read_text()
                except (psutil.NoSuchProcess, OSError):
                    continue
                if "VmPeak:" in status:
                    self.most = max(self.most, 1024 * int(status.split("VmPeak:")[1].split()[0]))

    def __enter__(self) -> Watched:
        self.before = set(psutil.Process().children())  # servers of warm processes, which other tests go on with
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


@pytest.mark.slow  # three starts of a stage's process
@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
@pytest.mark.skipif(psutil.virtual_memory().total < 12 << 30, reason="needs 6 GB beside another test process")
def test_out_of_memory_goes_on_with_half_the_batch_to_the_same_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First without a limit, with the smaller batch, to see what it needs; then with that limit and the larger one."""
    # Threads that meet in malloc get an arena each, 64 MB of address space: on a busy machine a gigabyte of them.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    build_tiny_model(tmp_path / "small")
    config = LlamaConfig.from_pretrained(tmp_path / "small")
    config.intermediate_size = 16384
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(str(tmp_path / "small")).save_pretrained(tmp_path / "model")

    with Watched() as free:
        expected = run_stage(hungry_job(tmp_path, 9), Store(tmp_path / "free"), LOG)
    # Eighteen rows more need 2,300 MB more. The limit lies half-way, far from the slack that an allocator has in one
    # run and not in another.
    with Watched(free.most + (1150 << 20)), caplog.at_level(logging.WARNING, "test"):
        found = run_stage(hungry_job(tmp_path, 27), Store(tmp_path / "limited"), LOG)
    said = "sft: out of memory with per_device_train_batch_size 27: goes on with 9, same effective batch"
    assert [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()] == [said]
    one, other = (load_file(Path(made.path) / "model" / "model.safetensors") for made in (expected, found))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
