"""The ranks of a stage: started, watched, and ended together.

Processes of their own, or forks of a warm one (tasks/engine/warm.py), which begin with everything imported. torchrun
starts such processes too. It is not used: it takes a stop for a failure, waits equally long for both, and knows neither
a rank that hangs nor whose trace is the cause of the others'.

    one fails          the others are asked to end, and killed after `_GRACE_S`
    one is stopped     (SIGTERM) they agree on a step among themselves, and get `_LAST_STEP_S` for it
    one hangs          all are killed, once another has waited for it for `compute.rank_timeout_minutes` in which it did
                       no step
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from smoltulu.tasks.engine import pulse
from smoltulu.tasks.engine.ends import End, hanging, main_thread, write_end
from smoltulu.tasks.process import PARENT_VARIABLE, die_with_parent
from smoltulu.tasks.stage import STOPPED

#: What tells a rank which one it is, as torchrun does.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                  "TORCHELASTIC_USE_AGENT_STORE")  # fmt: skip
#: Seconds that ranks have to end after one failed; those that hang are killed then. tasks/trainer/checkpoint.py waits
#: less for the parts of a checkpoint that may still become whole.
_GRACE_S = 40.0
#: Seconds for the last step and its checkpoint where one rank was asked to stop.
_LAST_STEP_S = 900.0
#: Seconds between the first rank that is known to wait for long and the decision whose fault it is.
_SETTLE_S = 3.0
_POLL_S = 0.05


def spawn_ranks(num_ranks: int, command: list[str], work: Path) -> int:
    """Run `command` once a rank. Returns the status of the stage, once all have ended.

    work  folder where ranks leave signs of life, and why they failed; one that failed without a word is named there
    """
    listener = _listener()
    ranks = {}
    for rank in range(num_ranks):
        environment = os.environ | _environment(rank, num_ranks, listener) | {PARENT_VARIABLE: str(os.getpid())}
        ranks[os.posix_spawn(command[0], command, environment)] = rank
    return _supervise(ranks, work, listener)


def fork_ranks(num_ranks: int, work: Path | None = None) -> int | None:
    """None in each rank, whose environment says which one it is. Here, once all have ended, the status of the stage.

    There must be one thread, and no CUDA. `work`: as in `spawn_ranks`; None: nobody asks.
    """
    import torch

    listener = _listener()
    launcher, ranks = os.getpid(), {}
    for rank in range(num_ranks):
        if (pid := os.fork()) == 0:
            die_with_parent(launcher)
            os.environ |= _environment(rank, num_ranks, listener)
            listener.close()
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
            return None
        ranks[pid] = rank
    return _supervise(ranks, work, listener)


def _listener() -> socket.socket:
    """Where the ranks find each other: a port that is taken from now on, so no other process can."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, nobody learns how a rank ended
    return socket.create_server(("127.0.0.1", 0), backlog=1024)


def _environment(rank: int, num_ranks: int, listener: socket.socket) -> dict[str, str]:
    host, port = listener.getsockname()
    values = (rank, rank, 0, num_ranks, num_ranks, host, port, True)
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return {name: str(value) for name, value in zip(RANK_VARIABLES, values, strict=True)} | threads


@dataclass
class _Watch:
    """What is known of the ranks. `running`: pid -> rank."""

    running: dict[int, int]
    work: Path | None
    is_asked: bool = False
    status: int = 0
    kill_at: float = math.inf
    suspected_at: float = math.inf

    def reap(self) -> None:
        """Take the ranks that have ended; the first that did not end well decides for all."""
        while self.running:
            pid, ended = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(ended)
            if (rank := self.running.pop(pid, None)) is None or code == 0:
                continue
            is_stop = self.is_asked or code in (STOPPED, -signal.SIGTERM)
            if not self.status:
                self.status = STOPPED if is_stop else code if code > 0 else 1
                self.kill_at = time.monotonic() + (_LAST_STEP_S if is_stop else _GRACE_S)
                if not is_stop:
                    reason = f"ended with status {code}" if code > 0 else f"was killed by signal {-code}"
                    hint = " (often: out of memory)" if code == -signal.SIGKILL else ""
                    # NCCL's watchdog ends the process of a rank that waited too long for another.
                    gave_up = code == -signal.SIGABRT
                    self._tell(End(rank, time.monotonic(), f"{reason}{hint}", is_of_peers=gave_up))
                    if gave_up:
                        self._tell_overdue()
                if code != STOPPED:  # the others of that one are about to end by themselves, with a checkpoint
                    _send(self.running, signal.SIGTERM)

    def _tell_overdue(self) -> None:
        """Of the ranks that are left, those that went on for too long."""
        now = time.monotonic()
        if self.work is None:
            return
        for rank in self.running.values():
            beat = pulse.last_beat(self.work, rank)
            if beat.due < now:
                text = f"went no further than step {max(beat.step, 0):,}, and another rank gave up waiting"
                self._tell(End(rank, now, text, main_thread(pulse.stack_of(self.work, rank))))

    def _tell(self, end: End) -> None:
        if self.work is not None:
            with contextlib.suppress(OSError):  # the disk may be what failed
                write_end(self.work, end)

    def look(self) -> None:
        """End all where one keeps others waiting for too long. One that is left alone keeps nobody waiting."""
        now = time.monotonic()
        if self.work is None or len(self.running) < 2 or self.status:
            return
        stopped = {rank for pid, rank in self.running.items() if _is_stopped(pid)}
        # What a rank that is stopped said before is not where it is.
        stacks = {rank: "" if rank in stopped else pulse.stack_of(self.work, rank) for rank in self.running.values()}
        beats = {rank: pulse.last_beat(self.work, rank) for rank in stacks}
        steps = {rank: beat.step for rank, beat in beats.items()}
        found = hanging(steps, stacks, [rank for rank, beat in beats.items() if beat.due < now])
        if not found:
            self.suspected_at = math.inf
        elif self.suspected_at == math.inf:
            self.suspected_at = now  # the others say where they are at about the same time
        elif now - self.suspected_at > _SETTLE_S:
            for rank in found:
                step = f"after step {steps[rank]:,}" if steps[rank] >= 0 else "before its first step"
                text = f"hangs {step}: others wait for it, and none went on for compute.rank_timeout_minutes"
                text += "; its process is stopped (SIGSTOP)" if rank in stopped else ""
                self._tell(End(rank, now, text, main_thread(stacks[rank])))
            self.status = 1
            _send(self.running, signal.SIGKILL)


def _supervise(ranks: dict[int, int], work: Path | None, listener: socket.socket) -> int:
    """Wait for all ranks (pid -> rank). Returns the status of the stage; they end with this process."""
    watch = _Watch(dict(ranks), work)

    def ask(number: int, frame: object) -> None:
        watch.is_asked = True
        _send(watch.running, signal.SIGTERM)

    signal.signal(signal.SIGTERM, ask)
    # After the ranks have begun: it is imported beside them, and its threads must not be forked.
    from torch.distributed import TCPStore

    port = listener.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    look_at = 0.0
    while watch.running:
        watch.reap()
        now = time.monotonic()
        if now > watch.kill_at:
            _send(watch.running, signal.SIGKILL)
        if now > look_at:
            watch.look()
            look_at = now + 1
        time.sleep(_POLL_S)
    del store
    return watch.status


def _send(pids: Iterable[int], number: int) -> None:
    for pid in list(pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False
