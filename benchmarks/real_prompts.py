"""Short requests with one constraint each, made from a seed: what `benchmarks/real_rlvr.py` trains and evaluates on.

A kind is one of the 25 functions of the verifier `ifeval`. Training has kinds of its own, and so have the topics.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
#: Draws the arguments of a constraint for a topic: (the request, how it is to be kept, arguments of the function).
Maker = Callable[[random.Random, str], tuple[str, str, dict[str, Any]]]

TOPICS = (
    "apples", "autumn", "baking bread", "basketball", "bees", "bicycles", "birds", "boats", "books", "breakfast",
    "bridges", "butterflies", "cameras", "camping", "carrots", "castles", "cats", "chairs", "cheese", "chess",
    "clocks", "clouds", "coffee", "cooking", "cows", "dancing", "deserts", "dogs", "dreams", "elephants",
    "farms", "fishing", "flowers", "football", "forests", "friendship", "frogs", "gardens", "glass", "gold",
    "guitars", "hats", "holidays", "honey", "horses", "ice cream", "islands", "jazz", "kites", "lakes",
    "lemons", "libraries", "lighthouses", "lions", "maps", "markets", "mice", "milk", "mirrors", "mountains",
    "museums", "music", "oceans", "onions", "owls", "painting", "pancakes", "paper", "parks", "penguins",
    "pianos", "pizza", "planets", "poems", "potatoes", "rabbits", "rain", "rice", "rivers", "robots",
    "roses", "running", "sailing", "salt", "schools", "sheep", "ships", "shoes", "silence", "singing",
    "sleep", "snow", "soup", "spiders", "spring", "stars", "summer", "swimming", "tea", "teachers",
    "tigers", "tomatoes", "towers", "trains", "trees", "turtles", "umbrellas", "villages", "violins", "volcanoes",
    "walking", "water", "whales", "wind", "windows", "winter", "wolves", "wood", "wool", "zebras",
)  # fmt: skip
REQUESTS = (
    "Write about {}.",
    "Tell me about {}.",
    "Describe {}.",
    "Say something about {}.",
    "What do you know about {}?",
)
WORDS = ("blue", "family", "happy", "light", "morning", "old", "people", "quiet", "small", "world")
OPENINGS = ("Clearly", "Honestly", "Many", "Perhaps", "Sometimes", "Today", "Usually", "Well")
COMMON_WORDS = ("a", "and", "are", "in", "is", "of", "the", "to")


def _plain(how: str, **arguments: Any) -> Maker:
    """A kind whose constraint is always the same."""
    return lambda draw, topic: (draw.choice(REQUESTS).format(topic), how, arguments)


def _with(make: Callable[[random.Random], tuple[str, dict[str, Any]]]) -> Maker:
    """A kind whose constraint is drawn."""
    return lambda draw, topic: (draw.choice(REQUESTS).format(topic), *make(draw))


def _keywords(draw: random.Random) -> tuple[str, dict[str, Any]]:
    word = draw.choice(WORDS)
    return f'Use the word "{word}" in your answer.', {"keyword_list": [word]}


def _keyword_frequency(draw: random.Random) -> tuple[str, dict[str, Any]]:
    word = draw.choice(WORDS)
    return f'Use the word "{word}" exactly once.', {"word": word, "N": 1}


def _forbidden_words(draw: random.Random) -> tuple[str, dict[str, Any]]:
    word = draw.choice(COMMON_WORDS)
    return f'Do not use the word "{word}".', {"forbidden_words": [word]}


def _letter_frequency(draw: random.Random) -> tuple[str, dict[str, Any]]:
    letter = draw.choice("bfkvwy")
    return f'Use the letter "{letter}" exactly twice.', {"letter": letter, "N": 2}


def _word_constraint(draw: random.Random) -> tuple[str, dict[str, Any]]:
    num = draw.randint(8, 14)
    return f"Use at most {num} words.", {"N": num, "quantifier": "at most"}


def _sentence_constraint(draw: random.Random) -> tuple[str, dict[str, Any]]:
    num = draw.randint(2, 3)
    return f"Write at least {num} sentences.", {"N": num, "quantifier": "at least"}


def _paragraphs(draw: random.Random) -> tuple[str, dict[str, Any]]:
    word = draw.choice(OPENINGS)
    return f'Begin your answer with the word "{word}".', {"N": 1, "first_word": word, "i": 1}


def _bullet_points(draw: random.Random) -> tuple[str, dict[str, Any]]:
    num = draw.randint(2, 3)
    return f"Answer with exactly {num} short bullet points, each after a *.", {"N": num}


def _capital_words(draw: random.Random) -> tuple[str, dict[str, Any]]:
    num = draw.randint(1, 2)
    said = "one word" if num == 1 else "two words"
    return f"Write at least {said} in CAPITAL letters.", {"N": num, "quantifier": "at least"}


def _choice(draw: random.Random, topic: str) -> tuple[str, str, dict[str, Any]]:
    options = ["My answer is yes.", "My answer is no.", "My answer is maybe."]
    return f"Do you like {topic}?", f"Answer with one of these: {' / '.join(options)}", {"options": options}


#: Share of 48 samples of the model as it is that keep the constraint within 32 tokens (temperature 1): with the words
#: that are here. Left out are those of nearly none: two paragraphs (0 %), a repeated prompt (0 %), an end phrase (0 %),
#: quotation marks around all (0 %), JSON (2 %), small letters only (2 %); and languages, which need a package more.
KINDS: dict[str, Maker] = {
    "verify_keywords": _with(_keywords),  # 63 %
    "validate_forbidden_words": _with(_forbidden_words),  # 40 %
    "validate_word_constraint": _with(_word_constraint),  # 27 %
    "validate_placeholders": _plain("Leave a placeholder in square brackets, such as [name].", N=1),  # 46 %
    "verify_bullet_points": _with(_bullet_points),  # 38 %
    "validate_title": _plain("Begin with a title in double angular brackets, such as <<title>>."),  # 27 %
    "validate_highlighted_sections": _plain("Highlight a word with asterisks, such as *word*.", N=1),  # 31 %
    "validate_no_commas": _plain("Do not use any commas."),
    # Held out:
    "verify_keyword_frequency": _with(_keyword_frequency),  # 60 %
    "verify_letter_frequency": _with(_letter_frequency),  # 23 %
    "verify_sentence_constraint": _with(_sentence_constraint),  # 50 %
    "verify_postscript": _plain("Be brief, and end with a postscript after P.S.", postscript_marker="P.S."),  # 13 %
    "validate_choice": _choice,  # 13 %
    "validate_sections": _plain(
        "Write two short parts, each beginning with Part.", N=2, section_splitter="Part"
    ),  # 8 %
    "validate_two_responses": _plain("Give two different answers of a few words with ****** between them."),  # 8 %
    "validate_uppercase": _plain("Answer in CAPITAL LETTERS only."),  # 6 %
    "validate_frequency_capital_words": _with(_capital_words),  # 21 %
}
TRAINED_KINDS, HELD_OUT_KINDS = tuple(KINDS)[:8], tuple(KINDS)[8:]
#: Every fourth topic, in an order of their own, is not trained on.
_SHUFFLED = random.Random(0).sample(TOPICS, len(TOPICS))
TRAINED_TOPICS, HELD_OUT_TOPICS = _SHUFFLED[len(TOPICS) // 4 :], _SHUFFLED[: len(TOPICS) // 4]
_ROWS_A_TOPIC = 4


def training_rows(seed: int) -> list[Row]:
    """Rows of RLVR: every trained kind with every trained topic, several times."""
    return [
        row_of(kind, topic, number, seed)
        for kind in TRAINED_KINDS
        for topic in TRAINED_TOPICS
        for number in range(_ROWS_A_TOPIC)
    ]


def held_out_rows(seed: int, num_prompts: int) -> list[Row]:
    """`num_prompts` rows of every kind, with topics that are not trained on."""
    return [
        row_of(kind, HELD_OUT_TOPICS[place % len(HELD_OUT_TOPICS)], place // len(HELD_OUT_TOPICS), seed)
        for kind in (*TRAINED_KINDS, *HELD_OUT_KINDS)
        for place in range(num_prompts)
    ]


def row_of(kind: str, topic: str, number: int, seed: int) -> Row:
    """A row of RLVR. Its random numbers are its own: they depend on the arguments alone."""
    name = f"{kind}/{topic}/{number}"
    request, how, arguments = KINDS[kind](random.Random(f"{seed}/{name}"), topic)
    truth = json.dumps({"func_name": kind, **arguments})
    return {
        "id": name, "prompt": [{"role": "user", "content": f"{request} {how}"}], "verifier": "ifeval",
        "ground_truth": truth,
    }  # fmt: skip
