"""The end of a training that is asked to stop (SIGTERM): a checkpoint at the next step that allows one, then the end.

Of several ranks the signal may reach one, or all at different steps, and a rank that stopped alone would leave the
others waiting. So each says in every optimizer step whether it was asked, with what it tells the guards anyway
(tasks/trainer/guards.py). All read the same numbers at the same step, and stop together.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import Trainer, TrainerCallback


@dataclass(frozen=True)
class Deaf:
    """Called in a process that makes batches: it ends with its training, not with a signal to all processes of a job.

    torch would have it end at once, and the training fail of it before it could write a checkpoint.
    """

    then: Callable[[int], None] | None

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker)


class StopWhenAsked(TrainerCallback):
    """`cycle`: optimizer steps between two points at which a checkpoint is enough to resume from."""

    def __init__(self, trainer: Trainer, cycle: int) -> None:
        self.asked, self.cycle = threading.Event(), cycle
        #: Set by the guard: whether any rank was asked, as all ranks know it.
        self.is_agreed = False
        self._is_alone = trainer.accelerator.num_processes == 1
        self._before: Any = None
        trainer.stop_when_asked = self
        loader_of_trainer = trainer.get_train_dataloader

        def get_train_dataloader() -> Any:
            loader = loader_of_trainer()
            made = getattr(loader, "base_dataloader", loader)
            made.worker_init_fn = Deaf(made.worker_init_fn)
            return loader

        trainer.get_train_dataloader = get_train_dataloader
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, lambda *_: self.asked.set())

    def end(self) -> None:
        """The training is over: the signal ends the process again."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_asked = self.asked.is_set() if self._is_alone else self.is_agreed
        if is_asked and state.global_step % self.cycle == 0 and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
