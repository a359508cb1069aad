"""Prefect's worker, which waits for a server that is gone: `python -m smoltulu.flows.machine.worker worker start ...`.

Prefect's own ends itself after two to three minutes without a server (prefect/workers/base.py, `backoff=4`), and a
training ends with its worker. A server that dies in the night must not cost the night.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from prefect.cli import app
from prefect.workers import base

from smoltulu.flows.machine.machine import MARK

Service = Callable[..., Coroutine[Any, Any, None]]


def patient(service: Service) -> Service:
    """Prefect's loop around a service, begun again whenever it gives up, until the folder of its `up` is gone."""

    @functools.wraps(service)
    async def loop(*arguments: Any, **options: Any) -> None:
        while True:
            try:
                return await service(*arguments, **options, printer=_print_last_line)
            except RuntimeError as error:
                if "error threshold" not in str(error) or not Path(os.environ.get(MARK, "/")).is_dir():
                    raise
                print("the server does not answer; its trainings go on, `smoltulu up` starts a new one", flush=True)

    return loop


def _print_last_line(*said: object) -> None:
    """Of a traceback the error: Prefect prints each of the last ten, for as long as the server is gone."""
    text = " ".join(map(str, said)).strip()
    if text:
        print(text.splitlines()[-1], flush=True)


def main() -> None:
    base.critical_service_loop = patient(base.critical_service_loop)
    app()


if __name__ == "__main__":
    main()
