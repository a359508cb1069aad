"""Skills of the tiny world: right answers, nothing held out is trained on, and a world without them is as it was."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from smoltulu.flows.sweeping.grid import load_sweep
from smoltulu.schemas.world import SkillSettings, WorldConfig
from smoltulu.tasks.world.generate import generate_world
from smoltulu.tasks.world.skills import FOLLOWER, PATTERNS, REASONING, SKILLS, draw_question
from tests.tasks.world.test_world import SMALL

WITH_SKILLS = SMALL.model_copy(update={"skills": SkillSettings(num_sft=2000, num_eval=100, pretrain_share=0.5)})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("world")
    outputs = generate_world(WITH_SKILLS, folder)
    assert outputs.num_rows["skills"] == 2000 and outputs.num_rows["eval_skills"] == 800
    names = {"skills": outputs.skills, "eval_skills": outputs.eval_skills, "pretrain": outputs.pretrain}
    return {
        name: [json.loads(line) for line in (folder / str(file)).read_text().splitlines()]
        for name, file in names.items()
    }


def expected(skill: str, prompt: str) -> str:
    """The answer, worked out from the prompt another way than it was made."""
    numbers = [int(number) for number in re.findall(r"\d+", prompt)]
    last = prompt.split(": ")[-1]
    if skill == "arithmetic":
        return str(eval(prompt.removeprefix("What is ").removesuffix("?")))
    if skill == "modular":
        return str(numbers[0] - numbers[0] // numbers[1] * numbers[1])
    if skill == "comparison":
        return str(sorted(numbers)[-1])
    if skill == "sorting":
        return " ".join(sorted(re.findall(r"\d", prompt)))
    if skill == "copy":
        return last
    if skill == "template":
        name, gift, sender = last.split(", ")
        return f"Dear {name}, thanks for the {gift}. Yours, the {sender}"
    if skill == "letter_case":
        return " ".join(word.upper() for word in last.split())
    first = FOLLOWER[last.split()[1]]
    return " ".join((first, FOLLOWER[first], FOLLOWER[FOLLOWER[first]]))


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_are_right(skill: str) -> None:
    rng = random.Random(5)
    for _ in range(200):
        question = draw_question(rng, skill)
        assert question.answer == expected(skill, question.prompt), question


def test_the_sweep_knows_what_a_guess_scores() -> None:
    """A remainder is one of 2 to 5: who knows no more than that is right in 32 %, whatever the learning rate."""
    rng = random.Random(5)
    drawn = [draw_question(rng, skill) for skill in SKILLS for _ in range(2000)]
    chances = {
        task.task.removeprefix("skill_"): task.chance
        for task in load_sweep("surface-tiny").tasks
        if task.metric == "exact_match,none"
    }
    for skill in SKILLS:
        answers = Counter(question.answer for question in drawn if question.skill == skill)
        likeliest = answers.most_common(1)[0][1] / 2000
        assert likeliest < (chances[skill] or 0.0) + 0.1, f"{skill}: one answer is right in {likeliest:.0%}"
    assert chances["modular"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4, abs=0.001)


def test_every_skill_is_asked_equally_and_what_is_held_out_is_nowhere_else(
    files: dict[str, list[dict[str, Any]]],
) -> None:
    held_out = files["eval_skills"]
    assert Counter(row["subset"] for row in held_out) == dict.fromkeys(SKILLS, 100)
    prompts = {row["prompt"] for row in held_out}
    assert len(prompts) == 800
    asked = [row["messages"][0]["content"] for row in files["skills"]]
    assert not prompts & set(asked)
    assert not prompts & {line for row in files["pretrain"] for line in row["text"].split("\n")}
    for row in held_out:
        assert row["answer"] == expected(row["subset"], row["prompt"])
    starts = Counter(re.sub(r"[\d ].*", "", prompt) for prompt in asked)
    assert all(count > 150 for count in starts.values())


def test_plain_text_has_patterns_and_little_to_reason_about(files: dict[str, list[dict[str, Any]]]) -> None:
    texts = [row["text"] for row in files["pretrain"] if row["text"].startswith("Q\n")]
    assert 10 < len(texts) < 40  # half of 50
    assert all(text.count("Q\n") == 6 for text in texts)
    assert (len(REASONING), len(PATTERNS)) == (4, 4)


def test_a_world_without_skills_keeps_its_bytes(tmp_path: Path) -> None:
    """Skills draw from a stream of their own: all other files are the same."""
    plain = generate_world(SMALL, tmp_path / "plain")
    generate_world(WITH_SKILLS, tmp_path / "skills")
    assert plain.skills is None and not (tmp_path / "plain" / "skills.jsonl").exists()
    for name in ("sft.jsonl", "preference.jsonl", "rlvr.jsonl", "eval_arithmetic.jsonl"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "skills" / name).read_bytes()
    assert "skills" not in WorldConfig().model_dump(exclude_none=True)
