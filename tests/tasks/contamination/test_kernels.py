"""The compiled kernels: one digest covers them all, so that no stale machine code is ever run."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from smoltulu.tasks.contamination.kernels import compile as compiling
from smoltulu.tasks.contamination.kernels.text import (
    LOWER_BYTES,
    LOWER_CODE_POINTS,
    hash_terms,
    normalise,
    normalise_and_hash,
)
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


@numba.njit
def in_one_go(source, limit, lower_bytes, lower_points):  # type: ignore[no-untyped-def]
    out = np.zeros(2 * len(source) + 8, np.uint8)
    starts, hashes = np.zeros(limit + 1, np.uint32), np.zeros(limit + 1, np.uint64)
    n, num_terms, longest = normalise_and_hash(
        source, 0, len(source), out, starts, hashes, limit, lower_bytes, lower_points
    )
    return out[: max(n, 0)], n, starts[: num_terms + 1], hashes[:num_terms], longest


@numba.njit
def one_after_the_other(source, limit, lower_bytes, lower_points):  # type: ignore[no-untyped-def]
    out = np.zeros(2 * len(source) + 8, np.uint8)
    starts, hashes = np.zeros(limit + 1, np.uint32), np.zeros(limit + 1, np.uint64)
    n = normalise(source, 0, len(source), out, 0, lower_bytes, lower_points)
    num_terms, longest = hash_terms(out, 0, max(n, 0), starts, hashes, limit)
    return out[: max(n, 0)], n, starts[: num_terms + 1], hashes[:num_terms], longest


@given(st.text(alphabet="aB,. \né中İ\x00"), st.integers(1, 6))
@example("", 1)
@example(" , ", 2)
@example("a b ", 2)
@example("a b  ", 1)
@example("a b c", 2)
def test_terms_and_their_hashes_in_one_go_are_those_of_two_passes(text: str, limit: int) -> None:
    source = np.frombuffer(text.encode() + b" ", np.uint8)[:-1]
    once, twice = (made(source, limit, LOWER_BYTES, LOWER_CODE_POINTS) for made in (in_one_go, one_after_the_other))
    for one, two in zip(once, twice, strict=True):
        assert np.array_equal(one, two)


def test_what_is_no_utf8_is_told_also_behind_the_first_terms() -> None:
    source = np.frombuffer(b"a b c \xff", np.uint8)
    for limit in (2, 8):
        assert in_one_go(source, limit, LOWER_BYTES, LOWER_CODE_POINTS)[1] == -1
