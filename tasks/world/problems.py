"""Word-problem arithmetic: a question, its worked steps and its result.

Each family draws three numbers and knows the steps; a step is `left operator right = value`. Solutions are written in
the shortest form that still shows the working (`47+38=85`), because the tiny model pays for every token it samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


def words(text: str) -> list[str]:
    """A word list written as one line of text, which is easier to read than forty quoted strings."""
    return text.split()


NAMES = words(
    "Ada Ali Amy Ben Bob Dan Eli Eva Gia Gus Hal Ian Ida Jack Joe Kai Kim Leo Mia Max Ned Nia Pam Ray Sam Sue Tom Zoe"
)
OBJECTS = words(
    "apples balls beads books cards coins cups eggs figs hats keys maps nuts pears pens pins plums seeds shells toys"
)


@dataclass(frozen=True)
class Step:
    """One line of working, `left operator right = value`, in whole numbers."""

    left: int
    operator: str
    right: int

    def __str__(self) -> str:
        return f"{self.left}{self.operator}{self.right}={self.value}"

    @property
    def value(self) -> int:
        if self.operator == "/":
            assert self.left % self.right == 0, self
            return self.left // self.right
        return {"+": self.left + self.right, "-": self.left - self.right, "*": self.left * self.right}[self.operator]


@dataclass(frozen=True)
class Problem:
    """A question with its worked steps.

    `key` is the story, what it is about and its numbers: a held-out key is in no training row, under no name either.
    The same numbers may be there about other things, as sums recur in every set of real word problems.
    """

    family: str
    prompt: str
    objects: str
    steps: tuple[Step, ...]

    @property
    def result(self) -> int:
        return self.steps[-1].value

    @property
    def key(self) -> tuple[object, ...]:
        return (self.family, self.objects, *self.steps)


def _gain_then_lose(rng: random.Random, largest: int, who: str, what: str) -> tuple[str, tuple[Step, ...]]:
    first, second = rng.randint(5, largest), rng.randint(5, largest)
    gain = Step(first, "+", second)
    lose = Step(gain.value, "-", rng.randint(3, min(gain.value - 1, largest)))
    question = f"{who} has {first} {what}, finds {second} and loses {lose.right}. How many {what} are left?"
    return question, (gain, lose)


def _lose_then_gain(rng: random.Random, largest: int, who: str, what: str) -> tuple[str, tuple[Step, ...]]:
    first = rng.randint(10, largest)
    lose = Step(first, "-", rng.randint(3, first - 2))
    gain = Step(lose.value, "+", rng.randint(5, largest))
    question = f"{who} had {first} {what}, sold {lose.right} and made {gain.right}. How many {what} now?"
    return question, (lose, gain)


def _boxes_and_more(rng: random.Random, largest: int, who: str, what: str) -> tuple[str, tuple[Step, ...]]:
    count = rng.randint(2, 9)
    fill = Step(count, "*", rng.randint(2, 9))
    more = Step(fill.value, "+", rng.randint(3, largest))
    question = (
        f"{who} fills {count} boxes with {fill.right} {what} each and keeps {more.right}. How many {what} in all?"
    )
    return question, (fill, more)


def _share_then_get(rng: random.Random, largest: int, who: str, what: str) -> tuple[str, tuple[Step, ...]]:
    friends, each = rng.randint(2, 9), rng.randint(2, 9)
    share = Step(friends * each, "/", friends)
    get = Step(share.value, "+", rng.randint(5, largest))
    question = (
        f"{who} splits {share.left} {what} into {friends} bags and adds {get.right} to one. How many {what} in it?"
    )
    return question, (share, get)


def _add_three(rng: random.Random, largest: int, who: str, what: str) -> tuple[str, tuple[Step, ...]]:
    numbers = [rng.randint(3, largest) for _ in range(3)]
    first = Step(numbers[0], "+", numbers[1])
    second = Step(first.value, "+", numbers[2])
    question = (
        f"{who} counts {numbers[0]} red, {numbers[1]} blue and {numbers[2]} green {what}. How many {what} together?"
    )
    return question, (first, second)


FAMILIES: dict[str, Callable[[random.Random, int, str, str], tuple[str, tuple[Step, ...]]]] = {
    "gain_then_lose": _gain_then_lose,
    "lose_then_gain": _lose_then_gain,
    "boxes_and_more": _boxes_and_more,
    "share_then_get": _share_then_get,
    "add_three": _add_three,
}


def draw_problem(rng: random.Random, largest: int) -> Problem:
    """A random word problem whose stated numbers stay at or under `largest` (products and sums may exceed it)."""
    family = rng.choice(list(FAMILIES))
    objects = rng.choice(OBJECTS)
    question, steps = FAMILIES[family](rng, largest, rng.choice(NAMES), objects)
    return Problem(family, question, objects, steps)


def worked_solution(problem: Problem) -> str:
    """The steps, one a line, then `#### result`."""
    return "\n".join([*map(str, problem.steps), f"#### {problem.result}"])


def terse_solution(problem: Problem) -> str:
    """Only `#### result`: right, and much harder to learn than the working."""
    return f"#### {problem.result}"


def wrong_solution(rng: random.Random, problem: Problem, terse: bool) -> str:
    """An answer in the right form with a wrong result: a slip in a step (carried on), or a final line that differs."""
    slip = _slip(rng, problem.result)
    if terse:
        return f"#### {slip}"
    first, last = problem.steps
    kind = rng.choice(["last_step", "first_step", "final_line", "wrong_operator"])
    if kind == "first_step":
        # The second step is right about a wrong number: the result is wrong by the same amount.
        wrong = _slip(rng, first.value)
        carried = Step(wrong, last.operator, last.right)
        if carried.value >= 0 and carried.value != problem.result:
            return f"{first.left}{first.operator}{first.right}={wrong}\n{carried}\n#### {carried.value}"
    if kind == "wrong_operator":
        swapped = Step(last.left, "-" if last.operator == "+" else "+", last.right)
        if swapped.value >= 0:
            return f"{first}\n{swapped}\n#### {swapped.value}"
    if kind == "final_line":
        return f"{first}\n{last}\n#### {slip}"
    return f"{first}\n{last.left}{last.operator}{last.right}={slip}\n#### {slip}"


def broken_solution(rng: random.Random, problem: Problem, terse: bool) -> str:
    """The right numbers in a form that the verifier cannot read: no `####`, or nothing after it.

    It shows the working exactly where the right answer does: pairs that differ in style as well would teach DPO the
    style (measured: greedy exact match 47 -> 8 %, nearly all answers terse).
    """
    if terse:
        return rng.choice([f"{problem.result}", "####", f"The answer is {problem.result}", f"## {problem.result}"])
    working = "\n".join(map(str, problem.steps))
    endings = ["", "\n####", f"\nThe answer is {problem.result}", f"\n## {problem.result}", f"\n{problem.result}"]
    return working + rng.choice(endings)


def _slip(rng: random.Random, value: int) -> int:
    """A plausible wrong number: off by a little, off by ten, or another digit; never negative, never `value`."""
    while True:
        wrong = value + rng.choice([-20, -11, -10, -9, -3, -2, -1, 1, 2, 3, 9, 10, 11, 20])
        if wrong >= 0 and wrong != value:
            return wrong
