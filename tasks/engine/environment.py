"""What a result was made with: recorded in every manifest, part of no key."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

_RECORDED_PACKAGES = (
    "torch", "transformers", "trl", "datasets", "accelerate", "tokenizers", "lm_eval", "huggingface_hub", "prefect",
    "numpy", "pydantic",
)  # fmt: skip


@cache
def environment() -> dict[str, object]:
    """What a result was made with: packages, Python, machine, git commit. Recorded, not part of any key."""
    packages = {}
    for name in _RECORDED_PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "packages": packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
