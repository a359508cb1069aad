"""The loss on rows that are never trained on, at the start, on the way and at the end of SFT, reward model and DPO.

It is exact: the loss of every row is summed in float64, over all processes, and divided once, by all supervised tokens
(SFT) or pairs. So it does not depend on micro-batch, packing or the number of processes but for rounding in the model.
No random number is drawn, and no state of the training is touched.

transformers has `evaluate`, `load_best_model_at_end` and `EarlyStoppingCallback`. They are not used, for three reasons.
Its loss is the mean over batches of their means, which weighs a token by the batch it is in, and rows twice where
processes do not divide them. `load_best_model_at_end` keeps the best among the checkpoints, so that evaluations stand
only where checkpoints do, and how often one saves would decide about the weights. And the count of
`EarlyStoppingCallback` starts again after a resume from a checkpoint, unless another setting restores it. Here the
losses so far are part of a checkpoint, and all else follows from them: a killed run ends as an unbroken one.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from transformers import Trainer, TrainerCallback

from smoltulu.schemas.held_out_loss import HeldOutLoss, HeldOutLossOutputs, HeldOutLossSettings
from smoltulu.schemas.models import ModelOutputs
from smoltulu.tasks.stage import Diverged, StageContext
from smoltulu.tasks.trainer.best_weights import BestWeights
from smoltulu.tasks.trainer.sharded import gathered
from smoltulu.tasks.trainer.token_budget import row_costs, token_budget

logger = logging.getLogger("smoltulu")
#: File of a checkpoint.
STATE_FILE = "held_out_loss.json"


@dataclass(frozen=True)
class RowLoss:
    """Of one row.

    total     its loss, summed over what counts
    count     supervised tokens (SFT), or 1 (a pair)
    is_right  of a pair: whether the chosen side is before the rejected one
    """

    total: float
    count: int
    is_right: bool | None = None


#: Model, a batch as it was collated, and its rows -> the loss of each row.
LossesOf = Callable[[Any, dict[str, Any], Sequence[dict[str, Any]]], list[RowLoss]]


# ------------------------------------------------------------------------------------------------------- pure


def mean_loss(step: int, rows: Sequence[RowLoss]) -> HeldOutLoss:
    """Mean over all that counts; the standard error is that of a ratio of sums over rows.

    Diverged: the loss is not finite.
    """
    count = sum(row.count for row in rows)
    loss = math.fsum(row.total for row in rows) / count
    if not math.isfinite(loss):
        raise Diverged(
            f"the held-out loss is {loss} at step {step:,}; lower learning_rate, or look at the rows that are held out"
        )
    right = [row.is_right for row in rows if row.is_right is not None]
    accuracy = sum(right) / len(right) if right else None
    stderr = None
    if len(rows) > 1:
        spread = math.fsum((row.total - loss * row.count) ** 2 for row in rows)
        stderr = math.sqrt(spread * len(rows) / (len(rows) - 1)) / count
    return HeldOutLoss(step=step, loss=loss, accuracy=accuracy, stderr=stderr)


def best_of(losses: Sequence[HeldOutLoss]) -> HeldOutLoss:
    """The lowest; of several the earliest, which is nearest to the starting model."""
    return min(losses, key=lambda one: one.loss)


def num_stale(losses: Sequence[HeldOutLoss], min_delta: float = 0.0) -> int:
    """Evaluations since the last that was lower, by more than `min_delta`, than the lowest such one before."""
    lowest, stale = losses[0].loss, 0
    for one in losses[1:]:
        lowest, stale = (one.loss, 0) if lowest - one.loss > min_delta else (lowest, stale + 1)
    return stale


@dataclass
class Record:
    """All evaluations of a run, and why it ended before its budget did (None: it did not)."""

    losses: list[HeldOutLoss]
    num_counted: int = 0
    ended_early: str | None = None

    def save(self, checkpoint: Path) -> None:
        losses = [one.model_dump() for one in self.losses]
        (checkpoint / STATE_FILE).write_text(json.dumps(asdict(self) | {"losses": losses}))

    @staticmethod
    def of(checkpoint: Path) -> Record:
        seen = json.loads((checkpoint / STATE_FILE).read_text())
        losses = [HeldOutLoss.model_validate(one) for one in seen["losses"]]
        return Record(losses, seen["num_counted"], seen["ended_early"])


# --------------------------------------------------------------------------------------------- in the training


class HeldOutLosses(TrainerCallback):
    """Added to the trainer before the callbacks of tasks/trainer/loop.py: what it writes is part of the checkpoint.

    rows     tokenised, with the columns that the trainer's collator takes
    sources  source of each row, by number; None: not told apart
    """

    def __init__(
        self,
        trainer: Trainer,
        stage: str,
        rows: Any,
        settings: HeldOutLossSettings,
        context: StageContext,
        losses_of: LossesOf,
        sources: Sequence[int] | None = None,
    ) -> None:
        self.trainer, self.settings, self.losses_of, self.sources = trainer, settings, losses_of, sources
        self.rows, self.order = rows, _longest_first(rows)
        #: Of all evaluations here; no part of the training's speed (tasks/trainer/tracking.py).
        trainer.seconds_held_out = 0.0
        model = trainer.accelerator.unwrap_model(trainer.model)
        self.best = BestWeights(trainer, context.work, {"model": model}, ("held-out loss", stage.replace("_", "-")))
        self.record = Record([])
        self.every = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.every = self.settings.every(state.max_steps)
        if state.global_step:
            self.record = Record.of(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            if self.settings.keep == "best":
                self.best.require(best_of(self.record.losses).step, state.global_step)
        if self.record.ended_early:
            # The run is over. transformers' loop would look at the control only after a step.
            state.max_steps, control.should_training_stop = state.global_step, True
            self.trainer._run_epoch = lambda **kwargs: None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.record.losses:
            self._evaluate(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, is_last = state.global_step, state.global_step >= state.max_steps
        if step % self.every and not is_last:
            return
        self._evaluate(state, control)
        patience = self.settings.patience
        if is_last or patience is None or num_stale(self.record.losses, self.settings.min_delta) < patience:
            return
        losses = self.record.losses
        lowest = best_of(losses)
        self.record.ended_early = (
            f"at step {step:,} of {state.max_steps:,} the held-out loss is {losses[-1].loss:.4f} and has not been "
            f"lower for {patience:,} evaluations; the lowest is {lowest.loss:.4f}, of step {lowest.step:,}"
        )
        logger.warning("the run ends early: %s", self.record.ended_early)
        state.max_steps, control.should_save, control.should_training_stop = step, True, True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.record.save(checkpoint)
            self.best.note(checkpoint, best_of(self.record.losses).step)

    def _evaluate(self, state: Any, control: Any) -> None:
        """Each process computes a part, and all know the result."""
        if (settle := getattr(self.trainer, "settle_guard", None)) is not None:
            settle()  # a step at fault is told as such
        began = time.monotonic()
        rows = self._row_losses()
        self.trainer.seconds_held_out += time.monotonic() - began
        self.record.num_counted = sum(row.count for row in rows.values())
        made = mean_loss(state.global_step, list(rows.values()))
        so_far = self.record.losses
        if self.settings.keep == "best" and (not so_far or made.loss < best_of(so_far).loss):
            self.best.write(made.step)
        self.record.losses.append(made)
        logs = {"held_out/loss": made.loss, "held_out/stderr": made.stderr, "held_out/accuracy": made.accuracy}
        logs |= self._by_source(rows)
        # transformers' own `log`: those of the trainers would add the means of the training's metrics, and forget them.
        # It takes a log that is due at this step for done.
        is_due = control.should_log
        Trainer.log(self.trainer, {name: value for name, value in logs.items() if value is not None})
        control.should_log = is_due

    @torch.no_grad()
    def _row_losses(self) -> dict[int, RowLoss]:
        """Of all processes, by number of the row."""
        accelerator = self.trainer.accelerator
        model = accelerator.unwrap_model(self.trainer.model)
        mine = self.order[accelerator.process_index :: accelerator.num_processes]
        was_training, found = model.training, []
        model.eval()
        try:
            # Processes may have different numbers of batches.
            with gathered(model), accelerator.autocast() if accelerator.mixed_precision != "no" else nullcontext():
                for numbers in self._micro_batches(mine):
                    several = [self.rows[number] for number in numbers]
                    batch = send_to_device(self._collated(several), accelerator.device)
                    losses = self.losses_of(model, batch, several)
                    found += [(row["row"], asdict(one)) for row, one in zip(several, losses, strict=True)]
        finally:
            model.train(was_training)
        of_all: list[tuple[int, dict[str, Any]]] = sorted(gather_object(found), key=lambda pair: pair[0])
        return {number: RowLoss(**one) for number, one in of_all}

    def _micro_batches(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        """As the training cuts its steps: so many rows, or so many tokens."""
        if (budget := token_budget(self.trainer)) is not None:
            costs = row_costs(self.rows.data, budget.packing)
            places = budget.cut([costs[number] for number in numbers])
            return [[numbers[place] for place in several] for several in places]
        size = self.trainer.args.per_device_train_batch_size
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def _collated(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.trainer.data_collator(rows)
        return batch

    def _by_source(self, rows: dict[int, RowLoss]) -> dict[str, float]:
        """The loss of each source; none where there is but one, which is all."""
        if self.sources is None or len(set(self.sources)) < 2:
            return {}
        found: dict[int, list[RowLoss]] = {}
        for number, row in rows.items():
            found.setdefault(self.sources[number], []).append(row)
        return {
            f"held_out/source_{source}": math.fsum(row.total for row in several) / sum(row.count for row in several)
            for source, several in sorted(found.items())
            if any(row.count for row in several)
        }

    # ------------------------------------------------------------------------------------------------- the end

    @property
    def kept(self) -> HeldOutLoss:
        return best_of(self.record.losses) if self.settings.keep == "best" else self.record.losses[-1]

    def restore_best(self) -> None:
        """Put the weights that are kept into the model."""
        self.best.restore(self.kept.step)

    def outputs(self, outputs: ModelOutputs, metrics: dict[str, float]) -> tuple[ModelOutputs, dict[str, float]]:
        """Outputs and metrics of the stage with what the held-out rows said."""
        if not self.trainer.is_world_process_zero():
            return outputs, metrics
        found = HeldOutLossOutputs(
            num_rows=len(self.rows),
            num_counted=self.record.num_counted,
            losses=tuple(self.record.losses),
            kept_step=self.kept.step,
            why=self._why(),
            ended_early=self.record.ended_early,
        )
        logger.info(
            "held-out loss %.4f at the start, %.4f at the end; %s", found.start.loss, found.last.loss, found.why
        )
        more = {"held_out/loss": found.kept.loss, "held_out/start": found.start.loss}
        more |= {"kept_step": float(found.kept_step)} if self.settings.decides else {}
        return outputs.model_copy(update={"held_out_loss": found}), metrics | more

    def _why(self) -> str:
        kept, losses = self.kept, self.record.losses
        if self.settings.keep == "last":
            return f"keep is last: the weights of step {kept.step:,} are kept"
        said = (
            f"keep is best: the weights of step {kept.step:,} are kept, whose held-out loss {kept.loss:.4f} is the "
            f"lowest of {len(losses):,} evaluations"
        )
        return said + (", so they are those that the run started from" if not kept.step else "")


def _longest_first(rows: Any) -> list[int]:
    """Places of the rows: little padding, and what does not fit into memory fails at once. Tokens stay on disk."""
    import numpy as np
    import pyarrow.compute as pc

    columns = [name for name in rows.column_names if name.endswith("_ids")]
    lengths = sum(pc.list_value_length(rows.data.column(name)).to_numpy() for name in columns)
    order: list[int] = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    return order
