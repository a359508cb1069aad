"""The compiled kernels: one digest covers them all, so that no stale machine code is ever run."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import numba
import pytest

from smoltulu.tasks.contamination.kernels import compile as compiling
from tests import ROOT

KERNELS = ROOT / "tasks" / "contamination" / "kernels"


def _compiles(path: Path) -> bool:
    """Whether a file compiles functions with `kernel` or `inner`, or by numba itself."""
    tree = ast.parse(path.read_text())
    decorators = [d for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for d in node.decorator_list]
    names = {name.id for d in decorators for name in ast.walk(d) if isinstance(name, ast.Name)}
    return bool(names & {"kernel", "inner", "numba", "njit"})


def test_every_file_with_a_kernel_lies_where_the_digest_looks() -> None:
    with_kernels = {
        path for top in ("tasks", "artifacts", "flows") for path in (ROOT / top).rglob("*.py") if _compiles(path)
    }
    assert with_kernels and all(path.parent == KERNELS for path in with_kernels), with_kernels


@pytest.mark.parametrize("name", sorted(path.name for path in KERNELS.glob("*.py")))
def test_a_change_of_any_kernel_file_is_another_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    copy = tmp_path / "kernels"
    shutil.copytree(KERNELS, copy)
    monkeypatch.setattr(compiling, "__file__", str(copy / "compile.py"))

    def folder() -> str | None:
        compiling._folder.cache_clear()
        return compiling._folder()

    try:
        before = folder()
        (copy / name).write_text((copy / name).read_text() + "# changed\n")
        assert before is not None and folder() not in (None, before)
    finally:
        compiling._folder.cache_clear()
