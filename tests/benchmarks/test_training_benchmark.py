"""benchmarks/training.py: its arithmetic by hand, both of its sides on the same rows, every part on a minute model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet

from benchmarks import training, training_gpu, training_rows, training_tools, training_work
from benchmarks.training_gpu import Case, causal_pairs
from benchmarks.training_rows import SHAPES, conversation_rows, mixed_lengths, pair_rows
from tests import ROOT

MINUTE = SHAPES["minute"]
TINY = ["--shape", "minute", "--repeats", "1", "--steps", "5", "--rows", "16", "--gpu-shapes", "minute"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark") / "model"
    training_rows.write_model(MINUTE, folder)
    return folder


# --- Rows -------------------------------------------------------------------------------------------------------------


def test_the_length_mix_is_the_one_it_is_fitted_to() -> None:
    # The mix itself has 9.1 % over 1,024 tokens, which is not what is fitted.
    assert training_rows.share_above(1024, 517, 404) == pytest.approx(0.0927, abs=1e-4)
    lengths = sorted(mixed_lengths(10_001, 517, 404, 8192, seed=0))
    assert sum(lengths) / len(lengths) == pytest.approx(517, rel=2e-3)
    assert lengths[5_000] == 404
    few = mixed_lengths(48, 517, 404, 4096, seed=0)
    assert sum(few) / 48 == pytest.approx(517, rel=0.02) and few != sorted(few)


def test_padding_by_hand() -> None:
    assert training_rows.padding_factor([1, 1, 1, 5], 4, 100) == 20 / 8
    assert training_rows.padding_factor([1, 1, 1, 5], 4, 2) == 8 / 5
    assert training_rows.padding_factor([1, 1, 1, 5], 1, 100) == 1


def test_prompt_is_its_share_of_what_a_pair_has_once() -> None:
    # 40 + 60 + 60 tokens: 40 is a quarter.
    assert training_rows.prompt_length(100, 0.25) == 40
    [row] = pair_rows([100], 0.25, MINUTE, 0.0, seed=0)
    assert [len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")] == [40, 60, 60]
    assert training_rows.num_tokens([row], 100) == (200, 120)
    assert training_rows.num_tokens([row], 50) == (100, 20)


def test_supervised_share_of_conversations() -> None:
    rows = conversation_rows([100, 40], MINUTE)
    assert training_rows.num_tokens(rows, 100) == (140, 85 + 34)
    assert all(row["labels"][-1] == 0 for row in rows)  # eos


def test_both_sides_get_the_same_tokens(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = pair_rows([30, 17], 0.25, MINUTE, 0.5, seed=1)
    plain = parquet.read_table(training_rows.write_plain_rows(rows, "dpo", tmp_path / "plain.parquet")).to_pylist()
    for row, text in zip(rows, plain, strict=True):
        assert tokenizer(text["prompt"])["input_ids"] == row["prompt_ids"]
        for side in ("chosen", "rejected"):
            whole = tokenizer(text["prompt"] + text[side])["input_ids"]
            assert whole == row["prompt_ids"] + row[f"{side}_ids"]
    [apart, _] = training_rows.prompt_in_each_answer(rows)
    assert apart["prompt_ids"] + apart["rejected_ids"] == rows[0]["prompt_ids"] + rows[0]["rejected_ids"]
    assert training_rows.num_tokens([apart], 99) == training_rows.num_tokens(rows[:1], 99)


# --- FLOPs, shares, medians -------------------------------------------------------------------------------------------


def test_parameters_of_the_shapes() -> None:
    # 135M: embedding 49,152 x 576; a layer 2 x 576^2 + 2 x 576 x 192 + 3 x 576 x 1,536 + 2 x 576; last norm 576.
    assert SHAPES["135M"].num_parameters == 28_311_552 + 30 * 3_540_096 + 576 == 134_515_008
    assert SHAPES["1.7B"].num_parameters == 100_663_296 + 24 * 67_112_960 + 2048 == 1_711_376_384


def test_flops_by_hand() -> None:
    assert causal_pairs(3) == 6 and causal_pairs(2, 5) == 6 + 7
    # Two layers of 2 x 32^2 + 2 x 32 x 16 + 3 x 32 x 64 = 9,216 weights; head 128 x 32; 12 x 2 layers x 32 per pair.
    expected = 6 * (18_432 * 10 + 4_096 * 8) + 768 * 55
    assert training_gpu.training_flops(MINUTE, 10, 8, causal_pairs(10)) == expected
    assert training_gpu.utilisation(500e12, 2.0, 1000e12) == 0.25


def test_flops_are_those_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    num_tokens = 24
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=128, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.arange(num_tokens)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    # Eager attention computes the half above the diagonal too.
    ours = training_gpu.training_flops(MINUTE, num_tokens, num_tokens, num_tokens**2)
    assert counter.get_total_flops() == pytest.approx(ours, rel=1e-3)


def test_the_prompt_of_a_pair_is_counted_once() -> None:
    dpo, reward = (Case(stage, MINUTE, 100, 0.25, 400) for stage in ("dpo", "reward_model"))
    assert dpo.num_tokens == reward.num_tokens == 4 * 2 * 2 * 100
    assert dpo.num_computed_tokens == reward.num_computed_tokens == 160
    pairs = causal_pairs(100) + causal_pairs(60, 40)
    assert pairs == 2 * causal_pairs(100) - causal_pairs(40)
    assert dpo.step_flops() == 8 * training_gpu.training_flops(MINUTE, 160, 120, pairs)
    assert reward.step_flops() == 8 * training_gpu.training_flops(MINUTE, 160, 0, pairs)
    sft = Case("sft", MINUTE, 100, 0.25, 400)
    assert sft.step_flops() == 16 * training_gpu.training_flops(MINUTE, 100, 85, causal_pairs(100))


def test_peak_of_the_card_by_its_name() -> None:
    assert (
        training_gpu.peak_flops("NVIDIA H200", None) == training_gpu.peak_flops("NVIDIA H100 80GB HBM3", None) == 989e12
    )
    assert training_gpu.peak_flops("NVIDIA A100-SXM4-80GB", None) == 312e12
    assert training_gpu.peak_flops("NVIDIA L4", None) is None
    assert training_gpu.peak_flops("NVIDIA L4", 121e12) == 121e12


def test_checkpointing_where_the_estimate_does_not_fit() -> None:
    case = Case("sft", SHAPES["1.7B"], 4096, 0.25)
    assert not training_gpu.needs_checkpointing(case, 141e9) and training_gpu.needs_checkpointing(case, 80e9)
    assert case.memory_bytes(checkpointing=True) < case.memory_bytes(checkpointing=False)


def test_a_steps_median_leaves_out_one_disturbed_run() -> None:
    assert training_tools.step_seconds([[1.0, 3.0], [2.0, 4.0], [1.0, 9.0]]) == [1.0, 2.0]


def test_time_by_kind_of_kernel() -> None:
    events = [("nvjet_tst_256x128", 3e6), ("void cutlass::device_kernel<flash::FlashAttnFwd>", 2e6)]
    events += [("multi_tensor_apply_kernel<FusedAdam>", 1e6), ("vectorized_elementwise_kernel", 1e6)]
    kinds = training_work.seconds_of_kinds(events)
    assert kinds == {"matrix products": 3.0, "attention": 2.0, "optimizer": 1.0, "elementwise": 1.0}
    assert training_gpu.shares(kinds, 10.0) == {
        "matrix products": 0.3, "attention": 0.2, "optimizer": 0.1, "elementwise": 0.1, "idle": pytest.approx(0.3)
    }  # fmt: skip


# --- Trainings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_plain_script_and_our_stage_do_the_same(stage: str, model: Path, tmp_path: Path) -> None:
    """Same rows, order, optimizer: same losses. What the speed is compared of is the same work."""
    lengths = mixed_lengths(16, 24, 20, 64, seed=0)
    rows = conversation_rows(lengths, MINUTE) if stage == "sft" else pair_rows(lengths, 0.25, MINUTE, 0.3, seed=0)
    inputs: dict[str, Any] = {
        "model": str(model),
        "dataset": str(training_rows.write_rows(rows, tmp_path / "rows.parquet")),
        "chat_template": training_tools.CHAT_TEMPLATE,
    }
    compute = {"device": "cpu", "per_device_train_batch_size": 4, "logging_steps": 1, "num_threads": 1}
    config: dict[str, Any] = {"learning_rate": 1e-2, "effective_batch_size": 8, "max_steps": 3, "seed": 5}
    config |= {"max_length": 64, "precision": "float32"}
    settings: dict[str, Any] = {"learning_rate": 1e-2, "max_steps": 3, "seed": 5, "bf16": False, "use_cpu": True}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1}
    settings |= {"save_strategy": "no", "disable_tqdm": True}
    if stage == "dpo":
        reference = {"stage": "reference_logps", "config": {"precision": "float32"}, "inputs": dict(inputs)}
        reference |= {"compute": compute, "folder": str(tmp_path / "reference"), "whole": True}
        training_work.our_stages([reference])
        inputs["reference_logps"] = str(tmp_path / "reference" / "out" / "reference_logps.parquet")
        settings |= {"loss_type": ["sigmoid_norm"], "beta": 5.0, "precompute_ref_log_probs": True}
    plain_rows = training_rows.write_plain_rows(rows, stage, tmp_path / "plain.parquet")
    plain = {"stage": stage, "model": str(model), "rows": str(plain_rows), "folder": str(tmp_path / "plain")}
    ours = {"stage": stage, "config": config, "inputs": inputs, "compute": compute, "folder": str(tmp_path / "ours")}
    [theirs] = training_work.plain_trl([plain | {"settings": settings}])
    [made] = training_work.our_stages([ours])
    assert len(theirs["ends"]) == len(made["ends"]) == 3
    # Ours leaves at the end of the last step, before that one is logged.
    assert made["losses"] == pytest.approx(theirs["losses"][:2], rel=1e-4) and len(made["losses"]) == 2


def test_without_a_gpu_there_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert training.main(["--parts", "3"]) == 0
    printed = capsys.readouterr().out
    assert "Skipped: torch finds no CUDA device" in printed and "| DPO 135M, 4,096 | 134.5 |" in printed


def test_part_3_on_a_minute_model(capsys: pytest.CaptureFixture[str]) -> None:
    device = ["--parts", "3", "--device", "cpu", "--stages", "dpo", "--lengths", "32", "--peak-flops", "1e11"]
    assert training.main([*TINY, *device]) == 0
    assert "| DPO minute, 32 |" in capsys.readouterr().out


@pytest.mark.slow
def test_parts_1_and_2_on_a_minute_model() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "training.py"), "--parts", "1", "2", "--stages", "dpo", *TINY]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    for name in ("same settings", "packing, a prompt with each answer", "DPO: cached reference alone"):
        assert name in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
    # Speeds of so small a model mean nothing: both outcomes are fine, a crash is not.
    assert done.returncode == int("| NO |" in done.stdout)
