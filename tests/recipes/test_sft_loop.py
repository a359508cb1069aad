"""The plain loop of SFT takes the stage's steps, so each is held against the other as a whole."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from smoltulu.recipes.loops.sft import sft
from tests import ROOT
from tests.small_runs import conversations, run
from tests.tiny_model import TULU_TEMPLATE, build_tiny_model

#: Three epochs of 22 rows in steps of 8: nine steps, the third, sixth and ninth of which hold six rows. Some rows are
#: longer than 40 tokens, two of the nine steps are warm-up, and every gradient is clipped.
ROWS = conversations(22)
SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-3, "effective_batch_size": 8, "num_train_epochs": 3, "warmup_ratio": 0.2, "max_length": 40,
    "weight_decay": 0.1, "max_grad_norm": 0.8, "adam_epsilon": 1e-6, "seed": 11,
}  # fmt: skip
#: Relative. The two add in another order (rows end to end here, padded there), which changes the last bits of a sum:
#: 2e-7 after nine steps when this was written. Anything that either does otherwise is far above it, see below.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base"))


def loop(base: Path, settings: dict[str, Any], **more: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """What the loop says of its steps, and the weights it ends with."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TULU_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    steps = list(sft(model, tokenizer, [row["messages"] for row in ROWS], **settings | more))
    return steps, {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("per_device", [4, 1])
def test_every_step_of_the_stage_is_that_of_the_plain_loop(base: Path, tmp_path: Path, per_device: int) -> None:
    stage = run("sft", tmp_path, base, ROWS, SETTINGS, per_device_train_batch_size=per_device, save_steps=100)
    steps, weights = loop(base, SETTINGS, micro_batch_size=2)
    assert len(stage.history) == 9
    for ours, plain in zip(stage.history, steps, strict=True):
        for name in ("step", "loss", "grad_norm", "learning_rate"):
            assert ours[name] == pytest.approx(plain[name], rel=TOLERANCE, abs=0), (name, ours, plain)
    trained, before = load_file(stage.model / "model.safetensors"), load_file(base / "model.safetensors")
    assert weights.keys() == trained.keys()
    for name, value in trained.items():
        moved = float((value - before[name]).abs().max())
        torch.testing.assert_close(weights[name], value, rtol=0, atol=TOLERANCE * moved)


def test_in_bfloat16_too(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast, on a CPU that can. The two round at the same places: gradient norms are five times nearer to each
    other than to those of float32 (4e-4 and 2e-3 when this was written), where each rounding is one of 4e-3.
    """
    monkeypatch.setattr("smoltulu.tasks.trainer.loop.use_bfloat16", lambda precision, compute: True)
    stage = run("sft", tmp_path, base, ROWS, SETTINGS, per_device_train_batch_size=4, save_steps=100)
    (steps, _), (exact, _) = (loop(base, SETTINGS, micro_batch_size=4, bfloat16=half) for half in (True, False))
    for ours, plain in zip(stage.history, steps, strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
    assert max(abs(one["grad_norm"] / other["grad_norm"] - 1) for one, other in zip(steps, exact, strict=True)) > 1e-3


@pytest.mark.parametrize("change", [
    {"learning_rate": 3.001e-3}, {"effective_batch_size": 7}, {"num_train_epochs": 2}, {"warmup_ratio": 0.3},
    {"max_length": 39}, {"weight_decay": 0.0}, {"max_grad_norm": 1e9}, {"adam_epsilon": 1e-8}, {"seed": 12},
])  # fmt: skip
def test_every_setting_of_the_loop_is_seen_in_its_steps(base: Path, change: dict[str, Any]) -> None:
    """So a stage that ignored one could not have passed."""
    (steps, _), (others, _) = loop(base, SETTINGS), loop(base, SETTINGS | change)
    assert len(steps) != len(others) or any(
        abs(one["loss"] / other["loss"] - 1) > 3 * TOLERANCE for one, other in zip(steps, others, strict=True)
    )


SCRIPT = ROOT / "recipes" / "loops" / "sft.py"


def script(monkeypatch: pytest.MonkeyPatch, base: Path, rows: list[dict[str, Any]], folder: Path) -> Path:
    """Call it; the folder of its model."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(base), str(folder / "rows.jsonl"), str(folder / "model")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return folder / "model"


def test_the_loop_is_a_script_of_its_own(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It needs nothing of ours: a learner may copy it."""
    model = script(monkeypatch, base, ROWS, tmp_path)
    assert capsys.readouterr().out.splitlines()[-1].startswith("{'step': 2, 'loss': 5.9")
    assert load_file(model / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    assert "smoltulu" not in SCRIPT.read_text() and len(SCRIPT.read_text().splitlines()) <= 80


@pytest.mark.parametrize("more", [
    {"tools": [{"type": "function"}]}, {"messages": [turn | {"train": True} for turn in ROWS[0]["messages"]]},
])  # fmt: skip
def test_what_the_loop_does_not_read_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    with pytest.raises(SystemExit, match="reads role and content only"):
        script(monkeypatch, base, [ROWS[1] | {"tools": []}, ROWS[0] | more], tmp_path)
