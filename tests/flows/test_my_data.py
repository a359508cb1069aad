"""The page "train on my own data" does what it says: its files are run as they stand there."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.local import run_graph
from smoltulu.flows.recipe import load_recipe
from smoltulu.schemas.contamination import ContaminationOutputs
from smoltulu.schemas.data import DatasetOutputs
from smoltulu.tasks.engine.stores import open_store
from tests import ROOT


@pytest.mark.slow
def test_adapters_from_the_file_of_the_page_to_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "train-on-my-data.md").read_text()
    blocks = dict(re.findall(r"```(python|yaml)\n(.*?)```", page, re.DOTALL))
    (tmp_path / "my-data.yaml").write_text(blocks["yaml"])
    subprocess.run([sys.executable, "-c", blocks["python"]], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(str(tmp_path / "my-data.yaml"), {"compute.launcher": "inline"})
    made = run_graph(Graph(recipe), open_store(recipe.compute), logging.getLogger("test"))
    outputs = {reference.key: reference.outputs for reference in made.values()}
    (report,) = DatasetOutputs.model_validate(outputs[made["dataset-sft"].key]).sources
    assert (report.num_rows, report.num_malformed, report.num_dropped, report.unread) == (400, 0, 0, {"id": 400})
    checked = ContaminationOutputs.model_validate(made["contamination-sft"].outputs)
    assert (checked.num_rows, checked.num_removed) == (395, 5)
    assert (Path(made["sft"].path) / "model" / "model.safetensors").is_file()
