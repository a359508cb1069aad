"""Stages on Dask workers: a stage goes to a worker that has the GPUs for it, by what the workers say they have.

A worker says so where it is started: `dask worker tcp://SCHEDULER:8786 --nthreads 1 --resources GPU=8`. Dask counts
these GPUs itself (https://distributed.dask.org/en/stable/resources.html).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

RESOURCE = "GPU"


def runner_client() -> Any | None:
    """The Dask client of the flow that runs here; None where its tasks run in threads."""
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    runner = None if context is None else context.task_runner
    return getattr(runner, "client", None) if type(runner).__name__ == "DaskTaskRunner" else None


def offered(client: Any) -> list[float]:
    """GPUs that each worker says it has; none where it says nothing of them."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return [float(worker["resources"][RESOURCE]) for worker in workers if RESOURCE in worker.get("resources", {})]


def check_devices(on_workers: Sequence[float], needed: dict[str, int]) -> str | None:
    """ValueError where no worker has the GPUs that a node needs: Dask would wait for one for ever, without a word.

    needed: node -> GPUs. Returns a sentence where no worker says what it has, so that any may run anything.
    """
    name, most = max(needed.items(), key=lambda one: one[1], default=("", 0))
    if not most:
        return None
    if not on_workers:
        return (
            f"no Dask worker says that it has GPUs, so that {name} may run on any of them; start those that have with "
            f"`dask worker ... --resources {RESOURCE}=N`"
        )
    if most > max(on_workers):
        raise ValueError(
            f"{name} needs {most} GPUs of one machine, and Dask workers have at most {max(on_workers):g}; start one "
            f"with `dask worker ... --resources {RESOURCE}={most}`, or lower compute.num_processes"
        )
    return None


@contextmanager
def asking_for(num_devices: int, on_workers: Sequence[float]) -> Iterator[None]:
    """What is submitted within runs on a worker with so many free GPUs, where workers say what they have."""
    if not num_devices or not on_workers:
        yield
        return
    import dask

    with dask.annotate(resources={RESOURCE: num_devices}):
        yield
