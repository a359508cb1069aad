"""Time of an optimizer step of SFT by two gloo ranks: FSDP2 (`compute.parallel`) against DDP, in one run.

    python benchmarks/sharded.py [--shape small] [--ranks 2] [--steps 6] [--rounds 3]

Both train the same steps on the same rows through the stage's own trainer: lengths of the SFT data's mix divided by
eight, packed, 32 rows a step, four micro-batches a rank. Arms take turns within a round; of every step the fastest
round counts. A third arm exchanges FSDP2's gradients once a step, as DDP does: each rank then holds those of the whole
model, and this shows what that would save. `held`: bytes of weights, gradients and moments on a rank.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.training_rows import (
    MIX_MEAN,
    MIX_MEDIAN,
    SHAPES,
    Shape,
    conversation_rows,
    mixed_lengths,
    write_model,
    write_rows,
)
from benchmarks.training_tools import CHAT_TEMPLATE, LEARNING_RATE, SEED, step_clock, table

EFFECTIVE, LONGEST, SCALE, GOAL = 32, 4096, 8, 1.3


@dataclass
class Arm:
    """A kind of parallelism, and what it took."""

    name: str
    parallel: str
    exchanges_once: bool = False
    rounds: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    held: int = 0

    @property
    def seconds(self) -> list[float]:
        """Of every step, in its fastest round."""
        return [min(times) for times in zip(*self.rounds, strict=True)]


def train(arm: Arm, model: Path, dataset: Path, folder: Path, num_ranks: int, num_steps: int) -> None:
    """One round: the first step of all warms up and is left out."""
    from transformers import PrinterCallback

    from smoltulu.schemas.compute import ComputeSettings
    from smoltulu.schemas.training import SFTSettings, TrainingInputs
    from smoltulu.tasks.stage import StageContext
    from smoltulu.tasks.training.sft import build

    settings = SFTSettings(
        learning_rate=LEARNING_RATE, effective_batch_size=EFFECTIVE, max_length=LONGEST // SCALE, precision="float32",
        max_steps=num_steps + 1, seed=SEED,
    )  # fmt: skip
    compute = ComputeSettings.model_validate(
        {
            "device": "cpu",
            "num_threads": 1,
            "logging_steps": 1,
            "num_processes": num_ranks,
            "parallel": arm.parallel,
            "per_device_train_batch_size": EFFECTIVE // num_ranks // 4,
        }
    )
    inputs = TrainingInputs(model=str(model), dataset=str(dataset), chat_template=CHAT_TEMPLATE)
    trainer = build(settings, inputs, StageContext(folder, folder, compute, lambda *args, **kwargs: None))
    trainer.args.save_strategy = "no"
    seconds: list[float] = []

    @contextmanager
    def no_sync() -> Iterator[None]:
        trainer.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            trainer.model.set_requires_gradient_sync(True)

    if arm.exchanges_once:
        trainer._defer_fsdp_gradient_reduction = no_sync

    trainer.add_callback(step_clock(seconds))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    arm.rounds.append(seconds[1:])
    arm.losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    arm.held = 16 * sum(getattr(one, "_local_tensor", one).numel() for one in trainer.model.parameters())
    if arm.exchanges_once:
        arm.held += 4 * sum(one.numel() for one in trainer.model.parameters())


def make(shape: Shape, lengths: list[int], folder: Path) -> None:
    """Model and rows."""
    write_model(shape, folder / "model")
    write_rows(conversation_rows(lengths, shape), folder / "rows.parquet")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="timed optimizer steps of 32 rows")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)

    import torch
    import transformers

    from smoltulu.tasks.engine.ranks import fork_ranks

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    shape = SHAPES[options.shape]
    lengths = mixed_lengths(
        EFFECTIVE * (options.steps + 1), MIX_MEAN / SCALE, MIX_MEDIAN / SCALE, LONGEST // SCALE, SEED
    )
    made = [Arm("DDP", "ddp"), Arm("FSDP2", "fsdp2"), Arm("FSDP2, gradients once a step", "fsdp2", exchanges_once=True)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = folder / "rows.parquet"
        # In a process of its own: pyarrow's threads would not come along into the ranks.
        making = multiprocessing.get_context("spawn").Process(target=make, args=(shape, lengths, folder))
        making.start()
        making.join()
        if (status := fork_ranks(options.ranks)) is not None:
            return status
        is_main = os.environ["RANK"] == "0"
        sys.stdout = sys.stdout if is_main else open(os.devnull, "w")  # noqa: SIM115
        for number in range(options.rounds):
            for arm in made:
                work = folder / f"{number}-{made.index(arm)}"
                work.mkdir(exist_ok=True)
                train(arm, folder / "model", dataset, work, options.ranks, options.steps)
        if is_main:
            report(made, shape, options)
    sys.stdout.flush()
    os._exit(0)  # the folder is the launcher's to remove


def report(made: list[Arm], shape: Shape, options: argparse.Namespace) -> None:
    print(
        f"{shape.name} ({shape.num_parameters / 1e6:.1f} M parameters), {options.ranks} ranks over gloo on "
        f"{os.cpu_count()} cores, {options.steps} steps of {EFFECTIVE} rows in 4 micro-batches a rank, fastest of "
        f"{options.rounds} rounds"
    )
    first, lines = made[0], []
    for arm in made:
        ratios = [one / other for one, other in zip(arm.seconds, first.seconds, strict=True)]
        far = max(abs(one - other) for one, other in zip(arm.losses, first.losses, strict=True))
        ratio = sum(arm.seconds) / sum(first.seconds)
        shown = f"{ratio:.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        lines.append(
            [arm.name, f"{sum(arm.seconds) / options.steps:.3f}", shown, f"{arm.held / 1e6:.1f} MB", f"{far:.1e}"]
        )
    table(["arm", "seconds a step", "/ DDP (of steps)", "held", "loss apart"], lines)
    ratio = sum(made[1].seconds) / sum(first.seconds)
    print(f"\nFSDP2 / DDP: {ratio:.2f} x, goal at most {GOAL} x: {'met' if ratio <= GOAL else 'missed'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
