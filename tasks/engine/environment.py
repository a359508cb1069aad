"""What a result was made with: recorded in every manifest, part of no key."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from smoltulu.recipes import CHECKOUT, CONSTRAINTS

_RECORDED_PACKAGES = (
    "torch", "transformers", "trl", "datasets", "accelerate", "tokenizers", "lm_eval", "huggingface_hub", "prefect",
    "numpy", "pydantic",
)  # fmt: skip


@cache
def environment() -> dict[str, object]:
    """What a result was made with: packages, Python, machine, git commit. Recorded, not part of any key.

    `tested_with` has, of the packages, those that are installed in another version than was tested: name -> tested.
    """
    packages = installed_versions(_RECORDED_PACKAGES)
    other = {name: pinned_version(name) for name, version in packages.items() if not as_tested(name, version)}
    return {
        "packages": packages,
        "tested_with": other,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "cpu": cpu_name(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def cpu_name() -> str:
    """The processor's name, else its architecture. The same recipe gives other scores on another one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.machine()


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Package -> installed version; those that are not installed are left out."""
    versions = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def pinned_version(name: str) -> str | None:
    """The version of a package that everything was tested with (constraints.txt); None where it is not listed."""
    return _constraints().get(name.lower().replace("_", "-"))


def as_tested(name: str, installed: str) -> bool:
    """Whether a package is in the version that was tested; a build's label (2.13.0+cpu) does not count."""
    return pinned_version(name) in (None, installed.partition("+")[0])


@cache
def _constraints() -> dict[str, str]:
    lines = (line.partition("==") for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, _, version in lines if version}


def drift(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Package versions, Python, processor and code of ours that differ between two environments: name old -> new.

    A package that only one of them has is no drift: what was made did not need it.
    """
    before, after = then.get("packages") or {}, now.get("packages") or {}
    changed = [f"{name} {old} -> {after[name]}" for name, old in before.items() if after.get(name) not in (None, old)]
    if then.get("python") not in (None, now.get("python")):
        changed.append(f"python {then['python']} -> {now.get('python')}")
    if (cpu := then.get("cpu")) and now.get("cpu") and cpu != now["cpu"]:
        changed.append(f"cpu {cpu} -> {now['cpu']}")
    old, new = then.get("git_commit"), now.get("git_commit")
    if old and new and old != new:
        changed.append(f"code {str(old)[:12]} -> {str(new)[:12]}")
    return changed


def _git(*arguments: str) -> str | None:
    """What git says of the checkout. None for a wheel: the repository around an environment is not ours."""
    if CHECKOUT is None:
        return None
    try:
        return subprocess.run(
            ["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
