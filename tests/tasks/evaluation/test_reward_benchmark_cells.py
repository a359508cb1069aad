"""Every benchmark of a reward model is a cell of its own: another entry, or another file, makes no other one again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smoltulu.artifacts.keys import artifact_key
from smoltulu.artifacts.store import Store
from smoltulu.schemas.artifact import Spec
from smoltulu.schemas.common import scientific
from smoltulu.schemas.evaluation import EvaluationInputs, EvaluationStageConfig
from smoltulu.tasks.evaluation.stage import cells_of
from smoltulu.tasks.job import Job
from smoltulu.tasks.stages import STAGES
from tests.tasks.engine.test_cells import COMPUTE, model_of
from tests.tiny_model import TULU_TEMPLATE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return model_of(Store(tmp_path_factory.mktemp("store")), "reward")


def keys(model: tuple[str, Any], *entries: dict[str, Any], **digests: str) -> dict[str, str]:
    """Name of each cell -> its key."""
    stage, settings = STAGES["evaluation"], {"reward_benchmarks": entries, "precision": "float32"}
    config = EvaluationStageConfig.model_validate({"subject": "rm", "kind": "reward_model", "settings": settings})
    externals = {f"{name}.data.0": digest for name, digest in digests.items()}
    spec = Spec(stage=stage.name, version=stage.version, config=scientific(config), inputs={}, externals=externals)
    inputs = EvaluationInputs(model=model[0], chat_template=TULU_TEMPLATE)
    job = Job("evaluation-rm", stage, config, COMPUTE, spec, inputs, {"model": model[1]})
    return {name: artifact_key(cell.spec) for name, cell in cells_of(job).items()}


def test_entries_are_cells_of_their_own(model: tuple[str, Any], tmp_path: Path) -> None:
    source = {"path": str(tmp_path / "x.jsonl"), "format": "preference"}
    own = {"name": "pairs", "title": "mine", "sources": [source]}
    bench = {"name": "rewardbench", "sources": [source]}
    first = keys(model, own, mine="sha256:1")
    both = keys(model, bench, own, mine="sha256:1", rewardbench="sha256:2")
    assert list(both) == ["rewardbench", "mine"] and both["mine"] == first["mine"]
    changed = keys(model, {**bench, "truncation": "none"}, own, mine="sha256:1", rewardbench="sha256:2")
    assert changed["mine"] == first["mine"] and changed["rewardbench"] != both["rewardbench"]
    other_rows = keys(model, bench, own, mine="sha256:1", rewardbench="sha256:3")
    assert other_rows["mine"] == first["mine"] and other_rows["rewardbench"] != both["rewardbench"]
    with pytest.raises(ValueError, match="nothing to evaluate a reward model on: set data"):
        keys(model)
