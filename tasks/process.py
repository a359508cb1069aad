"""What a stage's process asks the system: to end with its parent, and whether an error means out of memory."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
#: Modules that a stage's process does without.
WITHOUT_VARIABLE = "SMOLTULU_WITHOUT"
#: The process that started this one, where that is no process of the job file (tasks/engine/ranks.py).
PARENT_VARIABLE = "SMOLTULU_PARENT"
#: Seconds that a rank may take for its first step beyond what it may for others: models are loaded before it.
RANK_START_S = 600.0
#: What torch's allocators and the libraries below it say. CUDA's own exception is told by its name.
_OUT_OF_MEMORY_TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",  # NCCL
    "Cannot allocate memory",  # the system's own word, e.g. where a file is mapped
    "std::bad_alloc",
)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; exit if it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit("the process that started this stage is gone")


def leave_out() -> None:
    """Have the libraries take what `WITHOUT_VARIABLE` names for not installed: they import it wherever it is."""
    for name in os.environ.get(WITHOUT_VARIABLE, "").split():
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def is_out_of_memory(error: Exception) -> bool:
    """Whether a stage ran out of memory, of the host or of a GPU. Does not import torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)
