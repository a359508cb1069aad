"""Learning-rate schedules as pure functions of the step and of the tokens trained on; formulas in docs/schedules.md.

A step is an optimizer step, counted from 0: step s is the update that s updates came before. Warm-up of W steps is
(s + 1) / W, so that no step has a learning rate of 0 and step W - 1 has the full one; transformers' s / W wastes the
first step. All other phases are as in transformers, where it has them: a decay over D steps has the factor
f((s - start) / D), so f(1), `min_lr_ratio`, would come in the step after the last.
"""

from __future__ import annotations

import math
from itertools import pairwise

from smoltulu.schemas.schedules import (
    Budgets,
    ConstantSchedule,
    CosineSchedule,
    CyclicCosineSchedule,
    Decay,
    FinalDecay,
    LinearSchedule,
    PowerSchedule,
    ScheduleSettings,
    WSDSchedule,
    WSDSSchedule,
)


def learning_rate_factor(settings: ScheduleSettings, step: int, num_steps: int, tokens: int = 0) -> float:
    """Learning rate of optimizer step `step` over `learning_rate`; above 0 in warm-up, never above 1.

    num_steps  optimizer steps of the whole training; from there on the schedule stays at its end
    tokens     trained on before this step, as the trainer counts them; only the power schedule looks at them

    Raises ValueError where the schedule does not fit into `num_steps` (warm-up or decay too long, other budgets).
    """
    assert step >= 0 and tokens >= 0, (step, tokens)
    settings.check(num_steps)
    warmup = settings.num_warmup_steps(num_steps)
    rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
    match settings:
        case ConstantSchedule():
            return rising
        case LinearSchedule():
            return rising * linear(_progress(step, warmup, num_steps), settings.min_lr_ratio)
        case CosineSchedule():
            return rising * cosine(_progress(step, warmup, num_steps), settings.min_lr_ratio)
        case CyclicCosineSchedule():
            start, end = _cycle(settings.budgets, step)
            # Half a cosine from the end of the warm-up, in the first cycle, or from the budget before.
            return rising * cosine(_progress(step, start or warmup, end), settings.min_lr_ratio)
        case WSDSchedule():
            return rising * decay(settings, step, num_steps - settings.num_decay_steps(num_steps), num_steps)
        case WSDSSchedule():
            _, end = _cycle(settings.budgets, step)
            length = settings.decay_lengths()[settings.budgets.index(end)]
            return rising * decay(settings, step, end - length, end)
        case PowerSchedule():
            falling = decay(settings, step, num_steps - settings.num_decay_steps(num_steps), num_steps)
            return rising * power(settings.initial_tokens + tokens, settings.anchor_tokens, settings.exponent) * falling


def extension_step(settings: ScheduleSettings, num_steps: int) -> int | None:
    """Optimizer steps after which a checkpoint serves a training with a larger budget, the most there are.

    The last step before the decay, or the last of all where the schedule goes on from there; None where a larger
    budget changes the past (linear, cosine).
    """
    if isinstance(settings, FinalDecay):
        return num_steps - settings.num_decay_steps(num_steps) or None
    return num_steps if isinstance(settings, (Budgets, ConstantSchedule)) else None


def same_past(
    old: ScheduleSettings, old_num_steps: int, new: ScheduleSettings, new_num_steps: int, num_shared: int
) -> bool:
    """Whether two schedules have bit-equal factors in the first `num_shared` steps, whatever the tokens.

    Power schedules are compared with their like only: of one curve in tokens, the rest of the factor is compared.
    """
    if isinstance(old, PowerSchedule) or isinstance(new, PowerSchedule):
        if not (isinstance(old, PowerSchedule) and isinstance(new, PowerSchedule)):
            return False
        curves = [(power_.anchor_tokens, power_.exponent, power_.initial_tokens) for power_ in (old, new)]
        if curves[0] != curves[1]:
            return False
        # With no tokens at all the power law is 1.
        old, new = (power_.model_copy(update={"initial_tokens": 0}) for power_ in (old, new))
    return all(
        learning_rate_factor(old, step, old_num_steps) == learning_rate_factor(new, step, new_num_steps)
        for step in range(num_shared)
    )


def decay(settings: Decay, step: int, start: int, end: int) -> float:
    """Factor of a decay over the steps from `start` to `end`: 1 before it, its last value after it."""
    progress = _progress(step, start, end)
    floor = settings.min_lr_ratio
    match settings.decay_shape:
        case "linear":
            return linear(progress, floor)
        case "cosine":
            return cosine(progress, floor)
        case "1-sqrt":
            return floor + (1 - floor) * (1 - math.sqrt(progress))
        case "inverse":
            return 1 / (progress / floor + 1 - progress)
        case "half-life":
            assert settings.half_life_steps is not None
            return max(floor, 0.5 ** (progress * (end - start) / settings.half_life_steps))
        case "exponential":
            return floor + (1 - floor) * ((math.exp(1 - progress) - 1) / (math.e - 1))


def linear(progress: float, floor: float) -> float:
    """From 1 at progress 0 to `floor` at 1."""
    return floor + (1 - floor) * (1 - progress)


def cosine(progress: float, floor: float) -> float:
    """Half a cosine from 1 at progress 0 to `floor` at 1."""
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def power(tokens: int, anchor_tokens: int, exponent: float) -> float:
    """(tokens / anchor_tokens) ** exponent, at most 1: 1 up to the anchor, from there down."""
    return (max(tokens, anchor_tokens) / anchor_tokens) ** exponent


def _progress(step: int, start: int, end: int) -> float:
    """Share of the way from `start` to `end`, between 0 and 1."""
    if step >= end:
        return 1.0
    return max(0, step - start) / (end - start) if end > start else 0.0


def _cycle(budgets: tuple[int, ...], step: int) -> tuple[int, int]:
    """First step and end of the cycle that `step` is in; of the last one for what lies behind it."""
    for start, end in pairwise((0, *budgets)):
        if step < end:
            return start, end
    return (0, *budgets)[-2:]  # type: ignore[return-value]
