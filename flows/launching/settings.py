"""What `smoltulu launch` is told about a cluster, and what is refused before a job is rendered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from smoltulu.artifacts import readable
from smoltulu.flows.launching.jobs import ClusterJob
from smoltulu.schemas.common import StrictModel

Engine = Literal["slurm", "kubernetes"]
#: Exit status of a job that was asked to end and can go on from its checkpoint: 128 + SIGTERM.
STOPPED = 143
#: Seconds of the grace that are left for the rest of a job's end: files are synced, the run is recorded.
LAST_SECONDS = 15


class LaunchSettings(StrictModel):
    """Of both kinds of cluster unless it says which.

    hours            most hours of a job, after which the cluster ends it; None: no limit is asked for
    grace_seconds    that a stage has to write its checkpoint, before the cluster kills it
    devices_per_node GPUs of a machine; None: not known
    options          Slurm: options of sbatch besides, --constraint=h100
    image, claim     Kubernetes: container image; volume claim that the jobs share, mounted at `mount`
    """

    hours: float | None = Field(None, gt=0, le=24 * 365)
    grace_seconds: int = Field(300, ge=LAST_SECONDS + 5, le=6 * 3600)
    cpus_per_device: int = Field(8, ge=1, le=1024)
    devices_per_node: int | None = Field(None, ge=1)
    partition: str | None = None
    account: str | None = None
    options: tuple[str, ...] = ()
    image: str | None = None
    claim: str | None = None
    mount: str = "/smoltulu"


def check_engine(settings: LaunchSettings, engine: Engine) -> None:
    """ValueError where something is given that the other kind of cluster takes."""
    slurm = {"--partition": settings.partition, "--account": settings.account, "--option": settings.options}
    others = {"--image": settings.image, "--claim": settings.claim} if engine == "slurm" else slurm
    if ignored := [name for name, value in others.items() if value]:
        other = "Kubernetes" if engine == "slurm" else "Slurm"
        raise ValueError(f"{', '.join(ignored)}: of {other}, and jobs are printed for {engine}; leave it out")


def check_jobs(jobs: list[ClusterJob], settings: LaunchSettings) -> None:
    """ValueError where a job wants more GPUs than a machine has: a stage runs on one machine."""
    most = settings.devices_per_node
    for job in jobs:
        if most is not None and job.num_devices > most:
            raise ValueError(
                f"{job.name} runs on {job.num_devices} GPUs (compute.num_processes) and a machine has {most} "
                f"(--devices-per-node); a stage runs on one machine: set compute.num_processes to at most {most}, or "
                f"compute.stages.{job.name.replace('-', '_')}.num_processes for this one"
            )


def check_time(settings: LaunchSettings, intervals: Mapping[str, tuple[float | None, int]]) -> list[str]:
    """ValueError where a job would be ended before a checkpoint is due. Returns what could not be told, as sentences.

    intervals: training -> (seconds between two checkpoints by the forecast, or None; compute.save_steps)
    """
    if settings.hours is None:
        return []
    limit = settings.hours * 3600 - settings.grace_seconds
    if limit <= 0:
        raise ValueError(
            f"--hours {settings.hours:g} is {readable.duration(settings.hours * 3600)}, of which --grace-seconds "
            f"{settings.grace_seconds} are kept for the last checkpoint; give more hours, or a shorter grace"
        )
    unknown = []
    for name, (seconds, save_steps) in intervals.items():
        if seconds is None:
            unknown.append(name)
        elif seconds > limit:
            hours = math.ceil((seconds + settings.grace_seconds) / 360) / 10
            fitting = max(int(save_steps * limit / seconds), 1)
            raise ValueError(
                f"--hours {settings.hours:g} is shorter than the time between two checkpoints of {name}, "
                f"{readable.duration(seconds)} by the forecast (compute.save_steps {save_steps}), so that a job that "
                f"is killed would never get on; give at least {hours:g} hours, or set compute.save_steps to at most "
                f"{fitting}"
            )
    if not unknown:
        return []
    return [
        f"whether --hours {settings.hours:g} is longer than the time between two checkpoints is not known for "
        f"{', '.join(unknown)}: nothing like it was run here; `smoltulu doctor --gpu` on the machine measures rates "
        "for a forecast"
    ]
