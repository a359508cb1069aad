"""Seconds of a stage from the rates of a machine. Pure."""

from __future__ import annotations

from smoltulu.schemas.machine import MachineRates
from smoltulu.schemas.rlvr import RLVRSettings


def train_seconds(flops: float, rates: MachineRates, num_processes: int) -> float | None:
    """Of a training, whose FLOPs are counted as those of the rate were; None where that was not measured.

    Communication between devices is not in it: nothing measures that yet.
    """
    return None if rates.train is None else flops / (rates.train.flops_per_second * num_processes)


def decode_seconds(num_tokens: float, num_rows: float, num_parameters: int, rates: MachineRates) -> float | None:
    """Of writing `num_tokens` one after the other for each of `num_rows` rows on one device.

    A step reads the weights once for all rows, so that it takes as long for few rows as for those that were measured;
    with more of them it is the arithmetic that counts, 2 FLOPs a parameter and row.
    """
    if rates.decode is None or num_rows <= 0:
        return None
    step = rates.decode.seconds_per_parameter * num_parameters
    if num_rows > rates.decode.num_rows:
        if rates.train is None:
            return None
        step = max(step, 2.0 * num_parameters * num_rows / rates.train.flops_per_second)
    return num_tokens * step


def rollout_seconds(
    settings: RLVRSettings, num_steps: int, num_parameters: int, rates: MachineRates, num_processes: int
) -> float | None:
    """Of writing all rollouts of an RLVR training, as if every batch had one completion as long as allowed.

    Every process writes its part of a batch at once, and a batch ends with its longest completion.
    """
    num_batches = -(-num_steps // settings.num_steps_per_rollout)
    num_rows = settings.num_rollouts / num_processes
    seconds = decode_seconds(settings.max_completion_length, num_rows, num_parameters, rates)
    return None if seconds is None else seconds * num_batches
