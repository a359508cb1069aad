"""What a result was made with: recorded in every manifest, part of no key."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

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


def drift(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Package versions, Python and code of ours that differ between two environments: name old -> new.

    A package that only one of them has is no drift: what was made did not need it.
    """
    before, after = then.get("packages") or {}, now.get("packages") or {}
    changed = [f"{name} {old} -> {after[name]}" for name, old in before.items() if after.get(name) not in (None, old)]
    if then.get("python") not in (None, now.get("python")):
        changed.append(f"python {then['python']} -> {now.get('python')}")
    old, new = then.get("git_commit"), now.get("git_commit")
    if old and new and old != new:
        changed.append(f"code {str(old)[:12]} -> {str(new)[:12]}")
    return changed


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
