"""`smoltulu ladder`: what it costs, its page, and errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from smoltulu.flows.cli.main import app
from smoltulu.flows.sweeping.ladder import load_ladder
from tests.flows.test_ladder import BEST, LADDER, run_by_hand
from tests.hand_store import HandStore


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(LADDER))
    return path


def invoke(*arguments: Any) -> tuple[int, str]:
    made = CliRunner().invoke(app, ["ladder", *map(str, arguments)])
    return made.exit_code, made.output


def test_plan(file: Path, tmp_path: Path) -> None:
    code, out = invoke(file, "plan", "--store", tmp_path / "store")
    assert code == 0 and "confirmation" in out and "73.7k" in out, out  # 36 cells of 2048 tokens
    code, out = invoke(file, "plan", "--store", tmp_path / "store", "--json")
    values = json.loads(out)
    assert [one["num_missing"] for one in values["blocks"]] == [30, 6] and values["num_tokens"] == 36 * 2048
    assert not (tmp_path / "store").exists(), "a plan leaves nothing behind"


def test_the_plan_of_a_ladder_is_a_plan(file: Path) -> None:
    for name in (str(file), "ladder-tiny"):
        made = CliRunner().invoke(app, ["plan", name])
        assert made.exit_code == 0 and "confirmation" in made.output, made.output
    made = CliRunner().invoke(app, ["plan", "ladder-tiny", "-o", "sft.seed=1"])
    assert made.exit_code == 1 and "is a ladder, whose plan takes no --override" in made.output


def test_report(file: Path, tmp_path: Path) -> None:
    code, out = invoke(file, "report", "--store", tmp_path / "store")
    assert code == 1 and "small-proxies was never run in this store" in out
    store = HandStore(tmp_path / "store")
    run_by_hand(store, load_ladder(LADDER).proxies, BEST)
    code, out = invoke(file, "report", "--store", store.root)
    assert code == 0 and "predicted learning rate 0.000691" in out and "ladder.html" in out, out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("ladder-tyni",), "no ladder 'ladder-tyni'; shipped are ladder-smollm2, ladder-tiny"),
        (("surface-tiny",), "no ladder 'surface-tiny'"),
        (("ladder-tiny", "extend"), "no action 'extend'; there are run, plan, report"),
        (("ladder-tiny", "report", "--json"), "--json goes with plan"),
    ],
)
def test_what_cannot_be_done(arguments: tuple[str, ...], told: str) -> None:
    code, out = invoke(*arguments)
    assert code == 1 and told in out.replace("\n", " "), out
