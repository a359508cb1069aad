"""No module of ours is ever there twice. At the end of every test process conftest.py asks the same."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smoltulu.schemas.compute import ComputeSettings
from tests import ROOT
from tests.copies import ENTRYPOINTS, TOPS, second_copies


def _after(code: str, *arguments: str, folder: Path = ROOT) -> list[str]:
    """Second copies in a process of its own, after some code."""
    code += "\nfrom tests.copies import second_copies\nprint(second_copies())"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return list(ast.literal_eval(done.stdout.splitlines()[-1]))


def test_a_second_copy_is_found() -> None:
    assert _after("import smoltulu.schemas.common, schemas.common") == [
        f"schemas ({ROOT}/schemas/__init__.py)",
        f"schemas.common ({ROOT}/schemas/common.py)",
    ]
    assert second_copies() == []


@pytest.mark.parametrize("entrypoint", sorted(path.relative_to(ROOT).as_posix() for path in ENTRYPOINTS))
def test_prefect_loads_an_entrypoint_by_its_path_and_nothing_else_twice(entrypoint: str) -> None:
    code = "import sys\nfrom prefect.utilities.importtools import load_script_as_module as load\nload(sys.argv[1])"
    assert _after(code, entrypoint) == []


def test_the_process_of_a_stage_holds_no_second_copy(tmp_path: Path) -> None:
    """It works in the folder of its flow, here one with the folders of the checkout in it."""
    work = tmp_path / "key" / "work"
    (work / "output").mkdir(parents=True)
    sizes = {"num_pretrain": 20, "num_sft": 20, "num_preference": 8, "num_rlvr": 8, "num_eval_arithmetic": 8,
             "num_eval_instructions": 8, "num_eval_verified": 8, "num_preference_eval": 8, "planted_sft": 1,
             "planted_preference": 1, "planted_rlvr": 1}  # fmt: skip
    job = {
        "stage": "world",
        "config": sizes,
        "inputs": {},
        "compute": ComputeSettings().model_dump(mode="json"),
        "folder": str(work / "output"),
        "work": str(work),
        "parent_pid": os.getpid(),
        "num_ranks": 1,
        "externals": {},
    }
    (work / "job.json").write_text(json.dumps(job))
    code = """if True:
        import runpy
        try:
            runpy.run_module("smoltulu.tasks.engine.child", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert end.code == 0, end.code
        import sys
        assert "smoltulu.tasks.world.stage" in sys.modules and "smoltulu.tasks.engine.child" not in sys.modules
    """
    assert _after(code, str(work / "job.json")) == []
    assert (work / "result.json").exists()


def test_nothing_imports_our_folders_by_their_bare_names() -> None:
    """Where the checkout is on the path, as under pytest, `import tasks` would work, and be the second copy."""
    bare = []
    folders = [*TOPS, "tests", "benchmarks"]
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        if path.parent.name == "lm_eval":  # no package: lm-eval reads these files by path
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            bare += [f"{path.relative_to(ROOT)}:{name}" for name in names if name.partition(".")[0] in TOPS]
    assert bare == []
