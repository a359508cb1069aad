"""Progress of a stage as log lines for people."""

from __future__ import annotations

import logging
import time

from smoltulu.artifacts import readable

_SHOWN_EVERY_SECONDS = 3.0


class Progress:
    """Progress lines at most every few seconds: step N of M, metrics, time left."""

    def __init__(self, node: str, log: logging.Logger | logging.LoggerAdapter) -> None:
        self.node, self.log = node, log
        self.first: tuple[int, float] | None = None
        self.last_shown = -float("inf")
        self.last_step = -1

    def __call__(self, step: int, num_steps: int, **metrics: float) -> None:
        now = time.monotonic()
        if self.first is None or step < self.first[0]:
            self.first = (step, now)
        is_new_end = step == num_steps and step != self.last_step
        self.last_step = step
        if now - self.last_shown < _SHOWN_EVERY_SECONDS and not is_new_end:
            return
        self.last_shown = now
        parts = [f"step {step:,} of {num_steps:,}"]
        parts += [f"{name.replace('_', ' ')} {readable.number(value)}" for name, value in metrics.items()]
        done = step - self.first[0]
        if done > 0 and step < num_steps:
            parts.append(f"{readable.duration((now - self.first[1]) / done * (num_steps - step))} left")
        self.log.info("%s: %s", self.node, " · ".join(parts))
