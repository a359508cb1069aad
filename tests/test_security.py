"""docs/security.md: every promise names a test that exists. And the promises that no other file tests."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltulu.artifacts.store import Store
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.recipe import load_recipe
from smoltulu.flows.runs import begin_run, end_run
from smoltulu.tasks.models.chat_template import check_chat_template
from smoltulu.tasks.models.folders import check_model_folder
from tests import ROOT
from tests.tiny_model import build_tiny_model

PAGE = (ROOT / "docs" / "security.md").read_text()


def promises() -> list[tuple[str, str]]:
    """Promise and test of every row of a table that has a column `test`."""
    found = []
    for table in re.findall(r"^\| promise \| test \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE):
        for line in table.splitlines():
            promise, _, test = line.strip("| ").rpartition(" | ")
            found.append((promise, test.strip("`")))
    return found


def test_every_promise_names_a_test_that_exists() -> None:
    assert len(promises()) > 30
    assert PAGE.count("| promise | test |") == len(re.findall(r"^## ", PAGE, re.MULTILINE)), "one table a section"
    for promise, test in promises():
        path, _, name = test.partition("::")
        assert promise and (ROOT / path).is_file(), test
        functions = {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if hasattr(node, "name")}
        assert name in functions, test


def test_no_code_of_others_is_asked_for() -> None:
    """In the sources themselves: a new call must not forget it."""
    for folder in ("flows", "tasks", "artifacts", "schemas", "recipes"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert not re.search(r"trust_remote_code\W+True|allow_pickle=True|confirm_run_unsafe_code=True", text), path
            assert not re.search(r"\bimport pickle\b|yaml\.(?:unsafe_load|full_load|Loader)\b", text), path


def test_a_model_brings_no_code(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model")
    check_model_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "own.Model"}}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="wants code of its own"):
        Graph(load_recipe("tiny", {"base_model": {"path": str(folder)}}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickles"):
        Graph(load_recipe("tiny", {"base_model": {"path": str(folder)}}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "messages.__class__.__init__.__globals__",
        "raise_exception.__globals__['__builtins__']",
        "self._TemplateReference__context.environment.loader",
        "cycler.__init__.__globals__.os.system('true')",
        "messages.append(1)",
    ],
)
def test_a_chat_template_reaches_no_python(expression: str) -> None:
    template = f"{{% set x = {expression} %}}{{{{ x.__doc__ }}}}"
    with pytest.raises(ValueError, match="does not render"):
        check_chat_template(template, "mine")


@given(st.text() | st.sampled_from(["../../x", "/etc/x", "a/../b", "." * 300, "é" * 300, "\x1b[31m", "-"]))
def test_the_name_of_a_run_leaves_no_folder(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        graph = Graph(load_recipe("tiny"), until="world")
        for name in (text, f"tiny-{text}"):
            record = end_run(store, begin_run(store, name, graph, ""), "Completed", {})
            assert record.run_name.isprintable() and "/" not in record.run_name
            (Path(folder) / "reports" / record.run_name).mkdir(parents=True, exist_ok=True)
        assert {path.name for path in Path(folder).iterdir()} == {"store", "reports"}
        assert len(list((store.root / "runs").iterdir())) in (1, 2)
