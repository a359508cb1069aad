"""How the contamination kernels are compiled, and where the machine code is kept."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at first use, without the interpreter's lock, and keep the machine code where a folder can be written."""
    folder, before = _folder(), numba.config.CACHE_DIR
    numba.config.CACHE_DIR = folder or before  # read while the decorator runs
    try:
        return numba.njit(nogil=True, cache=folder is not None, error_model="numpy")(function)
    except RuntimeError:  # numba: "no locator available", as for code in a zip file
        return numba.njit(nogil=True, error_model="numpy")(function)
    finally:
        numba.config.CACHE_DIR = before


def inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of kernels only: without the code for calls from Python, which takes longest to compile."""
    return numba.njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


@cache
def _folder() -> str | None:
    """A folder per version of the kernels: numba alone would not see that a kernel of another file has changed."""
    here = Path(__file__).parent  # holds every kernel: tests/tasks/contamination/test_kernels.py
    digest = hashlib.sha256()
    for path in sorted(here.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "smoltulu"
    for parent in [Path(numba.config.CACHE_DIR)] if numba.config.CACHE_DIR else [here / "__pycache__", user]:
        folder = parent / f"contamination-{digest.hexdigest()[:16]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            return str(folder)
    return None
