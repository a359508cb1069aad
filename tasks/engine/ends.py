"""How the ranks of a stage ended, and which of them is the cause: when one fails, the others fail of it.

Each rank leaves a word of its own failure in the stage's `work`; of one that was killed, hangs or is stopped the
process that started the ranks does (tasks/engine/ranks.py). Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from smoltulu.artifacts.files import write_atomically

_FILE = "end-{}.json"
#: How faulthandler begins each time.
_SAID = "Timeout ("
#: What backends say to a rank whose peer is gone, or that has waited too long for one.
_LOST_PEER_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError", "DistQueueEmptyError")
_LOST_PEER_TEXTS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "wait timeout",
    "third_party/gloo",
    "NCCL communicator was aborted",
    "remote process exited",
)


@dataclass(frozen=True)
class End:
    """How a rank failed.

    at           monotonic seconds, the same clock in every process of the machine
    message      what it failed of
    trace        where, if known
    is_of_peers  it failed because another rank was gone, as far as its error says
    """

    rank: int
    at: float
    message: str
    trace: str = ""
    is_of_peers: bool = False


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another rank is gone, or does not come."""
    if any(kind.__name__ in _LOST_PEER_TYPES for kind in type(error).__mro__):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(text in str(error) for text in _LOST_PEER_TEXTS)


def cause_of(ends: Sequence[End]) -> End | None:
    """The end that the others came of: the first one that no lost peer explains, else the first."""
    return min(ends, key=lambda end: (end.is_of_peers, end.at), default=None)


def write_end(work: Path, end: End) -> None:
    """Leave a rank's word, unless it left one itself."""
    file = work / _FILE.format(end.rank)
    if not file.exists():
        write_atomically(file, json.dumps(asdict(end)))


def read_ends(work: Path) -> list[End]:
    """The words that ranks left, but for those that cannot be read: a full disk may have cut them."""
    ends = []
    for file in work.glob(_FILE.format("*")):
        try:
            ends.append(End(**json.loads(file.read_text())))
        except (OSError, ValueError, TypeError):
            continue
    return ends


def forget_ends(work: Path) -> None:
    for file in work.glob(_FILE.format("*")):
        file.unlink()


# ------------------------------------------------------------------------------------------------------ one that hangs


def main_thread(stack: str) -> str:
    """The calls of the main thread, the most recent first: of all threads faulthandler writes it last."""
    lines = stack.rpartition("(most recent call first):")[2].splitlines()
    return "\n".join(line for line in lines if line.strip().startswith("File "))


def is_waiting(stack: str) -> bool:
    """Whether the main thread of a rank waits for other ranks.

    It does in a call of torch.distributed, in the backward pass, where DDP and FSDP exchange gradients, and where it
    waits for a GPU that does either.
    """
    first = next(iter(main_thread(stack).splitlines()), "")
    places = ("/torch/distributed/", "/torch/cuda/streams.py")
    return any(place in first for place in places) or ("/torch/autograd/" in first and "_engine_run_backward" in first)


def waits_long(stacks: str) -> bool:
    """Whether a rank waited both of the last times that it said where it is."""
    last = stacks.split(_SAID)[1:][-2:]
    return len(last) == 2 and all(map(is_waiting, last))


def hanging(steps: Mapping[int, int], stacks: Mapping[int, str], overdue: Collection[int]) -> list[int]:
    """The ranks that keep others waiting, if any waits long.

    steps    that each has done
    stacks   where each was, so far
    overdue  those that have done no step for too long. Another one may be waited for, as long as it goes on: ranks that
             share out work and meet at its end

    Of those overdue the ones behind, and of these those that do not wait themselves, or cannot say where they are.
    Where all wait: those behind.
    """
    late = sorted(set(overdue) & steps.keys())
    if not late or not any(map(waits_long, stacks.values())):
        return []
    behind = [rank for rank in late if steps[rank] == min(steps[one] for one in late)]
    for several in (behind, late):
        if busy := [rank for rank in several if not is_waiting(stacks.get(rank, ""))]:
            return busy
    return behind if len(late) == len(steps) else []
