"""Lookups: a JSON object of random keys with values of words, and lines that ask for some of them again.

Only a reader who copies can answer them. Probes of a selector model are lookups (tasks/selection/probes.py), and a
model that is to copy learns from them (`draw_copying_text`).
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from typing import NamedTuple

INSTRUCTION = (
    "Please extract the value corresponding to the specified key from the following JSON object. Output only the value "
    "of the corresponding key and nothing else. The JSON data is as follows:"
)
#: A value is one word of each list: an adjective, an animal, a thing.
WORD_LISTS: tuple[tuple[str, ...], ...] = tuple(
    tuple(words.split())
    for words in (
        "red blue green white black pink gold gray brown orange big old new cold warm soft tall kind wild wise",
        "bear bird bull cat cow crab crow deer dog duck fish fox frog goat hen horse lion mouse owl pig",
        "apple bag boat book box car cup door hat key lamp map milk pen ring ship shoe table tea wheel",
    )
)
_ALPHABET = string.ascii_letters + string.digits
_WORDS = tuple(word for words in WORD_LISTS for word in words)


class Pair(NamedTuple):
    """A key and its value."""

    key: str
    value: str


def most_keys(key_length: int) -> int:
    """How many different keys there are."""
    return len(_ALPHABET) ** key_length


def draw_pairs(rng: random.Random, count: int, key_length: int, num_words: int = len(WORD_LISTS)) -> list[Pair]:
    """`count` pairs with different keys, and values of one word from each of the first `num_words` lists. In any first
    n of them no word is more than once oftener than another of its list."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys["".join(rng.choices(_ALPHABET, k=key_length))] = None
    columns = []
    for words in WORD_LISTS[:num_words]:
        column: list[str] = []
        while len(column) < count:
            column += rng.sample(words, len(words))
        columns.append(column[:count])
    return [Pair(key, " ".join(words)) for key, *words in zip(keys, *columns, strict=True)]


def as_object(pairs: Sequence[Pair]) -> str:
    """The pairs as one JSON object."""
    return json.dumps(dict(pairs))


def as_line(pair: Pair) -> str:
    """A question with its answer: as the object has it, so that the same text has the same tokens in both places."""
    return f'"{pair.key}": "{pair.value}"'


def draw_copying_text(rng: random.Random) -> str:
    """A text that can be foretold by copying alone: an object and lines of it, or words and signs said again.

    Short keys and values are easier to find again, and long ones are learned after them.
    """
    key_length = rng.randint(1, 5)
    if rng.random() < 0.5:
        pieces = [_piece(rng, key_length) for _ in range(rng.randint(3, 12))]
        return "\n".join([" ".join(pieces)] * rng.randint(2, 4))
    pairs = draw_pairs(rng, rng.randint(2, 8), key_length, rng.randint(1, len(WORD_LISTS)))
    head = f"{INSTRUCTION}\n" if rng.random() < 0.1 else ""
    lines = [as_line(rng.choice(pairs)) for _ in range(rng.randint(len(pairs), 2 * len(pairs)))]
    return "\n".join([head + as_object(pairs), *lines])


def _piece(rng: random.Random, key_length: int) -> str:
    return rng.choice(_WORDS) if rng.random() < 0.5 else "".join(rng.choices(_ALPHABET, k=key_length))
