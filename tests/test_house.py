"""The house as a whole: rooms import downwards only, none in a circle, and documents name files that exist."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

#: From the ground up: a room imports rooms of lower floors only. A file of `tasks/` or `flows/` that lies in no folder
#: is a room of its own, unless it stands in `_CONTRACT`; "flows" itself is its empty __init__.py.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("schemas", "recipes", "flows", "tasks.limits"),
    ("artifacts", "tasks.verifiers"),
    ("artifacts.shared", "artifacts.upkeep"),
    # What a stage is: its contract, its process, its progress.
    ("tasks",),
    ("tasks.models", "tasks.data", "tasks.world", "tasks.machine"),
    ("tasks.generation",),
    ("tasks.evaluation",),
    ("tasks.comparison",),
    ("tasks.tables",),
    ("tasks.report", "tasks.trainer"),
    (
        "tasks.base_model",
        "tasks.contamination",
        "tasks.languages",
        "tasks.near_duplicates",
        "tasks.nightly",
        "tasks.publish",
        "tasks.surface",
        "tasks.training",
    ),
    ("tasks.preflight", "tasks.sampled", "tasks.selection_experiment", "tasks.verifier_audit"),
    ("tasks.selection",),
    ("tasks.stages",),
    ("tasks.engine",),
    ("flows.reading",),
    ("flows.recipe_problems",),
    ("flows.forms", "flows.logs", "flows.recipe", "flows.machine", "flows.follow_worker"),
    ("flows.graphs",),
    ("flows.nights", "flows.planning", "flows.runs", "flows.reporting", "flows.endings"),
    ("flows.launching", "flows.pipeline", "flows.audit", "flows.local", "flows.sweeping"),
    ("flows.evaluation", "flows.sweep"),
    ("flows.ladder",),
    ("flows.cli",),
)
_CONTRACT = ("tasks.stage", "tasks.job", "tasks.process", "tasks.progress")


def _modules() -> dict[str, Path]:
    found = {}
    for top in ("flows", "tasks", "artifacts", "schemas", "recipes"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] == ("recipes", "lm_eval"):  # lm-eval loads what lies beside its task definitions
                continue
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _room(module: str) -> str:
    top, _, rest = module.partition(".")
    if top in ("schemas", "recipes") or not rest:
        return top
    second = f"{top}.{rest.partition('.')[0]}"
    if (ROOT / second.replace(".", "/") / "__init__.py").is_file():  # artifacts/store is also where a run keeps things
        return second
    return "tasks" if module in _CONTRACT else top if top == "artifacts" else module


def _imports(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports anywhere in it, also inside functions and for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("smoltulu.") for alias in node.names if "smoltulu." in alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("smoltulu."):
            base = str(node.module).removeprefix("smoltulu.")
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


@pytest.mark.parametrize("module", sorted(MODULES))
def test_rooms_import_downwards_only(module: str) -> None:
    """Which also says that no two rooms import each other in a circle."""
    floors = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    here = _room(module)
    assert here in floors, f"{here} stands on no floor: put it into FLOORS"
    upwards = {
        name for name in _imports(MODULES[module]) if _room(name) != here and floors[_room(name)] >= floors[here]
    }
    assert not upwards


def test_no_file_of_a_room_imports_in_a_circle() -> None:
    above: dict[str, set[str]] = {name: set(_imports(path)) & MODULES.keys() for name, path in MODULES.items()}
    while ground := [name for name, needs in above.items() if not needs & above.keys()]:
        for name in ground:
            del above[name]
    assert not above


def test_every_room_says_what_it_is() -> None:
    """What it holds, where to enter, what must hold: in the README beside the code, in about ten lines."""
    rooms = {_room(module) for module in MODULES} - {"schemas", "recipes"}
    for room in sorted(rooms):
        folder = ROOT / room.replace(".", "/")
        if (folder / "__init__.py").is_file():
            readme = folder / "README.md"
            assert readme.is_file(), f"{room} has no README.md"
            assert len(readme.read_text().splitlines()) <= 20, f"{readme} is longer than a look"


def _named_paths() -> Iterator[tuple[str, str]]:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    # The changelog speaks of what was.
    documents = [name for name in tracked if name.endswith((".md", ".py", ".yaml", ".toml", "Makefile"))]
    documents = [name for name in documents if not name.startswith("tests/")]  # they make files up
    pattern = re.compile(
        r"(?<![\w./-])((?:flows|tasks|artifacts|schemas|recipes|docs|benchmarks|tests)/[\w./-]+\.\w+)\b"
    )
    for name in documents:
        if name != "CHANGELOG.md" and (ROOT / name).is_file():
            for found in pattern.findall((ROOT / name).read_text()):
                yield name, found


#: What a reader would write (a new stage), and a file of open-instruct.
_ELSEWHERE = ("schemas/shuffle.py", "tasks/shuffle/stage.py", "tasks/training/orpo.py", "docs/tulu3.md")


def test_paths_that_documents_and_code_name_exist() -> None:
    gone = {
        (where, path)
        for where, path in _named_paths()
        if not (ROOT / path).exists()
        and path not in _ELSEWHERE
        and not path.startswith(("artifacts/store", "artifacts/reports"))
    }
    assert not gone


def test_what_pydantic_found_is_worded_in_one_place() -> None:
    """By `schemas.common.problems_of`, in short plain lines. Recipes have words of their own, with what is allowed."""
    words = {
        path.relative_to(ROOT).as_posix()
        for path in MODULES.values()
        if re.search(r"""\[['"]msg['"]\]""", path.read_text())
    }
    assert words == {"schemas/common.py", "flows/recipe_problems.py"}


def test_benchmarks_run_as_files() -> None:
    """`python benchmarks/NAME.py` has only its own folder on the path."""
    scripts = {path.name: path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    needing = {
        name
        for name, text in scripts.items()
        if "__main__" in text and re.search(r"^ *from (?:benchmarks|tests)\b", text, re.MULTILINE)
    }
    assert needing and not {name for name in needing if "sys.path.insert(0, str(Path(__file__)" not in scripts[name]}
