"""The tiny world: the same bytes from the same seed, planted leaks and no others, right answers right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from smoltulu.schemas.common import scientific
from smoltulu.schemas.world import WorldConfig, WorldOutputs
from smoltulu.tasks.verifiers import verify
from smoltulu.tasks.world import pretrain
from smoltulu.tasks.world.constraints import KINDS, draw_instruction
from smoltulu.tasks.world.generate import generate_world, terms_of

SMALL = WorldConfig(
    num_pretrain=50,
    num_sft=1500,
    num_preference=600,
    num_rlvr=600,
    num_eval_arithmetic=120,
    num_eval_instructions=60,
    num_eval_verified=200,
    num_preference_eval=150,
    planted_sft=20,
    planted_preference=10,
    planted_rlvr=10,
)
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, WorldOutputs]:
    folder = tmp_path_factory.mktemp("world")
    return folder, generate_world(SMALL, folder)


def rows(world: tuple[Path, WorldOutputs], name: str) -> Rows:
    folder, outputs = world
    lines = (folder / getattr(outputs, name)).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def held_out_questions(world: tuple[Path, WorldOutputs]) -> dict[str, list[str]]:
    return {
        "eval_arithmetic": [row["question"] for row in rows(world, "eval_arithmetic")],
        "eval_instructions": [row["prompt"] for row in rows(world, "eval_instructions")],
        "eval_verified": [row["messages"][0]["content"] for row in rows(world, "eval_verified")],
    }


def user_turns(row: dict[str, Any]) -> list[str]:
    return [turn["content"] for turn in row.get("messages") or row["prompt"] if turn["role"] == "user"]


def run_of(text: str) -> str:
    """Terms with a bar around each: terms hold no bar here, so substring of runs = consecutive run of terms."""
    return "|" + "|".join(terms_of(text)) + "|"


def test_same_seed_same_bytes(world: tuple[Path, WorldOutputs], tmp_path: Path) -> None:
    again = generate_world(SMALL, tmp_path)
    assert again == world[1]
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == sorted(file.name for file in world[0].iterdir()) and len(names) == 9
    assert all((tmp_path / name).read_bytes() == (world[0] / name).read_bytes() for name in names)


def test_another_seed_is_another_world(world: tuple[Path, WorldOutputs], tmp_path: Path) -> None:
    generate_world(SMALL.model_copy(update={"seed": 1}), tmp_path)
    assert (tmp_path / "sft.jsonl").read_bytes() != (world[0] / "sft.jsonl").read_bytes()


def test_sizes_are_as_asked(world: tuple[Path, WorldOutputs]) -> None:
    for name, count in world[1].num_rows.items():
        assert len(rows(world, name)) == count == getattr(SMALL, f"num_{name}")
    assert world[1].num_planted == {"sft": 20, "preference": 10, "rlvr": 10}


def test_full_match_finds_exactly_the_planted_leaks(world: tuple[Path, WorldOutputs]) -> None:
    truth = json.loads((world[0] / world[1].planted_leaks).read_text())
    questions = {name: [run_of(text) for text in texts] for name, texts in held_out_questions(world).items()}
    for name in ("sft", "preference", "rlvr"):
        hit_rows: set[int] = set()
        per_set = dict.fromkeys(questions, 0)
        for index, row in enumerate(rows(world, name)):
            turns = [run_of(turn) for turn in user_turns(row)]
            for evaluation, asked in questions.items():
                if any(question in turn for turn in turns for question in asked):
                    hit_rows.add(index)
                    per_set[evaluation] += 1
        assert sorted(hit_rows) == truth[name]["rows"] and len(hit_rows) == getattr(SMALL, f"planted_{name}")
        assert per_set == truth[name]["per_evaluation_set"]


def test_held_out_questions_are_all_different(world: tuple[Path, WorldOutputs]) -> None:
    asked = [terms_of(text) for texts in held_out_questions(world).values() for text in texts]
    asked += [terms_of(row["prompt"][0]["content"]) for row in rows(world, "preference_eval")]
    assert len(set(asked)) == len(asked)
    trained = {terms_of(turn) for row in rows(world, "preference") for turn in user_turns(row)}
    assert not trained & {terms_of(row["prompt"][0]["content"]) for row in rows(world, "preference_eval")}


def test_right_answers_pass_and_rejected_ones_fail() -> None:
    """Every task of the world, straight from the generators that write the rows."""
    import random

    from smoltulu.flows.recipe import load_recipe
    from smoltulu.tasks.world.generate import _draw_task, _preference_row, _rlvr_row, _sft_row

    rng = random.Random(0)
    (source,) = load_recipe("tiny").data.rlvr.sources
    verifiers = source.verifiers  # `####` is part of the task: rejected answers may be the right number without it
    for _ in range(3_000):
        task = _draw_task(rng, SMALL)
        prompt = task.prompt
        row = _rlvr_row(rng, SMALL, task, prompt)
        row["verifier"] = verifiers.get(row["verifier"], row["verifier"])
        pair = _preference_row(rng, SMALL, task, prompt)
        answer = _sft_row(rng, SMALL, task, prompt)["messages"][-1]["content"]
        assert verify(row["verifier"], answer, row["ground_truth"]) == 1.0, (prompt, answer)
        assert verify(row["verifier"], pair["chosen"][0]["content"], row["ground_truth"]) == 1.0, pair
        assert verify(row["verifier"], pair["rejected"][0]["content"], row["ground_truth"]) == 0.0, pair


def test_words_to_copy_stand_after_constant_words_and_last_in_the_prompt() -> None:
    """The form that the model learns to copy from; a form that names the subject early was hardly learned."""
    import random

    rng = random.Random(0)
    seen = set()
    for _ in range(300):
        instruction = draw_instruction(rng)
        seen.add(instruction.kind)
        if instruction.kind == "items":
            names = instruction.answer.split("\n")
            assert names == sorted(names), instruction
            continue
        adjective, noun = json.loads(instruction.ground_truth)["mention"]
        about = f"the {noun} that is {adjective}"
        assert instruction.prompt.endswith(f" write about {about}."), instruction
        assert about in instruction.answer.lower(), instruction
    assert seen == set(KINDS)


def test_no_training_prompt_shares_a_pair_of_words_with_a_held_out_one(world: tuple[Path, WorldOutputs]) -> None:
    def pairs(rows: Rows) -> set[tuple[str, ...]]:
        texts = ([row["prompt"]] if isinstance(row.get("prompt"), str) else user_turns(row) for row in rows)
        prompts = [prompt for row_texts in texts for prompt in row_texts]
        return {tuple(found.groups()) for prompt in prompts if (found := re.search(r"the (\w+) that is (\w+)", prompt))}

    held_out = set().union(
        *(pairs(rows(world, name)) for name in ("eval_instructions", "eval_verified", "preference_eval"))
    )
    planted = json.loads((world[0] / world[1].planted_leaks).read_text())
    for name in ("sft", "preference", "rlvr"):
        unplanted = [row for number, row in enumerate(rows(world, name)) if number not in planted[name]["rows"]]
        trained = pairs(unplanted)
        assert len(trained) > 50 and not trained & held_out


def test_sentences_of_pre_training_come_twice() -> None:
    """In upper case, after a word or before one: what an instruction asks for, without its prompt."""
    import random

    rng = random.Random(0)
    for _ in range(200):
        first, second = pretrain._sentence(rng, 12).split("\n")
        assert second == first.upper() or second.endswith(f" {first}") or second.startswith(f"{first} ")


def test_gold_answers_of_the_held_out_problems_pass(world: tuple[Path, WorldOutputs]) -> None:
    for row in rows(world, "eval_arithmetic"):
        assert verify("gsm8k", row["answer"], row["answer"]) == 1.0
        left, _, result = row["answer"].splitlines()[1].partition("=")
        assert eval(left) == int(result) == int(row["answer"].rpartition("####")[2])
    for row in rows(world, "eval_instructions") + rows(world, "eval_verified"):
        assert verify(row["verifier"], "", row["ground_truth"]) == 0.0  # gradable, and empty text never passes


def test_impossible_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"planted_rlvr is 10, but world.num_rlvr is only 5"):
        generate_world(SMALL.model_copy(update={"num_rlvr": 5}), tmp_path)
    with pytest.raises(ValueError, match=r"too small for .* held-out rows"):
        generate_world(SMALL.model_copy(update={"num_eval_instructions": 3_000}), tmp_path)
    with pytest.raises(ValidationError):
        WorldConfig(num_sft=0)


def test_every_field_is_science() -> None:
    assert set(scientific(SMALL)) == set(WorldConfig.model_fields) - {"skills"}  # absent where it is not set
