"""Cores and memory under control groups: folders as the kernel writes them, and a real group where one can be made."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks import limits
from smoltulu.tasks.engine import launch

GB = 1 << 30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of control groups; `process.txt` beside it says which ones this process is in."""
    monkeypatch.setattr(limits, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "_OF_PROCESS", tmp_path / "process.txt")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: limits.Memory(512 * GB, 400 * GB))
    return tmp_path / "cgroup"


def put(folder: Path, **files: str) -> None:
    """`memory_max` is the file memory.max: the first underscore is a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text + "\n")


def of_process(groups: Path, text: str) -> None:
    (groups.parent / "process.txt").write_text(text)


def test_without_groups_it_is_the_machine(groups: Path) -> None:
    assert (limits.num_cores(), limits.memory()) == (64, (512 * GB, 400 * GB))
    of_process(groups, "0::/\n")  # of a machine that limits nothing
    put(groups, memory_stat="inactive_file 0")
    assert (limits.num_cores(), limits.memory()) == (64, (512 * GB, 400 * GB))


def test_version_2_every_group_around_it_limits(groups: Path) -> None:
    """A job of Slurm: the step has no limit, the job has memory, the user's slice has cores."""
    of_process(groups, "0::/slice/job/step\n")
    put(groups / "slice", cpu_max="350000 100000", memory_max="max", memory_current=str(300 * GB))
    put(
        groups / "slice/job",
        cpu_max="max 100000",
        memory_max=str(32 * GB),
        memory_current=str(20 * GB),
        memory_stat=f"anon {12 * GB}\ninactive_file {6 * GB}\nactive_file {2 * GB}",
    )
    put(groups / "slice/job/step", cpu_max="max 100000", memory_max="max", memory_current=str(GB))
    assert (limits.num_cores(), limits.memory()) == (4, (32 * GB, 20 * GB))  # 32 - 20 and 8 of cached files
    put(groups / "slice/job", memory_high=str(28 * GB))
    assert limits.memory() == (28 * GB, 16 * GB)


def test_in_a_container_the_path_is_the_hosts(groups: Path) -> None:
    of_process(groups, "0::/kubepods/pod-7/box\n")
    put(groups, cpu_max="50000 100000", memory_max=str(2 * GB), memory_current=str(3 * GB), memory_stat="")
    assert (limits.num_cores(), limits.memory()) == (1, (2 * GB, 0))
    of_process(groups, "0::/../../other\n")  # a namespace within another group
    assert limits.num_cores() == 1


def test_version_1(groups: Path) -> None:
    of_process(groups, "5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/a:b\n0::/\n")
    put(groups / "cpu,cpuacct/docker/a", cpu_cfs_quota_us="200000", cpu_cfs_period_us="100000")
    put(groups / "cpu,cpuacct", cpu_cfs_quota_us="-1", cpu_cfs_period_us="100000")
    put(groups / "memory", memory_limit_in_bytes="9223372036854771712", memory_usage_in_bytes=str(100 * GB))
    put(
        groups / "memory/docker/a",
        memory_limit_in_bytes=str(8 * GB),
        memory_usage_in_bytes=str(5 * GB),
        memory_stat=f"inactive_file 7\ntotal_inactive_file {GB}",
    )
    assert (limits.num_cores(), limits.memory()) == (2, (8 * GB, 4 * GB))


def test_a_stage_in_a_container_takes_the_cores_that_it_has_time_of(
    groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    compute = ComputeSettings(device="cpu")
    assert "OMP_NUM_THREADS" not in launch._child_environment(compute, 1)
    of_process(groups, "0::/\n")
    put(groups, cpu_max="400000 100000")
    assert launch._child_environment(compute, 1)["OMP_NUM_THREADS"] == "4"
    assert "OMP_NUM_THREADS" not in launch._child_environment(compute, 2)  # ranks have one thread each
    assert launch._child_environment(ComputeSettings(device="cpu", num_threads=3), 1)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch._child_environment(compute, 1)["OMP_NUM_THREADS"] == "7"


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A group of memory that this user may make; most machines let only root."""
    for root, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = root / f"smoltulu-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(GB))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("needs a control group of its own")


def test_a_real_group(real_group: Path) -> None:
    enter = f"open('{real_group}/cgroup.procs', 'w').write('0')"
    ask = f"{enter}; from smoltulu.tasks.limits import memory; print(*memory())"
    said = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    total, available = map(int, said)
    assert total == GB and 0 < available < GB
