"""Stage `world`: write the tiny world's data sets, held-out sets and the truth about its planted leaks.

Held-out rows are drawn first. A training prompt is then refused if it shares a held-out row's arithmetic or words, or
contains a held-out question by the contamination check's rule. So only the planted rows are leaks.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smoltulu.schemas.world import MixedSettings, SkillSettings, WorldConfig, WorldOutputs
from smoltulu.tasks.world.constraints import Instruction, draw_instruction, violating_answer
from smoltulu.tasks.world.mixed import mixed_rows, target_rows
from smoltulu.tasks.world.pretrain import draw_plain_text
from smoltulu.tasks.world.problems import (
    Problem,
    broken_solution,
    draw_problem,
    terse_solution,
    worked_solution,
    wrong_solution,
)
from smoltulu.tasks.world.skills import PATTERNS, REASONING, SKILLS, Question, draw_question

Row = dict[str, Any]
Task = Problem | Instruction

# How the reference's index analyzer cuts text into terms (contamination rule "full match").
_SEPARATORS = re.compile(r'[ ,.?!:;()"-]|\n|\\')
_ANCHOR = 3  # terms that pick the candidates of a full match; every question of this world is longer

_LEAK_FRAMES = ("{}", "{}", "Please help. {}", "{} Thank you.", "Hello! {}")
_GREETINGS = (("Hello!", "Hello! What can I do for you?"), ("Can you help me?", "Yes. What is it?"))
_TWO_TURN_SHARE = 0.03
_QUESTIONS_OF_A_TEXT = 6
#: Plain text has more of patterns than to reason about.
_PRETRAIN_SKILLS = REASONING + 2 * PATTERNS


def generate_world(config: WorldConfig, folder: Path) -> WorldOutputs:
    """Write all files of the world into `folder` (made if missing) and return their names and sizes.

    Raises:
        ValueError: more rows or leaks are asked for than the world holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    makers = {"sft": _sft_row, "preference": _preference_row, "rlvr": _rlvr_row}
    sizes = {name: (getattr(config, f"num_{name}"), getattr(config, f"planted_{name}")) for name in makers}
    for name, (total, planted) in sizes.items():
        if planted > total:
            raise ValueError(
                f"world.planted_{name} is {planted}, but world.num_{name} is only {total}: planted rows are part of "
                "the set, so ask for at most as many"
            )

    held_out = _HeldOut()
    rng = _stream(config, "held_out")
    arithmetic = held_out.draw(config.num_eval_arithmetic, lambda: draw_problem(rng, config.max_number))
    instructions = held_out.draw(config.num_eval_instructions, lambda: draw_instruction(rng))
    verified = held_out.draw(config.num_eval_verified, lambda: _draw_task(rng, config))
    preference_eval = held_out.draw(config.num_preference_eval, lambda: _draw_task(rng, config))
    evaluation_sets = {"eval_arithmetic": arithmetic, "eval_instructions": instructions, "eval_verified": verified}
    leakable = [(name, task) for name, tasks in evaluation_sets.items() for task in tasks]

    training: dict[str, list[Row]] = {}
    truth: dict[str, Row] = {}
    for name, (total, planted) in sizes.items():
        stream = _stream(config, name)
        if planted > len(leakable):
            raise ValueError(f"world.planted_{name} is {planted}, but only {len(leakable)} questions are held out")
        leaks = dict(zip(sorted(stream.sample(range(total), planted)), stream.sample(leakable, planted), strict=True))
        made: list[Row] = []
        for index in range(total):
            source, task = leaks.get(index) or (None, _draw_unseen(stream, config, held_out))
            frame = stream.choice(_LEAK_FRAMES) if source else "{}"
            made.append(makers[name](stream, config, task, frame.format(task.prompt)))
        training[name] = made
        truth[name] = {
            "rows": sorted(leaks),
            "per_evaluation_set": {
                evaluation: sum(source == evaluation for source, _ in leaks.values()) for evaluation in evaluation_sets
            },
        }

    text_rng = _stream(config, "pretrain")
    eval_rng = _stream(config, "preference_eval")
    files: dict[str, list[Row]] = {
        "pretrain": [{"text": draw_plain_text(text_rng, config.max_number)} for _ in range(config.num_pretrain)],
        **training,
        "eval_arithmetic": [{"question": task.prompt, "answer": worked_solution(task)} for task in arithmetic],
        "eval_instructions": [
            {"prompt": task.prompt, "verifier": "constraint", "ground_truth": task.ground_truth}
            for task in instructions
        ],
        "eval_verified": [_rlvr_row(eval_rng, config, task, task.prompt) for task in verified],
        "preference_eval": [_preference_row(eval_rng, config, task, task.prompt) for task in preference_eval],
    }
    names: dict[str, Any] = {}
    mixed_counts: dict[str, int] = {}
    if config.skills:
        names = {"skills": "skills.jsonl", "eval_skills": "eval_skills.jsonl"}
        files |= _skill_files(config, config.skills, files["pretrain"])
        if config.skills.mixed:
            mixed, mixed_counts = _write_mixed(config, config.skills.mixed, files["eval_skills"], folder)
            names |= mixed
    outputs = WorldOutputs(
        **names,
        num_rows={name: len(content) for name, content in files.items()} | mixed_counts,
        num_planted={name: len(truth[name]["rows"]) for name in truth},
    )
    for name, content in files.items():
        _write_rows(folder / getattr(outputs, name), content)
    (folder / outputs.planted_leaks).write_text(json.dumps(truth, indent=2) + "\n", encoding="utf-8")
    return outputs


def _skill_files(config: WorldConfig, skills: SkillSettings, plain: list[Row]) -> dict[str, list[Row]]:
    """Conversations, held-out questions, and plain texts of which some are replaced by ones about skills."""
    rng = _stream(config, "skills")
    held_out: dict[tuple[str, str], Question] = {}
    for skill in SKILLS:
        asked = len(held_out)
        while len(held_out) < asked + skills.num_eval:
            question = draw_question(rng, skill)
            held_out[question.key] = question

    def unseen(skills: tuple[str, ...]) -> Question:
        skill = rng.choice(skills)
        while (question := draw_question(rng, skill)).key in held_out:
            pass
        return question

    def conversation(question: Question) -> Row:
        return {"messages": [_turn("user", question.prompt), _turn("assistant", question.answer)]}

    return {
        "skills": [conversation(unseen(SKILLS)) for _ in range(skills.num_sft)],
        "eval_skills": [{"subset": one.skill, "prompt": one.prompt, "answer": one.answer} for one in held_out.values()],
        "pretrain": [
            {"text": "\n".join(unseen(_PRETRAIN_SKILLS).plain for _ in range(_QUESTIONS_OF_A_TEXT))}
            if rng.random() < skills.pretrain_share
            else text
            for text in plain
        ],
    }


def _write_mixed(
    config: WorldConfig, mixed: MixedSettings, held_out: list[Row], folder: Path
) -> tuple[dict[str, Any], dict[str, int]]:
    """Write rows of each skill with the useless ones among them, targets, and the truth. Returns names and sizes."""
    rng = _stream(config, "mixed")
    keys = {(row["subset"], row["prompt"]) for row in held_out}
    names: dict[str, Any] = {"mixed": {}, "targets": "targets.jsonl", "useless_rows": "useless_rows.json"}
    targets: list[Row] = []
    truth: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for skill in SKILLS:

        def draw(skill: str = skill) -> Question:
            while (question := draw_question(rng, skill)).key in keys:
                pass
            return question

        rows, useless = mixed_rows(rng, mixed, draw)
        names["mixed"][skill] = f"mixed_{skill}.jsonl"
        _write_rows(folder / names["mixed"][skill], rows)
        sizes[f"mixed_{skill}"] = len(rows)
        truth[skill] = sorted(useless)
        targets += target_rows(rng, mixed, draw)
    _write_rows(folder / names["targets"], targets)
    (folder / names["useless_rows"]).write_text(json.dumps(truth) + "\n", encoding="utf-8")
    return names, sizes | {"targets": len(targets)}


def _write_rows(file: Path, rows: list[Row]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def answer_of(rng: random.Random, config: WorldConfig, task: Task) -> str:
    """A right answer in one of the data's styles (for a word problem: with the working, or terse)."""
    if isinstance(task, Instruction):
        return task.answer
    return terse_solution(task) if rng.random() < config.terse_share else worked_solution(task)


def terms_of(text: str) -> tuple[str, ...]:
    """The terms that the contamination check's analyzer sees."""
    return tuple(term.lower() for term in _SEPARATORS.split(text) if term)


class _HeldOut:
    """What no training prompt may share: the arithmetic or words of a held-out row, and the terms of its question."""

    def __init__(self) -> None:
        self.keys: set[tuple[object, ...]] = set()
        self.phrases: dict[tuple[str, ...], list[tuple[str, ...]]] = {}

    def draw(self, count: int, draw_task: Callable[[], Any]) -> list[Any]:
        """`count` new tasks with keys and questions of their own, remembered as held out."""
        tasks: list[Any] = []
        for _ in range(200 * count):
            if len(tasks) == count:
                return tasks
            task = draw_task()
            if not self.clashes(task):
                terms = terms_of(task.prompt)
                assert len(terms) >= _ANCHOR, task
                self.keys.add(task.key)
                self.phrases.setdefault(terms[:_ANCHOR], []).append(terms)
                tasks.append(task)
        raise ValueError(
            f"the world is too small for {count} more held-out rows (found {len(tasks)}): "
            "lower world.num_eval_* or raise world.max_number"
        )

    def clashes(self, task: Task) -> bool:
        """True if `task` is held out: same key, or its prompt contains a held-out question."""
        if task.key in self.keys:
            return True
        terms = terms_of(task.prompt)
        return any(
            terms[start : start + len(phrase)] == phrase
            for start in range(len(terms) - _ANCHOR + 1)
            for phrase in self.phrases.get(terms[start : start + _ANCHOR], ())
        )


def _draw_task(rng: random.Random, config: WorldConfig) -> Task:
    if rng.random() < config.arithmetic_share:
        return draw_problem(rng, config.max_number)
    return draw_instruction(rng)


def _draw_unseen(rng: random.Random, config: WorldConfig, held_out: _HeldOut) -> Task:
    for _ in range(10_000):
        task = _draw_task(rng, config)
        if not held_out.clashes(task):
            return task
    raise ValueError("nearly the whole world is held out: lower world.num_eval_* or raise world.max_number")


def _sft_row(rng: random.Random, config: WorldConfig, task: Task, prompt: str) -> Row:
    """A conversation; a few have a greeting first, so that a leak or an answer may sit in a second turn."""
    messages = [_turn("user", prompt), _turn("assistant", answer_of(rng, config, task))]
    if rng.random() < _TWO_TURN_SHARE:
        greeting, reply = rng.choice(_GREETINGS)
        messages = [_turn("user", greeting), _turn("assistant", reply), *messages]
    return {"messages": messages}


def _preference_row(rng: random.Random, config: WorldConfig, task: Task, prompt: str) -> Row:
    """A right answer against one with a wrong result, a broken format or a violated constraint."""
    chosen = answer_of(rng, config, task)
    if isinstance(task, Instruction):
        rejected = violating_answer(rng, task)
    else:
        make_worse = wrong_solution if rng.random() < 0.5 else broken_solution
        rejected = make_worse(rng, task, terse=chosen == terse_solution(task))
    return {
        "prompt": [_turn("user", prompt)],
        "chosen": [_turn("assistant", chosen)],
        "rejected": [_turn("assistant", rejected)],
    }


def _rlvr_row(rng: random.Random, config: WorldConfig, task: Task, prompt: str) -> Row:
    if isinstance(task, Problem):
        return {"messages": [_turn("user", prompt)], "verifier": "gsm8k", "ground_truth": str(task.result)}
    return {"messages": [_turn("user", prompt)], "verifier": "constraint", "ground_truth": task.ground_truth}


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _stream(config: WorldConfig, name: str) -> random.Random:
    """A random stream of its own per set, so that another size of one set leaves the others as they are.

    A string seed is hashed with SHA-512 by `random`, so it does not depend on the process or the machine.
    """
    return random.Random(f"{config.seed}/{name}")
