"""The folder of a key, read from entries that are made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from smoltulu.artifacts.layout import look, made_for, number_of, read_pointer, reason_of
from smoltulu.artifacts.manifests import Ref


def folder_with(path: Path, *names: str, current: str | None = None) -> Path:
    for name in names:
        (path / name).mkdir(parents=True)
        if name.startswith("gen-"):
            (path / name / "manifest.json").touch()
    if current is not None:
        (path / "current").write_text(current)
    return path


def test_numbers_of_names() -> None:
    names = (
        "gen-0001",
        "gen-0042",
        "gen-12345",
        "gen-1",
        "gen-0001-7",
        "damaged-gen-0001-7",
        ".trash-gen-0001-1-1",
        "",
    )
    assert [number_of(name) for name in names] == [1, 42, 12345, 0, 0, 0, 0, 0]


def test_every_entry_has_its_kind(tmp_path: Path) -> None:
    names = ("gen-0002", "gen-0001", "damaged-gen-0003-17", "work", "pull", ".trash-work-1-1", "foreign")
    folder = folder_with(tmp_path / "sft" / "ab", *names, current="gen-0002\n")
    (folder / "gen-0004").mkdir()
    (folder / "spec.json").touch()
    found = look(folder)
    assert found.ref == Ref("sft", "ab") and found.has_spec and found.current == "gen-0002" and not found.is_link
    assert (found.whole, found.headless) == (("gen-0001", "gen-0002"), ("gen-0004",))
    assert (found.damaged, found.begun, found.leftovers) == (
        ("damaged-gen-0003-17",),
        ("work", "pull"),
        (".trash-work-1-1",),
    )
    assert found.last_used == (folder / "current").stat().st_mtime_ns
    assert found.set_aside("gen-0003") == ["damaged-gen-0003-17"] and found.set_aside("gen-0001") == []


@pytest.mark.parametrize(
    ("names", "current", "newest", "following"),
    [
        ((), None, None, "gen-0001"),
        (("gen-0001",), None, "gen-0001", "gen-0002"),
        (("gen-0001", "gen-0002"), "gen-0001", "gen-0002", "gen-0003"),
        (("gen-0001", "damaged-gen-0002-5"), "gen-0002", None, "gen-0003"),
        (("gen-0001",), "../gen-0002", "gen-0001", "gen-0002"),
        # As text, gen-10000 is before gen-9999.
        (("gen-9999", "gen-10000"), "gen-9999", "gen-10000", "gen-10001"),
    ],
)
def test_the_generation_that_counts_and_the_next(
    tmp_path: Path, names: tuple[str, ...], current: str | None, newest: str | None, following: str
) -> None:
    found = look(folder_with(tmp_path / "key", "work", *names, current=current))
    assert (found.newest, found.next_generation) == (newest, following)


def test_a_folder_that_is_not_there_and_one_that_cannot_be_read(tmp_path: Path) -> None:
    assert look(tmp_path / "gone").whole == () and read_pointer(tmp_path / "gone") is None
    assert made_for(tmp_path) is None and reason_of(tmp_path) == "no reason given"
    (tmp_path / "current").mkdir()
    told: list[Path] = []
    assert look(tmp_path, lambda path, error: told.append(path)).current is None
    assert told == [tmp_path / "current"]
