"""Instructions with a constraint that code can check ("in upper case", "end with ...", "exactly three items").

`ground_truth` is what `tasks.verifiers.verify("constraint", ...)` reads. Each instruction also asks for certain words,
so that an empty or off-topic text never passes.

An answer copies two words of its prompt, which a model of a million parameters learns late or never unless it is easy.
So each of the two stands after a word that is always the same ("the bear that is bad", not "the bad bear"), and the
subject ends the prompt, so that a word and its copy are equally far apart in most rows (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from smoltulu.tasks.world.problems import NAMES, words

ADJECTIVES = words(
    "bad big blue bold calm cold dark fair fast fine good gray kind late loud new nice odd old pink poor red shy slow "
    "soft tall thin warm wild wise"
)
NOUNS = words(
    "ant ape bat bear bee bird boy bull cat cow crab crow deer dog duck eel elf fish fly fox frog girl goat hen horse "
    "king lamb lion man mole mouse owl ox pig ram rat seal swan toad wolf"
)
VERBS = words("runs sits naps eats sings waits")
ENDINGS = words("bravo hello amen cheers please thanks today always")
STARTS = words("Well Yes Look Listen Today Once Maybe Here")
CATEGORIES = {
    "fruits": words("apple pear plum fig lemon peach grape mango melon cherry"),
    "colors": words("red blue green white black pink gold gray brown orange"),
    "tools": words("saw drill hammer file axe knife rake spade wrench level"),
    "drinks": words("tea milk water juice coffee cocoa cider soda punch broth"),
}
COUNT_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}
WORD_COUNTS = {6: "six", 7: "seven", 8: "eight"}
KINDS = ("upper_case", "ends_with", "starts_with", "items", "word_count")


@dataclass(frozen=True)
class Instruction:
    """A prompt, one right answer, and the checkable constraint as the verifier's JSON."""

    kind: str
    prompt: str
    answer: str
    ground_truth: str
    key: tuple[str, ...]  # what must not be shared by training and held-out prompts


def draw_instruction(rng: random.Random) -> Instruction:
    """A random instruction with a right answer to it."""
    kind = rng.choice(KINDS)
    if kind == "items":
        return _items(rng)
    adjective, noun = rng.choice(ADJECTIVES), rng.choice(NOUNS)
    about = subject(adjective, noun)
    sentence = f"{about} {rng.choice(VERBS)}"
    constraint: dict[str, object] = {"kind": kind, "mention": [adjective, noun]}
    if kind == "upper_case":
        prompt, answer = f"In upper case, write about {about}.", sentence.upper()
    elif kind == "ends_with":
        constraint["text"] = rng.choice(ENDINGS)
        prompt = f"End with {constraint['text']} and write about {about}."
        answer = f"{sentence} {constraint['text']}"
    elif kind == "starts_with":
        constraint["text"] = rng.choice(STARTS)
        prompt = f"Start with {constraint['text']} and write about {about}."
        answer = f"{constraint['text']} {sentence}"
    else:
        count = rng.choice(list(WORD_COUNTS))
        constraint["count"] = count
        prompt = f"In exactly {WORD_COUNTS[count]} words, write about {about}."
        answer = sentence + {6: "", 7: " now", 8: " right now"}[count]
    return Instruction(kind, prompt, answer, _canonical(constraint), ("about", adjective, noun))


def subject(adjective: str, noun: str) -> str:
    """What an instruction is about: each word that has to be copied stands after a word that never changes."""
    return f"the {noun} that is {adjective}"


def bullets(items: list[str]) -> str:
    """One item a line, in the order of the alphabet: an order makes it plain which items are still to come."""
    return "\n".join(f"- {item}" for item in sorted(items))


def _items(rng: random.Random) -> Instruction:
    name, category, count = rng.choice(NAMES), rng.choice(list(CATEGORIES)), rng.choice(list(COUNT_WORDS))
    items = rng.sample(CATEGORIES[category], count)
    return Instruction(
        "items",
        f"Give {name} a list of exactly {COUNT_WORDS[count]} {category}.",
        bullets(items),
        _canonical({"kind": "items", "count": count, "among": CATEGORIES[category]}),
        ("items", name, category, str(count)),
    )


def violating_answer(rng: random.Random, instruction: Instruction) -> str:
    """An answer on the topic, in the right form, that breaks the constraint."""
    constraint = json.loads(instruction.ground_truth)
    answer = instruction.answer
    if instruction.kind == "upper_case":
        return rng.choice([answer.lower(), answer.capitalize(), answer.title()])
    if instruction.kind == "ends_with":
        other = rng.choice([word for word in ENDINGS if word != constraint["text"]])
        return answer.removesuffix(constraint["text"]) + rng.choice(["now", other])
    if instruction.kind == "starts_with":
        other = rng.choice([word for word in STARTS if word != constraint["text"]])
        rest = answer.removeprefix(constraint["text"] + " ")
        return rng.choice([rest, f"{other} {rest}"])
    if instruction.kind == "word_count":
        words = answer.split()
        return " ".join(words[:-1]) if len(words) > 6 and rng.random() < 0.5 else answer + " and more"
    items = [line.removeprefix("- ") for line in answer.split("\n")]
    if rng.random() < 0.5 and len(items) > 2:
        return bullets(items[:-1])
    spare = [item for item in constraint["among"] if item not in items]
    return bullets([*items, rng.choice(spare)])


def _canonical(constraint: dict[str, object]) -> str:
    return json.dumps(constraint, sort_keys=True, separators=(",", ":"))
