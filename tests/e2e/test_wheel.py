"""The wheel as a user has it: installed into a fresh environment, used in an empty folder with modules of his own."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.machine import machine, prefect_api, processes
from smoltulu.flows.recipe import load_recipe
from tests import ROOT
from tests.copies import TOPS
from tests.small_tiny import SMALL_TINY

pytestmark = pytest.mark.slow

#: `tiny` up to SFT, with its evaluations and publication: whatever is read as a file is read.
SMALL: dict[str, Any] = {
    **{name: value for name, value in SMALL_TINY.items() if not name.startswith(("dpo", "rlvr"))},
    **dict.fromkeys(("reward_model", "dpo", "rlvr", "data.preference", "data.rlvr"), None),
    "sft.max_steps": 4,
    "evaluation.sampled": None,
    "compute.min_free_disk_gb": 0,
    "compute.launcher": "warm",
}
#: All that `smoltulu plan` imports: an interpreter without torch has it in half a minute.
PLAN_NEEDS = ("pydantic", "pyyaml", "typer", "rich", "jinja2", "blake3")


def _ran(*command: str | Path, **options: Any) -> str:
    done = subprocess.run(list(map(str, command)), text=True, capture_output=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the checkout and nothing that a build left in it."""
    folder = tmp_path_factory.mktemp("source")
    for name in _ran("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def _build(source: Path, kind: str, target: Path) -> Path:
    """What pip calls in a source tree (PEP 517), with the setuptools of this environment."""
    target.mkdir(exist_ok=True)
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    _ran(sys.executable, "-c", code, target, cwd=source, env={**os.environ, "PYTHONPATH": ""})
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    return _build(source, "wheel", source.parent / f"{source.name}-wheel")


def test_a_wheel_holds_smoltulu_alone_and_all_of_it(source: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    assert {name.partition("/")[0] for name in inside} == {"smoltulu", "smoltulu-0.1.0.dist-info"}
    files = {
        path.relative_to(source).as_posix() for top in TOPS for path in (source / top).rglob("*") if path.is_file()
    }
    wanted = {f"smoltulu/{name}" for name in files if not name.endswith("README.md")}
    wanted |= {f"smoltulu/{name}" for name in ("__init__.py", "prefect.yaml", "prefect.toml", "constraints.txt")}
    assert {name for name in inside if name.startswith("smoltulu/")} == wanted

    # From the source distribution comes the same.
    packed = _build(source, "sdist", source.parent / f"{source.name}-sdist")
    unpacked = source.parent / f"{source.name}-unpacked"
    with tarfile.open(packed) as archive:
        archive.extractall(unpacked, filter="data")
    again = _build(next(unpacked.iterdir()), "wheel", source.parent / f"{source.name}-again")
    with zipfile.ZipFile(again) as first, zipfile.ZipFile(wheel) as second:
        for name in wanted:
            assert first.read(name) == second.read(name), name


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel in it, and a user's folder."""

    python: Path
    folder: Path
    home: Path

    def environment(self) -> dict[str, str]:
        # Nothing may lead to the checkout.
        ours = ("PYTHON", "PREFECT_", "SMOLTULU_", "VIRTUAL_ENV")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        path = f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"
        return {**kept, "PATH": path, "HOME": str(self.home), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}

    def __call__(self, *arguments: str, below: str = "") -> str:
        """Output of a `smoltulu` command that must succeed, called in the user's folder."""
        program = self.python.parent / "smoltulu"
        return _ran(program, *arguments, cwd=self.folder / below, env=self.environment(), timeout=900)

    def files(self) -> set[str]:
        """Files of the installed package, without what Python and numba keep there."""
        code = "import smoltulu; print(smoltulu.__file__)"
        package = Path(_ran(self.python, "-c", code, cwd=self.folder, env=self.environment()).strip()).parent
        assert package.is_relative_to(self.python.parents[1]), "this is not the installed copy"
        return {str(path) for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def _install(python: str, wheel: Path, place: Path) -> Installed:
    """A virtual environment of an interpreter, the wheel in it without its dependencies, and the user's folder."""
    _ran(python, "-m", "venv", "--without-pip", place / "venv")
    made = place / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", made, "install"]
    _ran(*pip, "--no-deps", "--no-index", wheel)
    for name in ("mine/experiments", "mine/flows", "home"):
        (place / name).mkdir(parents=True)
    hostile = "raise ImportError('this file is the user\\'s, and no business of smoltulu')"
    for name in ("tasks.py", "flows/__init__.py", "schemas.py", "recipes.py"):
        (place / "mine" / name).write_text(hostile)
    return Installed(made, place / "mine", place / "home")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    place = tmp_path_factory.mktemp("installed")
    made = _install(sys.executable, wheel, place)
    # The dependencies of this environment; its own .pth files, one of which leads to the checkout, are not read there.
    (purelib,) = (place / "venv").glob("lib/python*/site-packages")
    (purelib / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return made


def test_plan_and_audit_in_an_empty_folder(installed: Installed) -> None:
    shipped = installed.files()
    planned = json.loads(installed("plan", "tiny", "--json"))
    assert {stage["node"]: stage["key"] for stage in planned["stages"]} == Graph(load_recipe("tiny")).keys()
    assert planned["store"] == str(installed.folder / "artifacts" / "store")

    turns = [{"role": "user", "content": "What is 3 and 3?"}, {"role": "assistant", "content": "6"}]
    (installed.folder / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (installed.folder / "held_out.jsonl").write_text(json.dumps({"question": "what is 3 and 3?"}) + "\n")
    command = ("audit", "rows.jsonl", "-b", "own=held_out.jsonl:question", "--detector", "none", "--json")
    (audited,) = json.loads(installed(*command))
    (benchmark,) = audited["contamination"]["benchmarks"]
    assert (benchmark["num_instances"], benchmark["num_contaminated"]) == (1, 1)
    assert Path(audited["report"]).is_relative_to(installed.folder / "artifacts" / "reports")
    assert installed.files() == shipped


def test_a_run_through_a_server_that_up_started(installed: Installed) -> None:
    shipped = installed.files()
    nested: dict[str, Any] = {"extends": "tiny"}
    for dotted, value in SMALL.items():
        *blocks, name = dotted.split(".")
        inner = nested
        for block in blocks:
            inner = inner.setdefault(block, {})
        inner[name] = value
    (installed.folder / "experiments" / "small-one.yaml").write_text(yaml.safe_dump(nested))
    port = prefect_api.free_port()
    state = installed.folder / ".smoltulu"
    try:
        up = installed("up", "--port", str(port))
        assert f"export PREFECT_API_URL={prefect_api.url_of(port)}" in up
        # From a folder below, where `small-one.yaml` lies: the flow runs in the folder of `up`.
        ran = installed("run", "smoltulu/tiny", "-p", "recipe=small-one.yaml", below="experiments")
        assert "stages cached; report:" in ran and "finished successfully" in ran, ran[-4000:]
        planned = json.loads(installed("plan", "small-one.yaml", "--json", below="experiments"))
        assert planned["recipe"] == "small-one"
        statuses = {stage["node"]: stage["status"] for stage in planned["stages"]}
        assert set(statuses.values()) == {"cached"} and {"sft", "evaluation-sft", "publish"} <= statuses.keys()
        examined = subprocess.run(
            [installed.python.parent / "smoltulu", "doctor"], cwd=installed.folder, env=installed.environment(),
            text=True, capture_output=True, check=False,
        )  # fmt: skip
        assert "all 7 of prefect.yaml are registered" in examined.stdout and "1 polls the pool" in examined.stdout
    finally:
        down = installed("down")
        left = processes.processes_with(machine.MARK, str(state))
        processes.send(left, 9)
    assert "all down" in down and not left and prefect_api.port_is_free(port)

    manifests = [
        json.loads(path.read_text()) for path in installed.folder.glob("artifacts/store/*/*/gen-*/manifest.json")
    ]
    assert manifests and all(manifest["environment"]["git_commit"] is None for manifest in manifests)
    # All state is below the user's folder: nothing in the package, in the home folder, or in the folder of the recipe.
    assert {path.name for path in installed.folder.iterdir()} >= {".smoltulu", "artifacts"}
    assert installed.files() == shipped
    assert [path for path in installed.home.rglob("*") if path.is_file()] == []  # Prefect makes an empty .prefect
    assert [path.name for path in (installed.folder / "experiments").iterdir()] == ["small-one.yaml"]


def _other_pythons() -> list[str]:
    """Interpreters of this machine, one for each further version that the project supports."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python3.{minor}") for minor in (11, 12, 13)]
    found += [str(path) for path in sorted(pyenv.glob("3.1[123]*/bin/python"))]
    versions = {sys.version_info[:2]: ""}
    for python in filter(None, found):
        code = "import sys, venv, ensurepip; print(*sys.version_info[:2])"
        done = subprocess.run([python, "-c", code], text=True, capture_output=True, check=False)
        if done.returncode == 0:
            major, minor = map(int, done.stdout.split())
            versions.setdefault((major, minor), python)
    return [python for python in versions.values() if python]


def test_other_interpreters_compile_it_and_plan_the_same_keys(wheel: Path, tmp_path: Path) -> None:
    pythons = _other_pythons()
    if not pythons:
        pytest.skip("no second interpreter (3.11 to 3.13) is on this machine")
    without = []
    for number, python in enumerate(pythons):
        made = _install(python, wheel, tmp_path / str(number))
        environment = made.environment()
        (package,) = (tmp_path / str(number)).glob("venv/lib/python*/site-packages/smoltulu")
        _ran(made.python, "-W", "error", "-m", "compileall", "-q", "-f", package, env=environment)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--python",
            str(made.python),
            "install",
            "-q",
        ]
        pinned = [*pip, "-c", str(ROOT / "constraints.txt"), *PLAN_NEEDS]
        if subprocess.run(pinned, env=os.environ, capture_output=True, check=False).returncode:
            without.append(python)
            continue
        planned = json.loads(made("plan", "tiny", "--json"))
        assert {stage["node"]: stage["key"] for stage in planned["stages"]} == Graph(load_recipe("tiny")).keys()
    if without:
        pytest.skip(f"compiled, but not planned with {', '.join(without)}: its packages cannot be had here")
