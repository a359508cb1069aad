"""Reading files; folders that hold rows and models are closed to other users of the machine, and said where not."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from smoltulu.artifacts.files import exposed, private_folder
from smoltulu.artifacts.keys import file_digest
from smoltulu.artifacts.shared.objects import open_objects
from smoltulu.artifacts.store import Store
from smoltulu.schemas.artifact import Spec


@pytest.fixture(params=[0o000, 0o002, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_what_is_made_is_closed_to_others_and_the_umask_decides_for_the_group(tmp_path: Path, umask: int) -> None:
    spec = Spec(stage="sft", version=1, config={}, inputs={}, externals={})
    with Store(tmp_path / "artifacts" / "store").producer(spec, lambda whom: None):
        pass
    open_objects(str(tmp_path / "shared")).prepare()
    for folder in (tmp_path / "artifacts" / "store", tmp_path / "shared", private_folder(tmp_path / "reports")):
        assert mode(folder) == 0o770 & ~umask
        assert exposed(folder) is None


def test_a_folder_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "group").mkdir()
    (tmp_path / "group").chmod(0o775)
    assert mode(private_folder(tmp_path / "group")) == 0o775


def test_what_others_may_do_is_said() -> None:
    # Not below tmp_path, which pytest closes.
    with tempfile.TemporaryDirectory() as name:
        above = Path(name)
        folder = above / "store"
        folder.mkdir()
        above.chmod(0o711)
        for bits, said in ((0o755, "read"), (0o777, "written"), (0o750, None), (0o711, None), (0o733, "written")):
            folder.chmod(bits)
            assert exposed(folder) == said, oct(bits)
        folder.chmod(0o777)
        # A link is judged by what it leads to.
        (above / "link").symlink_to(folder)
        assert exposed(above / "link") == "written"
        above.chmod(0o700)
        assert exposed(folder) is None, "nobody gets there"
        assert exposed(above / "missing") is None


def test_a_file_that_is_cut_while_it_is_read_does_not_end_the_process(tmp_path: Path) -> None:
    """A mapped one did: the kernel sends SIGBUS for what lies behind the end by then."""
    code = """
import pathlib, sys, threading, time
from smoltulu.artifacts.keys import file_digest
file = pathlib.Path(sys.argv[1])
for _ in range(5):
    with file.open("wb") as opened:
        opened.truncate(1 << 30)
    reader = threading.Thread(target=file_digest, args=(file,))
    reader.start()
    time.sleep(0.05)
    with file.open("r+b") as opened:
        opened.truncate(1 << 20)
    reader.join()
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], capture_output=True, timeout=300)
    assert run.returncode == 0, run


@pytest.mark.parametrize("num_bytes", [0, 1, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, (9 << 20) + 7])
def test_a_digest_is_that_of_the_whole_file(tmp_path: Path, num_bytes: int) -> None:
    data = random.Random(num_bytes).randbytes(num_bytes)
    (tmp_path / "file").write_bytes(data)
    assert file_digest(tmp_path / "file") == blake3(data).hexdigest()
