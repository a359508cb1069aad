"""Cores and memory that this process may use: what its machine has, and what its control groups leave of it.

A container, a pod and a job of Slurm are control groups. Where a limit of memory is passed, the kernel kills.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

#: Where NVIDIA's driver lists its cards; there without torch, and without a right to use them.
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
_GROUPS, _OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
#: Names of a limit, of its use, and of the parts of the use that the kernel gives up by itself (cached files), in
#: versions 2 (which slows down above `high`) and 1 of control groups.
_MEMORY = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory.high", "memory.current", ("inactive_file", "active_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


class Memory(NamedTuple):
    """Bytes."""

    total: int
    available: int


def num_visible_cores() -> int:
    """Cores that this process may run on. A container may have time of fewer: `num_cores`."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_cores() -> int:
    """Cores whose time this process may use, rounded up."""
    cores = num_visible_cores()
    for group in _groups("cpu"):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if not period:
            quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return cores


def memory() -> Memory:
    """Memory that this process may have in all, and how much it can still get."""
    import psutil

    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for group in _groups("memory"):
        for limit_name, use_name, cached_names in _MEMORY:
            limit, use = _text(group / limit_name), _text(group / use_name)
            if limit.isdecimal() and use.isdecimal():
                stat = dict(line.split() for line in _text(group / "memory.stat").splitlines())
                cached = sum(int(stat.get(name, 0)) for name in cached_names)
                total = min(total, int(limit))
                available = min(available, max(int(limit) - int(use) + cached, 0))
    return Memory(total, available)


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, from the innermost: a limit of each holds.

    In a container the path may be the host's, of which only the root is seen; what does not exist is passed over.
    """
    for line in _text(_OF_PROCESS).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root = _GROUPS
        elif controller in controllers.split(","):
            root = next((one for one in (_GROUPS / controller, _GROUPS / controllers) if one.is_dir()), _GROUPS)
        else:
            continue
        inner = Path(path.lstrip("/"))
        yield from (root / part for part in (inner, *inner.parents) if ".." not in part.parts)


def _text(file: Path) -> str:
    """What a file says; nothing where there is none."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
