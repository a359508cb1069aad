"""What ends a training before it corrupts its weights: rules as pure functions, and the callback that applies them.

At every optimizer step: loss and gradient norm are finite, and the loss is not exactly 0.
Before every checkpoint: the weights are finite. At every log: the loss has not grown. See docs/guards.md.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.stage import Diverged
from smoltulu.tasks.trainer.even_rows import is_blank
from smoltulu.tasks.trainer.sharded import all_finite
from smoltulu.tasks.trainer.token_budget import CutStep
from smoltulu.tasks.trainer.waits import HostCopy, is_on_host

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

#: The loss has grown when its mean over so many optimizer steps ...
WINDOW = 50
#: ... is above so many times that of the first ones after warm-up ...
GROWTH = 1.5
#: ... and by more than this: the mean of a loss near 0 doubles by chance.
MIN_RISE = 0.1
_ZERO = "loss is exactly 0"
_SHOWN_ROWS = 8
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class LossRule:
    """What a stage's loss values mean.

    zero_is_fault   exactly 0 means that nothing was trained; not so where 0 is a good loss (DPO's hinge), and in GRPO,
                    whose advantages have a mean of 0
    must_not_grow   a mean that grows means divergence; not so in GRPO
    """

    zero_is_fault: bool = True
    must_not_grow: bool = True


def fault_of_step(losses: Sequence[float], grad_norms: Sequence[float], zero_is_fault: bool) -> str | None:
    """The fault of an optimizer step, by loss and gradient norm of every process; None where there is none."""
    for loss in losses:
        if not math.isfinite(loss):
            return f"loss is {loss}"
    for loss, grad_norm in zip(losses, grad_norms, strict=True):
        if not math.isfinite(grad_norm):
            return f"gradient norm is {grad_norm} (loss {loss:.4g})"
    if zero_is_fault and any(loss == 0 for loss in losses):
        return _ZERO
    return None


def is_corrupt(loss: float, zero_is_fault: bool) -> bool:
    """Whether the loss of one micro-batch is itself at fault."""
    return not math.isfinite(loss) or (zero_is_fault and loss == 0)


class LossMeans:
    """Mean loss of the first `WINDOW` steps after warm-up and of the last ones, from what is logged."""

    def __init__(self, num_warmup_steps: int) -> None:
        self.num_warmup_steps = num_warmup_steps
        self.step = 0
        self.first: list[tuple[int, float]] = []
        # An entry stands for at least one step, so these are enough.
        self.last: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def add(self, step: int, loss: float) -> None:
        """`loss` is the mean of the steps since the one that was added before."""
        if step <= self.step:
            return
        start, self.step = self.step, step
        if sum(num_steps for num_steps, _ in self.first) >= WINDOW:
            self.last.append((step - start, loss))
        elif start >= self.num_warmup_steps:
            self.first.append((step - start, loss))

    def early_and_late(self) -> tuple[float, float] | None:
        """The two means; None while there are too few steps for windows that do not overlap."""
        late: list[tuple[int, float]] = []
        for span in reversed(self.last):
            late.append(span)
            if sum(num_steps for num_steps, _ in late) >= WINDOW:
                return _mean(self.first), _mean(late)
        return None


def has_diverged(early: float, late: float) -> bool:
    """Whether a training diverges whose mean loss rose from `early` to `late`."""
    # Some losses are negative: there a multiple of the early loss lies below it.
    return late - early > max(MIN_RISE, (GROWTH - 1) * abs(early))


def _mean(spans: Sequence[tuple[int, float]]) -> float:
    return sum(num_steps * loss for num_steps, loss in spans) / sum(num_steps for num_steps, _ in spans)


# ------------------------------------------------------------------------------------------------ which rows these were


def rows_of(batch: Any, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The rows of a micro-batch as "row 17 'how it begins'", by their number in the source rows.

    GRPO's batches are rows, not tokens, and hold a prompt several times: its number is that of its line in `dataset`.
    Reads a column of the whole dataset: only for a training that ends.
    """
    if isinstance(batch, list):
        texts = {str(row["prompt"]): row["prompt"][0]["content"] for row in batch}
        lines = {str(prompt): line for line, prompt in enumerate(dataset["prompt"])}
        return [_named(lines[prompt], text) for prompt, text in texts.items()]
    numbers = batch["row"].tolist()
    lines = {number: line for line, number in enumerate(dataset["row"]) if number in numbers}
    return [_named(number, tokenizer.decode(_first_tokens(dataset[lines[number]]))) for number in numbers]


def _first_tokens(row: Mapping[str, Any]) -> list[int]:
    ids: list[int] = row["input_ids"] if "input_ids" in row else row["prompt_ids"] + row["chosen_ids"]
    return ids[:_SHOWN_CHARACTERS]


def _named(number: int, text: str) -> str:
    return f"row {number:,} {text[:_SHOWN_CHARACTERS]!r}"


# --------------------------------------------------------------------------------------------------- in the training


@dataclass(frozen=True)
class _Unread:
    """An optimizer step: of each process loss, gradient norm, whether it had rows, and whether it was asked to stop."""

    number: int
    numbers: HostCopy
    micro_batches: list[tuple[Any, torch.Tensor]]


def guard(trainer: Trainer, rule: LossRule, num_warmup_steps: Callable[[int], int]) -> TrainerCallback:
    """The callback that ends a training of `trainer` with a ValueError; every process raises the same one.

    The trainer keeps the loss of a step and the gradient norm to itself until it logs: both are taken where they are
    computed. A GPU is not waited for: its numbers are read a step later, and before anything is logged, evaluated or
    saved, so that nothing of a step at fault is kept. `num_warmup_steps`: of a training of so many steps.
    """
    import torch
    from accelerate.utils import gather_object
    from transformers import TrainerCallback

    step_of_trainer, norm_of_trainer = trainer.training_step, trainer._get_grad_norm
    micro_batches: list[tuple[Any, torch.Tensor]] = []
    grad_norms: list[Any] = []

    def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = step_of_trainer(model, inputs, *args, **kwargs)
        micro_batches.extend(
            zip(inputs, inputs.losses, strict=True) if isinstance(inputs, CutStep) else [(inputs, loss)]
        )
        return loss

    def grad_norm(*args: Any, **kwargs: Any) -> Any:
        grad_norms.append(norm_of_trainer(*args, **kwargs))
        return grad_norms[-1]

    trainer.training_step, trainer._get_grad_norm = training_step, grad_norm
    stop = getattr(trainer, "stop_when_asked", None)  # tasks/trainer/stop.py

    def rows_where(step: _Unread, is_wanted: Callable[[float], bool]) -> list[str]:
        """The rows of this process's micro-batches whose loss is wanted."""
        return [
            name
            for batch, loss in step.micro_batches
            if not is_blank(batch) and is_wanted(loss.item())
            for name in rows_of(batch, trainer.train_dataset, trainer.processing_class)
        ]

    class Guard(TrainerCallback):
        def __init__(self) -> None:
            #: The step whose numbers are not read yet, and its micro-batches.
            self.unread: _Unread | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.means = LossMeans(num_warmup_steps(state.max_steps))
            for row in state.log_history:  # of the steps before a resume
                if "loss" in row:
                    self.means.add(row["step"], row["loss"])

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.settle()
            loss = torch.stack([loss for _, loss in micro_batches]).sum()

            def alike(value: Any) -> torch.Tensor:
                # torch.full: a tensor of a number of the host would be copied, and waited for.
                is_there = isinstance(value, torch.Tensor)
                return (
                    value.to(loss) if is_there else torch.full((), float(value), dtype=loss.dtype, device=loss.device)
                )

            has_rows = not all(is_blank(batch) for batch, _ in micro_batches)
            own = [loss, *map(alike, (grad_norms[-1], has_rows))]
            if stop is not None:
                own.append(alike(stop.asked.is_set()))
            # Every process sees the numbers of all: if only the one with corrupt rows raised, the others would wait.
            of_processes = trainer.accelerator.gather(torch.stack(own)[None])
            self.unread = _Unread(state.global_step + 1, HostCopy(of_processes), list(micro_batches))
            micro_batches.clear()
            grad_norms.clear()
            if is_on_host(of_processes):
                self.settle()

        def settle(self) -> None:
            """Read what is not read yet, and end the training where it is at fault."""
            if self.unread is None:
                return
            step, of_processes, self.unread = self.unread, self.unread.numbers.tolist(), None
            if stop is not None:
                stop.is_agreed = stop.is_agreed or any(row[3] for row in of_processes)
            # The loss of a process without rows is 0, and its gradient norm that of the others.
            ranks = [rank for rank, row in enumerate(of_processes) if row[2]]  # none: weights of 0 left them all out
            losses, norms = [of_processes[rank][0] for rank in ranks], [of_processes[rank][1] for rank in ranks]
            fault = fault_of_step(losses, norms, rule.zero_is_fault)
            if fault is None:
                return
            at_fault = [rank for rank, loss in zip(ranks, losses, strict=True) if is_corrupt(loss, rule.zero_is_fault)]
            whose = f"Of rank {', '.join(map(str, at_fault))}. " if 0 < len(at_fault) < len(of_processes) else ""
            rows = gather_object(rows_where(step, lambda loss: is_corrupt(loss, rule.zero_is_fault)))
            rows = rows or gather_object(rows_where(step, lambda loss: True))
            raise (ValueError if fault == _ZERO else Diverged)(
                f"{fault} at step {step.number:,}; the checkpoints before it are kept. {_listed(rows)}. {whose}"
                + _advice(fault)
            )

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            is_last = state.global_step >= state.max_steps
            if control.should_log or control.should_save or control.should_training_stop or is_last:
                self.settle()
            if control.should_save and not all_finite(trainer.model, trainer.accelerator):
                raise Diverged(
                    f"weights hold NaN or infinity after step {state.global_step:,}, though loss and gradient were "
                    "finite: no checkpoint of them was written, those before it are kept. Lower learning_rate"
                )

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if not rule.must_not_grow or not logs or "loss" not in logs:
                return
            self.means.add(state.global_step, logs["loss"])
            means = self.means.early_and_late()
            if means is not None and has_diverged(*means):
                raise Diverged(
                    f"the training diverges: at step {state.global_step:,} the mean loss of the last {WINDOW} steps is "
                    f"{means[1]:.4g}, that of the first {WINDOW} after warm-up was {means[0]:.4g}, and more than "
                    f"{GROWTH:g} times as much ends a training; the checkpoints before it are kept. Lower "
                    "learning_rate or lengthen the warm-up"
                )

    made = Guard()
    trainer.settle_guard = made.settle
    return made


def _listed(rows: Sequence[str]) -> str:
    shown = list(dict.fromkeys(rows))
    more = f", and {len(shown) - _SHOWN_ROWS:,} more" if len(shown) > _SHOWN_ROWS else ""
    return "Its rows: " + ", ".join(shown[:_SHOWN_ROWS]) + more


def _advice(fault: str) -> str:
    if "exactly 0" in fault:
        return (
            "Nothing was trained in this step: look whether these rows have tokens to train on; where they do, the "
            "model gives the same answer to everything, and learning_rate was too high"
        )
    return "Look at these rows; where there is nothing wrong with them, lower learning_rate or set precision to float32"
