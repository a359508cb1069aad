"""The mix that the sweep `selection-tiny` selects from: half of it useless, and nothing in a row says which half."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from smoltulu.schemas.common import scientific
from smoltulu.schemas.world import MixedSettings, SkillSettings, WorldOutputs
from smoltulu.tasks.world.generate import generate_world
from smoltulu.tasks.world.skills import SKILLS
from tests.tasks.world.test_skills import expected
from tests.tasks.world.test_world import SMALL

WITH_MIX = SMALL.model_copy(
    update={"skills": SkillSettings(num_sft=8, num_eval=100, mixed=MixedSettings(num_rows=120, num_targets=5))}
)
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, WorldOutputs]:
    folder = tmp_path_factory.mktemp("world")
    return folder, generate_world(WITH_MIX, folder)


def rows(folder: Path, name: str) -> Rows:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    texts = [message["content"] for message in row["messages"]]
    return list(zip(texts[::2], texts[1::2], strict=True))


@pytest.mark.parametrize("skill", SKILLS)
def test_half_of_the_rows_are_copies_whose_every_answer_is_wrong(skill: str, world: tuple[Path, WorldOutputs]) -> None:
    folder, outputs = world
    made = rows(folder, outputs.mixed[skill])
    useless = set(json.loads((folder / str(outputs.useless_rows)).read_text())[skill])
    assert len(made) == outputs.num_rows[f"mixed_{skill}"] == 120 and len(useless) == 60
    for number, row in enumerate(made):
        assert {answer == expected(skill, prompt) for prompt, answer in turns(row)} == {number not in useless}
    prompts = [tuple(prompt for prompt, _ in turns(row)) for row in made]
    useful = Counter(prompts[number] for number in range(120) if number not in useless)
    assert useful == Counter(prompts[number] for number in useless)
    # Neither length nor place in the file tells them apart, and nothing else stands in a row.
    assert {frozenset(row) for row in made} == {frozenset({"messages"})}
    assert {len(turns(row)) for row in made} == {1, 2, 3}
    assert 20 < sum(number < 60 for number in useless) < 40


def test_the_mix_and_the_targets_hold_nothing_of_the_benchmark(world: tuple[Path, WorldOutputs]) -> None:
    folder, outputs = world
    held_out = {row["prompt"] for row in rows(folder, str(outputs.eval_skills))}
    targets = rows(folder, str(outputs.targets))
    assert len(targets) == 8 * 5
    for skill, own in zip(SKILLS, (targets[first : first + 5] for first in range(0, 40, 5)), strict=True):
        assert all(answer == expected(skill, prompt) for row in own for prompt, answer in turns(row))
    every = targets + [row for skill in SKILLS for row in rows(folder, outputs.mixed[skill])]
    assert not held_out & {prompt for row in every for prompt, _ in turns(row)}


def test_a_world_without_a_mix_for_selection_is_as_it_was(tmp_path: Path, world: tuple[Path, WorldOutputs]) -> None:
    folder, outputs = world
    assert WITH_MIX.skills is not None
    without = WITH_MIX.model_copy(update={"skills": WITH_MIX.skills.model_copy(update={"mixed": None})})
    before = generate_world(without, tmp_path)
    assert before.mixed == {} and before.targets is None and before.useless_rows is None
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes()
    assert "mixed" not in json.dumps(scientific(without)) and "mixed" in json.dumps(scientific(WITH_MIX))
    assert outputs.num_rows.items() > before.num_rows.items()
