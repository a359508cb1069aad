"""Plain text for pre-training: small stories, sums and word lists, in the words that the conversations will use.

No conversations: the base model learns words and numbers, and nothing of the answer's form (`####` is only a heading
here). Sentences come twice, the second time after a word, before one, or in upper case: so it learns to copy.
"""

from __future__ import annotations

import random

from smoltulu.tasks.world.constraints import (
    ADJECTIVES,
    CATEGORIES,
    COUNT_WORDS,
    ENDINGS,
    NOUNS,
    STARTS,
    VERBS,
    bullets,
    subject,
)
from smoltulu.tasks.world.problems import NAMES, OBJECTS, draw_problem


def draw_plain_text(rng: random.Random, largest: int) -> str:
    """One text of a few lines, some under a heading."""
    lines = [rng.choice(_WRITERS)(rng, largest) for _ in range(4)]
    if rng.random() < 0.3:
        lines.insert(0, f"#### {rng.choice(OBJECTS)}")
    return "\n".join(lines)


def _sums(rng: random.Random, largest: int) -> str:
    return "\n".join(map(str, draw_problem(rng, largest).steps))


def _story(rng: random.Random, largest: int) -> str:
    who, what = rng.choice(NAMES), rng.choice(OBJECTS)
    first, second = sorted((rng.randint(3, largest), rng.randint(3, largest)), reverse=True)
    return rng.choice(
        (
            f"{who} has {first} {what} and finds {second}: {first}+{second}={first + second}.",
            f"{who} had {first} {what} and sold {second}: {first}-{second}={first - second}.",
            f"{who} counts {first} red and {second} blue {what}: {first}+{second}={first + second}.",
        )
    )


def _boxes(rng: random.Random, largest: int) -> str:
    who, what = rng.choice(NAMES), rng.choice(OBJECTS)
    count, each = rng.randint(2, 9), rng.randint(2, 9)
    return rng.choice(
        (
            f"{who} fills {count} boxes with {each} {what} each: {count}*{each}={count * each}.",
            f"{who} splits {count * each} {what} into {count} bags: {count * each}/{count}={each}.",
        )
    )


def _sentence(rng: random.Random, largest: int) -> str:
    text = f"{subject(rng.choice(ADJECTIVES), rng.choice(NOUNS))} {rng.choice(VERBS)} right now"
    beside = rng.choice((f"{rng.choice(STARTS)} {text}", f"{text} {rng.choice(ENDINGS)}"))
    again = text.upper() if rng.random() < 0.5 else beside
    return f"{text}\n{again}"


def _list(rng: random.Random, largest: int) -> str:
    category = rng.choice(list(CATEGORIES))
    items = rng.sample(CATEGORIES[category], rng.choice(list(COUNT_WORDS)))
    return f"{COUNT_WORDS[len(items)]} {category}:\n{bullets(items)}"


def _talk(rng: random.Random, largest: int) -> str:
    who, what = rng.choice(NAMES), rng.choice(OBJECTS)
    about = subject(rng.choice(ADJECTIVES), rng.choice(NOUNS))
    return rng.choice(
        (
            f"How many {what} are left? How many in all? {who} made green {what} and loses one.",
            f"How many {what} now? How many together? {who} keeps each bag and adds to it.",
            f"In upper case, write about {about}. Start with {rng.choice(STARTS)} and end with {rng.choice(ENDINGS)}.",
            f"Give {who} a list of exactly six, seven or eight words. End with now and write about {what}.",
        )
    )


# Numbers come most often: they are what a word problem is made of.
_WRITERS = (_sums, _sums, _story, _story, _boxes, _sentence, _sentence, _list, _talk)
