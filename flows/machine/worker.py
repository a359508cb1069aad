"""Prefect's worker, which waits for a server that is gone: `python -m smoltulu.flows.machine.worker worker start ...`.

Prefect's own ends itself after two to three minutes without a server (prefect/workers/base.py, `backoff=4`), and a
training ends with its worker. A server that dies in the night must not cost the night.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any

from prefect.cli import app
from prefect.workers import base

Service = Callable[..., Coroutine[Any, Any, None]]


def patient(service: Service) -> Service:
    """Prefect's loop around a service, begun again whenever it gives up."""

    @functools.wraps(service)
    async def loop(*arguments: Any, **options: Any) -> None:
        while True:
            try:
                return await service(*arguments, **options)
            except RuntimeError as error:
                if "error threshold" not in str(error):
                    raise
                print("the server does not answer; its trainings go on, `smoltulu up` starts a new one", flush=True)

    return loop


if __name__ == "__main__":
    base.critical_service_loop = patient(base.critical_service_loop)
    app()
