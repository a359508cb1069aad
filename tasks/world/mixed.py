"""A mix of which a part is useless: conversations of a skill, and copies of them whose answers are those of others.

It is what the sweep `selection-tiny` selects from. A useless copy has the prompts of a useful row, as many turns, and
answers of the same skill, each to another question: in length, words and form it is like the others, and nothing in it
says that it is useless. Whoever learns from it learns that an answer has nothing to do with its question.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from smoltulu.schemas.world import MixedSettings
from smoltulu.tasks.world.skills import Question

Row = dict[str, Any]


def mixed_rows(rng: random.Random, settings: MixedSettings, draw: Callable[[], Question]) -> tuple[list[Row], set[int]]:
    """Rows of one skill in a random order, and the numbers of those that are useless.

    draw  a question of the skill that is not held out
    """
    num_useless = round(settings.num_rows * settings.useless_share)
    useful = [_conversation(rng, settings, draw) for _ in range(settings.num_rows - num_useless)]
    copies = [
        [(question, _another_answer(question, draw)) for question, _ in useful[number % len(useful)]]
        for number in range(num_useless)
    ]
    both = [(turns, False) for turns in useful] + [(turns, True) for turns in copies]
    rng.shuffle(both)
    rows = [_row([(question.prompt, answer) for question, answer in turns]) for turns, _ in both]
    return rows, {number for number, (_, is_useless) in enumerate(both) if is_useless}


def target_rows(rng: random.Random, settings: MixedSettings, draw: Callable[[], Question]) -> list[Row]:
    """Useful rows of one skill, drawn apart from the mix: what RDS+ compares rows with. No benchmark's."""
    conversations = [_conversation(rng, settings, draw) for _ in range(settings.num_targets)]
    return [_row([(question.prompt, answer) for question, answer in turns]) for turns in conversations]


def _conversation(
    rng: random.Random, settings: MixedSettings, draw: Callable[[], Question]
) -> list[tuple[Question, str]]:
    questions = [draw() for _ in range(rng.randint(1, settings.max_turns))]
    return [(question, question.answer) for question in questions]


def _another_answer(question: Question, draw: Callable[[], Question]) -> str:
    while (answer := draw().answer) == question.answer:
        pass
    return answer


def _row(turns: list[tuple[str, str]]) -> Row:
    messages = []
    for prompt, answer in turns:
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages}
