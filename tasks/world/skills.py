"""Eight skills with short answers that are told exactly: four that reason, four that follow a pattern.

They are what the sweep `surface-tiny` measures. A held-out question is in no conversation and in no plain text. What a
skill needs besides (digits, the two cases of a word, which word follows which) is in both.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from smoltulu.tasks.world.constraints import NOUNS
from smoltulu.tasks.world.problems import NAMES, words

_LARGEST = 99
_MODULI = (2, 3, 4, 5)  # with these there are 360 questions
_NOUNS = NOUNS[:24]
_GIFTS = words("book cake card drum hat kite lamp mug pen ring rose toy")


@dataclass(frozen=True)
class Question:
    """A prompt with its one right answer."""

    skill: str
    prompt: str
    answer: str

    @property
    def key(self) -> tuple[str, str]:
        return self.skill, self.prompt

    @property
    def plain(self) -> str:
        """As plain text has it. As many tokens are between prompt and answer as in a conversation."""
        return f"Q\n{self.prompt}\nA\n{self.answer}"


def _arithmetic(rng: random.Random) -> tuple[str, str]:
    """Three terms from left to right; no sum on the way is below 0."""
    while True:
        first, second, third = (rng.randint(1, 9) for _ in range(3))
        signs = rng.choice("+-"), rng.choice("+-")
        between = first + second if signs[0] == "+" else first - second
        value = between + third if signs[1] == "+" else between - third
        if min(between, value) >= 0:
            term = f"{first}{signs[0]}{second}{signs[1]}{third}"
            return f"What is {term}?", str(value)


def _modular(rng: random.Random) -> tuple[str, str]:
    number, modulus = rng.randint(10, _LARGEST), rng.choice(_MODULI)
    return f"What is {number} mod {modulus}?", str(number % modulus)


def _comparison(rng: random.Random) -> tuple[str, str]:
    three = rng.sample(range(10, _LARGEST + 1), 3)
    listed = f"{three[0]}, {three[1]} or {three[2]}"
    return f"Which is most, {listed}?", str(max(three))


def _sorting(rng: random.Random) -> tuple[str, str]:
    digits = rng.sample(range(10), 5)
    given, sorted_ = " ".join(map(str, digits)), " ".join(map(str, sorted(digits)))
    return f"Sort {given}.", sorted_


def _copy(rng: random.Random) -> tuple[str, str]:
    text = " ".join(rng.sample(_NOUNS, 4))
    return f"Repeat: {text}", text


def _template(rng: random.Random) -> tuple[str, str]:
    name, gift, sender = rng.choice(NAMES), rng.choice(_GIFTS), rng.choice(_NOUNS)
    return f"Letter: {name}, {gift}, {sender}", f"Dear {name}, thanks for the {gift}. Yours, the {sender}"


def _letter_case(rng: random.Random) -> tuple[str, str]:
    text = " ".join(rng.sample(_NOUNS, 3))
    return f"In upper case: {text}", text.upper()


#: Which noun follows a noun, in every world.
FOLLOWER = dict(zip(_NOUNS, random.Random("bigrams").sample(_NOUNS, len(_NOUNS)), strict=True))


def _bigrams(rng: random.Random) -> tuple[str, str]:
    """The words that follow a pair of words, each the follower of the one before it."""
    chain = [rng.choice(_NOUNS), rng.choice(_NOUNS)]
    while len(chain) < 5:
        chain.append(FOLLOWER[chain[-1]])
    return f"Go on: {chain[0]} {chain[1]}", " ".join(chain[2:])


_DRAW: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "arithmetic": _arithmetic,
    "modular": _modular,
    "comparison": _comparison,
    "sorting": _sorting,
    "copy": _copy,
    "template": _template,
    "letter_case": _letter_case,
    "bigrams": _bigrams,
}
REASONING, PATTERNS = tuple(_DRAW)[:4], tuple(_DRAW)[4:]
#: In the order of the files.
SKILLS = REASONING + PATTERNS


def draw_question(rng: random.Random, skill: str) -> Question:
    """A random question of a skill."""
    return Question(skill, *_DRAW[skill](rng))
