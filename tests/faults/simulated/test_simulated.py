"""Two hundred schedules, a sample of failing calls, and bugs that the schedules must find (docs/faults.md)."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest

from tests.faults.simulated.disk import Disk, Folder
from tests.faults.simulated.planted import BUGS, kind_of, planted
from tests.faults.simulated.schedules import errors, temporary_home, try_error, try_schedule
from tests.faults.simulated.world import World

_NUM_SCHEDULES = 200


def test_schedules_leave_the_old_or_the_new() -> None:
    wrong = [outcome.line() for seed in range(_NUM_SCHEDULES) if (outcome := try_schedule(seed)).problems]
    assert wrong == []


def test_a_call_that_fails_leaves_the_old_or_the_new_or_is_told() -> None:
    wrong = []
    for one in random.Random(0).sample(errors(), 120):
        if (outcome := try_error(*one)).problems:
            wrong.append(outcome.line())
    assert wrong == []


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_found(bug: str) -> None:
    with planted(bug):
        assert any(try_schedule(seed, kind_of(bug)).problems for seed in range(_NUM_SCHEDULES))


def test_a_seed_gives_the_same_schedule_again() -> None:
    for seed in range(5):
        first, second = try_schedule(seed), try_schedule(seed)
        assert (first.happened, first.seconds, first.problems) == (second.happened, second.seconds, second.problems)


# --- The disk ------------------------------------------------------------------------------------------------------


def after_power_cuts(action: str, num: int = 60) -> set[str]:
    """What is left of a small program's files, over many power cuts: "name=content" of each, or nothing."""
    left = set()
    for seed in range(num):
        with temporary_home() as home:
            world = World(seed, home)
            machine = world.machine("disk")
            root = machine.disk.root

            def program(root: Path = root) -> None:
                exec(action, {"root": root})

            with world.entered():
                world.start(machine, program)
                world.run(lambda world=world: not world.actors)  # type: ignore[misc]
                assert world.errors == []
                world.cut_power(machine)
            files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
            left.add(", ".join(f"{name}={content.decode()!r}" for name, content in sorted(files.items())))
    return left


_SYNC = "import os\ndef sync(path):\n    fd = os.open(path, os.O_RDONLY); os.fsync(fd); os.close(fd)\n"


def test_what_was_not_synced_may_be_lost() -> None:
    left = after_power_cuts("(root / 'a').write_text('new')")
    assert {"", "a='new'", "a=''"} <= left and len(left) > 4  # also torn, also zeros


def test_what_was_synced_is_there() -> None:
    code = f"{_SYNC}(root / 'a').write_text('new'); sync(root / 'a'); sync(root)"
    assert after_power_cuts(code) == {"a='new'"}


def test_bytes_without_a_name_and_a_name_without_bytes() -> None:
    assert after_power_cuts(f"{_SYNC}(root / 'a').write_text('new'); sync(root / 'a')") == {"", "a='new'"}
    left = after_power_cuts(f"{_SYNC}(root / 'a').write_text('new'); sync(root)")
    assert "" not in left and {"a=''", "a='new'"} <= left


def test_a_rename_happens_or_not_and_may_overtake_what_came_before() -> None:
    code = f"{_SYNC}(root / 'a').write_text('old'); sync(root / 'a'); sync(root)\n"
    code += "(root / 'b').write_text('new'); sync(root / 'b'); (root / 'b').replace(root / 'a')"
    assert after_power_cuts(code) == {"a='old'", "a='new'", "a='old', b='new'"}


def test_a_folder_whose_name_was_not_synced_takes_all_with_it() -> None:
    code = f"{_SYNC}d = root / 'd'; d.mkdir(); (d / 'a').write_text('new'); sync(d / 'a'); sync(d)"
    assert after_power_cuts(code) == {"", "d/a='new'"}


def test_a_removal_that_was_not_synced_may_not_have_been() -> None:
    code = f"{_SYNC}(root / 'a').write_text('old'); sync(root / 'a'); sync(root); (root / 'a').unlink()"
    assert after_power_cuts(code) == {"", "a='old'"}


def test_the_folder_of_the_present_is_the_model() -> None:
    """What the disk believes to be there is what is there, after hundreds of calls."""
    with temporary_home() as home:
        world = World(0, home)
        machine = world.machine("disk")

        def program() -> None:
            rng, root = random.Random(1), machine.disk.root
            for _ in range(400):
                a, b = (root / name for name in rng.choices("abcd", k=2))
                calls = (
                    lambda a=a: a.write_text("x"),
                    lambda a=a: a.mkdir(),
                    lambda a=a, b=b: a.rename(b),
                    lambda a=a: a.unlink(),
                    lambda a=a: a.rmdir(),
                    lambda a=a, b=b: b.hardlink_to(a),
                    lambda a=a: (a / "e").write_text("y"),
                )
                with contextlib.suppress(OSError):
                    rng.choice(calls)()

        with world.entered():
            world.start(machine, program)
            world.run(lambda: not world.actors)
            assert world.errors == []
        assert names_in(machine.disk) == {
            path.relative_to(machine.disk.root).as_posix() for path in machine.disk.root.rglob("*")
        }


def names_in(disk: Disk) -> set[str]:
    def below(folder: Folder, path: str) -> set[str]:
        found = set()
        for name, what in folder.entries.items():
            found |= {f"{path}{name}"} | (below(what, f"{path}{name}/") if isinstance(what, Folder) else set())
        return found

    return below(disk.top, "")
