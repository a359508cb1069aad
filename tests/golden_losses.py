"""The losses of ten optimizer steps of each stage, pinned in golden_losses.json: a change of mathematics is seen.

CPU, float32, one thread, fixed seed, the two-layer model of `tests/tiny_model.py`. Not bitwise: another CPU, or another
build of torch, adds in another order, which changes the last bits of a float32 and, through Adam's division by the
gradient's own size, grows from step to step. `python -m tests.golden_losses --measure` perturbs every initial weight by
one part in 10^6, far more than any order of additions does, and says by how much the losses move; `TOLERANCE` is above
that, and a real change of the loss, the mask, the schedule or the order of rows is far above the tolerance.

RLVR is not here: its completions are sampled, and one token that falls to the other side of a random number makes all
that follows another run. That one machine repeats it bitwise is tested in `tests/tasks/trainer/test_training.py`.

Where a change is meant (a library's version, a stage's mathematics: raise its `version` then), write the file anew and
look at its diff:

    python -m tests.golden_losses --write
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.small_runs import conversations, pairs, run
from tests.tiny_model import build_tiny_model

FILE = Path(__file__).with_suffix(".json")
STAGES = ("sft", "reward_model", "dpo")
NUM_STEPS = 10
TOLERANCE = 1e-4  # relative
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3, "effective_batch_size": 4, "warmup_ratio": 0.2, "max_steps": NUM_STEPS,
    "num_train_epochs": 10, "seed": 7,
}  # fmt: skip


def golden_losses(stage: str, folder: Path, perturbation: float = 0.0) -> list[float]:
    """Loss of each of the ten steps; every initial weight times 1 ± `perturbation`."""
    import torch
    from safetensors.torch import load_file, save_file

    model = build_tiny_model(folder / "model")
    if perturbation:
        generator = torch.Generator().manual_seed(1)
        file = model / "model.safetensors"
        weights = {
            name: value * (1 + perturbation * (2 * torch.rand(value.shape, generator=generator) - 1))
            for name, value in load_file(file).items()
        }
        save_file(weights, file, {"format": "pt"})
    rows = conversations(12) if stage == "sft" else pairs(12)
    # Saving costs more than training here.
    history = run(stage, folder, model, rows, SETTINGS, save_steps=NUM_STEPS).history
    return [row["loss"] for row in history]


def environment() -> dict[str, str]:
    """Versions that a loss may depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "trl")}


def main(arguments: list[str]) -> int:
    """Write the file, measure the tolerance, or print the losses."""
    os.environ["OMP_NUM_THREADS"] = "1"
    losses: dict[str, list[float]] = {}
    for stage in STAGES:
        with tempfile.TemporaryDirectory() as folder:
            losses[stage] = golden_losses(stage, Path(folder) / "plain")
            if arguments == ["--measure"]:
                moved = golden_losses(stage, Path(folder) / "moved", perturbation=1e-6)
                worst = max(abs(a - b) / abs(a) for a, b in zip(losses[stage], moved, strict=True))
                print(f"{stage}: largest relative difference {worst:.1e}, tolerance {TOLERANCE:.0e}")
    if arguments == ["--write"]:
        FILE.write_text(json.dumps({"environment": environment(), "losses": losses}, indent=1) + "\n")
        print(f"wrote {FILE}")
    elif not arguments:
        print(json.dumps(losses, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
