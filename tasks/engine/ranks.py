"""The ranks of a warm stage: forks of its process (tasks/engine/warm.py), which begins with everything imported.

What torchrun does for stages of `launcher: process`, without a second start of Python for each rank.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from typing import Any

from smoltulu.tasks.process import die_with_parent
from smoltulu.tasks.stage import STOPPED

#: Bytes of a port in the pipe.
_DIGITS = 5
#: Seconds that ranks have to end after one failed; those that hang are killed then. torchrun has the same.
_GRACE_S = 30


def fork_ranks(num_ranks: int) -> int | None:
    """None in each rank, whose environment says which one it is. Here, once all have ended, the status of the stage.

    A rank that fails ends the others, which would wait for it for ever. All end with this process, and are asked to
    when it is. There must be one thread, and no CUDA.
    """
    reading, writing = os.pipe()
    launcher, ranks = os.getpid(), {}
    for rank in range(num_ranks):
        if (pid := os.fork()) == 0:
            die_with_parent(launcher)
            os.close(writing)
            _become_rank(rank, num_ranks, os.read(reading, _DIGITS).decode())
            os.close(reading)
            return None
        ranks[pid] = rank
    os.close(reading)
    asked = []

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        _send(ranks, number)

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGALRM, lambda number, frame: _send(ranks, signal.SIGKILL))

    from torch.distributed import TCPStore

    # Where the ranks find each other: here, as its port is then known to be free. Its threads begin after the forks.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(writing, f"{store.port:0{_DIGITS}}".encode() * num_ranks)
    os.close(writing)
    status = 0
    while ranks:
        pid, ended = os.waitpid(-1, 0)
        code = os.waitstatus_to_exitcode(ended)
        rank_of = ranks.pop(pid, None)
        if rank_of is None or code == 0:
            continue
        if code < 0 and not asked and not status:
            print(f"rank {rank_of} was killed by signal {-code}", flush=True)
        _send(ranks, signal.SIGTERM)
        if not status and not asked:
            signal.alarm(_GRACE_S)
        status = status or (STOPPED if asked else code if code > 0 else 1)
    signal.alarm(0)
    return status


def _send(pids: Iterable[int], number: int) -> None:
    for pid in list(pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _become_rank(rank: int, num_ranks: int, port: str) -> None:
    """As torchrun sets it."""
    import torch

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(int(port)),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
