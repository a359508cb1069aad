"""benchmarks/real_rlvr.py: its prompts, its verdict by hand, and two arms on the two-layer model, in two commands."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import real_model, real_rlvr
from benchmarks.real_prompts import HELD_OUT_KINDS, TRAINED_KINDS, held_out_rows, training_rows
from smoltulu.tasks.verifiers import fault_of_truth
from tests.tiny_model import build_tiny_model


def topic(row: dict[str, Any]) -> str:
    return str(row["id"].split("/")[1])


def test_held_out_topics_and_kinds_are_not_trained() -> None:
    trained, held_out = training_rows(0), held_out_rows(0, 16)
    kinds = [Counter(row["id"].partition("/")[0] for row in rows) for rows in (trained, held_out)]
    assert set(kinds[0]) == set(TRAINED_KINDS) and not set(TRAINED_KINDS) & set(HELD_OUT_KINDS)
    assert kinds[1] == dict.fromkeys((*TRAINED_KINDS, *HELD_OUT_KINDS), 16)
    assert not {topic(row) for row in trained} & {topic(row) for row in held_out}
    for rows in (trained, held_out):
        assert len({row["id"] for row in rows}) == len(rows)
        assert [fault_of_truth(row["verifier"], row["ground_truth"]) for row in rows] == [None] * len(rows)


def test_the_seed_decides_the_rows_and_nothing_else_does() -> None:
    assert training_rows(3) == training_rows(3) != training_rows(4)
    assert held_out_rows(3, 16)[:16] == held_out_rows(3, 16)[:16] != held_out_rows(4, 16)[:16]


def result(*shares: float, kind: str = TRAINED_KINDS[0]) -> dict[str, Any]:
    return {"prompts": {f"{kind}/{place}": {"kind": kind, "mean": share} for place, share in enumerate(shares)}}


@pytest.mark.parametrize(
    ("after", "is_learned"),
    [
        # All six prompts gain: p = 2 / 2^6 = 0.031.
        (result(0.25, 0.5, 0.75, 1.0, 0.5, 0.75), True),
        # Five of six: 2 / 2^5 = 0.063.
        (result(0.0, 0.5, 0.75, 1.0, 0.5, 0.75), False),
        # All six lose.
        (result(-0.25, 0.0, 0.25, 0.0, 0.0, 0.0), False),
    ],
)
def test_grpo_has_to_gain_on_the_trained_kinds(after: dict[str, Any], is_learned: bool) -> None:
    before = result(0.0, 0.25, 0.5, 0.5, 0.25, 0.25)
    assert real_rlvr.is_learned({"start": before, "grpo": after}) is is_learned
    assert not real_rlvr.is_learned({"start": before, "ppo": after})


def test_kl_and_entropy_are_of_the_tokens_that_were_written(tmp_path: Path) -> None:
    """Beside one text at a time, without padding, and each sum written out."""
    models = [
        AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path / str(seed), seed=seed)).eval()
        for seed in (0, 1)
    ]
    texts = [([5, 6, 7], [8, 9]), ([5], [6, 7, 8, 9]), ([9, 8, 7, 6, 5], [4])]
    kl = entropy = 0.0
    for prompt, written in texts:
        with torch.no_grad():
            ours, theirs = (
                model(torch.tensor([prompt + written])).logits[0].double().softmax(-1).tolist() for model in models
            )
        for place in range(len(prompt) - 1, len(prompt) + len(written) - 1):
            kl += sum(p * math.log(p / q) for p, q in zip(ours[place], theirs[place], strict=True))
            entropy -= sum(p * math.log(p) for p in ours[place])
    found = real_model.distances(models[0], models[1], texts, pad_id=1, batch_size=2)
    assert found == pytest.approx((kl / 7, entropy / 7), rel=1e-4)
    assert real_model.distances(models[0], models[0], texts, pad_id=1, batch_size=2)[0] == 0


@pytest.mark.slow
def test_arms_are_trained_evaluated_and_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = build_tiny_model(tmp_path / "model", max_position_embeddings=512)
    arguments = [
        "--model", str(model), "--folder", str(tmp_path / "work"), "--arms", "grpo", "ppo", "constant",
        "--batch", "8", "--steps", "2", "--generations", "4", "--new-tokens", "6", "--learning-rate", "1e-3",
        "--eval-prompts", "1", "--samples", "2", "--threads", "1",
    ]  # fmt: skip
    for arm in ("grpo", "ppo", "constant"):
        assert real_rlvr.main([*arguments, "--only-arm", arm]) == 0
    # The rest in a process of its own. A random model learns nothing in two steps.
    assert real_rlvr.main(arguments) == 1
    shown, said = capfd.readouterr()
    made = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "work" / "results").glob("*.json")}
    assert made.keys() == {"real-start", "real-grpo", "real-ppo", "real-constant"}
    for name, one in made.items():
        assert len(one["prompts"]) == len(TRAINED_KINDS) + len(HELD_OUT_KINDS), name
        assert one["is_whole"] and one["num_steps"] == (0 if name == "real-start" else 2)
    assert made["real-start"]["kl"] == 0 and made["real-ppo"]["kl"] > 0
    # Rewards that are all the same have no gradient.
    assert made["real-constant"]["kl"] == 0
    assert "\n| ppo | 2 | " in shown and "trained constraints, paired p < 0.05: NO" in said
    assert not (tmp_path / "work" / "arms" / "ppo" / "work" / "checkpoints").exists()

    before = (tmp_path / "work" / "results" / "real-ppo.json").stat().st_mtime_ns
    assert real_rlvr.main(arguments) == 1
    assert "to do: nothing" in capfd.readouterr().err
    assert (tmp_path / "work" / "results" / "real-ppo.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"holds a run with steps 2; give another --folder"):
        real_rlvr.main([*arguments, "--steps", "3"])


def test_a_training_that_is_ended_early_is_evaluated_and_goes_on_later(tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "model", max_position_embeddings=512)
    arguments = [
        "--model", str(model), "--folder", str(tmp_path / "work"), "--arms", "grpo", "--batch", "8", "--steps", "4",
        "--generations", "4", "--new-tokens", "6", "--eval-prompts", "1", "--samples", "2", "--threads", "1",
    ]  # fmt: skip
    file = tmp_path / "work" / "results" / "real-grpo.json"
    real_rlvr.main([*arguments, "--train-seconds", "1e-6", "--only-arm", "grpo"])
    cut = json.loads(file.read_text())
    assert cut["num_steps"] == 1 and not cut["is_whole"] and len(cut["prompts"]) > 0
    real_rlvr.main([*arguments, "--only-arm", "grpo"])
    assert json.loads(file.read_text())["num_steps"] == 4
    resumed = (tmp_path / "work" / "arms" / "grpo" / "work" / "resumed.jsonl").read_text()
    assert resumed == "1\n"
