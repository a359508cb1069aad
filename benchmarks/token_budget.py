"""Time of an optimizer step of SFT: micro-batches by tokens against fixed rows, at the length mix of the SFT data.

    python benchmarks/token_budget.py [--shape minute] [--scale 8] [--steps 6] [--rounds 3]

Lengths: log-normal with mean 517 and median 404 tokens, cut at 4,096, all divided by `--scale` for a small model. Every
arm takes the same steps on the same rows through the stage's own trainer (attention, loss, clipping, AdamW). Arms take
turns within a round; of every step the fastest round counts, which the machine's other work disturbed least.

Fixed rows (1: the default; `--rows`: 4, as recipe smoltulu-1130) are compared with `auto` of as many: a micro-batch
then holds at most the tokens that so many rows have at their worst, so the memory that must be there is the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.training_rows import (
    MIX_MEAN,
    MIX_MEDIAN,
    SHAPES,
    conversation_rows,
    mixed_lengths,
    write_model,
    write_rows,
)
from benchmarks.training_tools import CHAT_TEMPLATE, LEARNING_RATE, SEED, step_clock, table

LONGEST, EFFECTIVE, GOAL = 4096, 32, 1.3


@dataclass
class Arm:
    """One way to cut the steps, and what it took."""

    name: str
    compute: dict[str, Any]
    fixed: str | None = None
    rounds: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    num_batches: int = 0
    most_tokens: int = 0

    @property
    def seconds(self) -> list[float]:
        """Of every step, in its fastest round."""
        return [min(times) for times in zip(*self.rounds, strict=True)]


def arms(fixed_rows: int) -> list[Arm]:
    """Fixed rows, and budgets against them, packed and padded."""
    made = []
    for packing, rows in ((True, 1), (True, fixed_rows), (False, fixed_rows)):
        compute = {"packing": packing, "per_device_train_batch_size": rows}
        layout = "packed" if packing else "padded"
        name = f"{layout}, rows: {rows}"
        made.append(Arm(name, compute))
        made.append(Arm(f"{layout}, auto of {rows}", compute | {"tokens_per_device": "auto"}, name))
    return made


def train(arm: Arm, model: Path, dataset: Path, folder: Path, longest: int, num_steps: int) -> None:
    """One round: the first steps of a training; the first of all warms up and is left out."""

    from smoltulu.schemas.compute import ComputeSettings
    from smoltulu.schemas.training import SFTSettings, TrainingInputs
    from smoltulu.tasks.stage import StageContext
    from smoltulu.tasks.trainer.token_budget import CutStep
    from smoltulu.tasks.training.sft import build

    machine = {"device": "cpu", "num_threads": 1, "logging_steps": 1, "save_steps": 10**6}
    settings = SFTSettings(
        learning_rate=LEARNING_RATE, effective_batch_size=EFFECTIVE, max_length=longest, precision="float32",
        max_steps=num_steps + 1, seed=SEED,
    )  # fmt: skip
    inputs = TrainingInputs(model=str(model), dataset=str(dataset), chat_template=CHAT_TEMPLATE)
    context = StageContext(folder, folder, ComputeSettings(**machine | arm.compute), lambda *args, **kwargs: None)
    trainer = build(settings, inputs, context)
    trainer.args.save_strategy = "no"
    sizes: list[int] = []
    seconds: list[float] = []
    samples = trainer.get_batch_samples

    def get_batch_samples(*args: Any) -> Any:
        batches, num_items = samples(*args)
        sizes.extend(
            batch["input_ids"].numel() for one in batches for batch in (one if isinstance(one, CutStep) else [one])
        )
        return batches, num_items

    trainer.get_batch_samples = get_batch_samples
    trainer.add_callback(step_clock(seconds))
    trainer.train()
    arm.rounds.append(seconds[1:])
    arm.losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    arm.num_batches, arm.most_tokens = len(sizes), max(sizes)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--scale", type=int, default=8, help="lengths are divided by it")
    parser.add_argument("--steps", type=int, default=6, help="timed optimizer steps of 32 rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="of the larger fixed micro-batch")
    options = parser.parse_args(arguments)

    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    shape, longest = SHAPES[options.shape], LONGEST // options.scale
    lengths = mixed_lengths(
        EFFECTIVE * (options.steps + 1), MIX_MEAN / options.scale, MIX_MEDIAN / options.scale, longest, SEED
    )
    made = arms(options.rows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(shape, folder / "model")
        dataset = write_rows(conversation_rows(lengths, shape), folder / "rows.parquet")
        for number in range(options.rounds):
            for arm in made:
                work = folder / f"{number}-{made.index(arm)}"
                work.mkdir()
                train(arm, folder / "model", dataset, work, longest, options.steps)

    by_name = {arm.name: arm for arm in made}
    lines: list[list[str]] = []
    ratios: dict[str, float] = {}
    for arm in made:
        seconds, num_steps = sum(arm.seconds) / options.steps, options.steps + 1
        shown = far = "–"
        if arm.fixed is not None:
            fixed = by_name[arm.fixed]
            ratios[arm.name] = sum(fixed.seconds) / sum(arm.seconds)
            spread = [one / other for one, other in zip(fixed.seconds, arm.seconds, strict=True)]
            shown = f"{ratios[arm.name]:.2f} ({min(spread):.2f}–{max(spread):.2f})"
            far = f"{max(abs(one - other) for one, other in zip(fixed.losses, arm.losses, strict=True)):.1e}"
        per_step = f"{arm.num_batches / num_steps:.1f}"
        lines.append([arm.name, per_step, f"{arm.most_tokens:,}", f"{seconds:.3f}", shown, far])
    print(
        f"{shape.name} ({shape.num_parameters / 1e6:.1f} M parameters), rows of {statistics.fmean(lengths):.0f} tokens "
        f"(median {statistics.median(lengths):.0f}, longest {max(lengths)}), {options.steps} steps of {EFFECTIVE} "
        f"rows, fastest of {options.rounds} rounds, one thread"
    )
    head = ["arm", "micro-batches a step", "most tokens", "seconds a step", "fixed / budget (of steps)", "loss apart"]
    table(head, lines)
    print()
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} x, goal {GOAL} x " + ("met" if ratio >= GOAL else "missed"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
