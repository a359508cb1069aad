"""Names a rank that is slower than the others: a hot card, a core that others use, a disk that is far away.

Every rank waits for the slowest in every step, so the time of a step tells nothing. What a rank does before it meets
the others does: fetching batches and the forward passes. (Under FSDP these meet in every layer; then only the batches
tell.) The sums are compared when metrics are logged.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.trainer.waits import of_all_ranks

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

logger = logging.getLogger("smoltulu")
#: So many times as long as the others' median: batches of other lengths differ by less over the steps between two logs.
FACTOR = 1.5
#: Less of a difference, in seconds a step, is not worth a word.
MIN_SECONDS = 0.02
#: Logs in a row.
NUM_LOGS = 2


def slow_ranks(seconds: Sequence[float]) -> list[int]:
    """The ranks that take far longer than the others. `seconds`: own time a step, of each rank."""
    slow = []
    for rank, own in enumerate(seconds):
        others = statistics.median([*seconds[:rank], *seconds[rank + 1 :]])
        if own > FACTOR * others and own - others > MIN_SECONDS:
            slow.append(rank)
    return slow


class _OwnTime:
    """Seconds that this rank worked alone since the last log. Of a GPU by its events, which are read at the log."""

    def __init__(self, is_cuda: bool) -> None:
        self.seconds, self.is_cuda = 0.0, is_cuda
        self.events: list[tuple[Any, Any]] = []

    def of_host(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - began

    def of_device(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.is_cuda:
            return self.of_host(function, *args, **kwargs)
        import torch

        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        try:
            return function(*args, **kwargs)
        finally:
            ended.record()
            self.events.append((began, ended))

    def take(self) -> float:
        for began, ended in self.events:
            ended.synchronize()
            self.seconds += began.elapsed_time(ended) / 1000
        taken, self.seconds, self.events = self.seconds, 0.0, []
        return taken


def name_stragglers(trainer: Trainer) -> TrainerCallback | None:
    """The callback that warns of a slow rank, once each; None where there is but one rank."""
    if trainer.accelerator.num_processes == 1:
        return None
    from transformers import TrainerCallback

    own = _OwnTime(trainer.args.device.type == "cuda")
    samples_of_trainer = trainer.get_batch_samples

    def get_batch_samples(epoch_iterator: Iterator[Any], *args: Any) -> Any:
        def timed() -> Iterator[Any]:
            end = object()
            while (batch := own.of_host(next, epoch_iterator, end)) is not end:
                yield batch

        return samples_of_trainer(timed(), *args)

    def timed_method(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: own.of_device(method, *args, **kwargs)

    trainer.get_batch_samples = get_batch_samples
    for name in getattr(trainer, "meets_no_other_rank", ("compute_loss",)):
        setattr(trainer, name, timed_method(getattr(trainer, name)))

    class Stragglers(TrainerCallback):
        def __init__(self) -> None:
            self.num_slow: dict[int, int] = {}
            self.logged_at = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.logged_at = state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if not logs or "loss" not in logs or state.global_step <= self.logged_at:
                return
            num_steps, self.logged_at = state.global_step - self.logged_at, state.global_step
            seconds = [one / num_steps for (one,) in of_all_ranks(trainer, [own.take()])]
            slow = slow_ranks(seconds)
            for rank in slow:
                self.num_slow[rank] = self.num_slow.get(rank, 0) + 1
                if self.num_slow[rank] == NUM_LOGS and state.is_world_process_zero:
                    others = statistics.median([*seconds[:rank], *seconds[rank + 1 :]])
                    logger.warning(
                        "rank %d is slow at step %s: %.3g s a step for its batches and forward passes, the others %.3g "
                        "s, and all wait for it; look at its device, its disk, and what else runs there",
                        rank, f"{state.global_step:,}", seconds[rank], others,
                    )  # fmt: skip
            for rank in self.num_slow.keys() - set(slow):
                if self.num_slow[rank] < NUM_LOGS:  # not named yet
                    self.num_slow[rank] = 0

    return Stragglers()
