"""Probes: lookups that only a model that copies can do. Made from a seed, without any data set (2505.07293, 2.2).

A probe is the paper's instruction, a JSON object of random keys with values of words, some questions with their
answers, and one question. As many pairs as fit go into it. What makes a probe easy is balanced: the asked pair stands
equally often in each part of the object, its value has the form of every other value, and no word of it is rarer in
the object than another word.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from smoltulu.schemas.selection import ProbeSettings
from smoltulu.tasks.models.tokens import added_tokens
from smoltulu.tasks.world.lookups import INSTRUCTION, Pair, as_line, as_object, draw_pairs, most_keys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Probe:
    """A probe as text and tokens. Token ranges are [first, last).

    num_pairs   pairs in the object
    num_shown   questions before the last one, which have their answers
    position    number of the asked pair in the object, from 0
    needle      tokens of the asked value in the object
    answer      tokens of the same value at the end
    """

    text: str
    key: str
    value: str
    num_pairs: int
    num_shown: int
    position: int
    input_ids: tuple[int, ...]
    needle: tuple[int, int]
    answer: tuple[int, int]


class Sketch(NamedTuple):
    """What is drawn of a probe before it is known how many pairs fit.

    depth  where the asked pair stands, as a share of the object in [0, 1)
    order  numbers in [0, 1) that say which other pairs are shown
    """

    pairs: list[Pair]
    depth: float
    order: list[float]


def make_probes(
    tokenizer: PreTrainedTokenizerBase, settings: ProbeSettings, num_probes: int | None = None, draw: int = 0
) -> list[Probe]:
    """`num_probes` probes (those of the settings if None). Another `draw` gives others of the same kind.

    ValueError where not even the smallest probe fits into settings.max_tokens, or the tokenizer tells no offsets.
    """
    count = settings.num_probes if num_probes is None else num_probes
    rng = random.Random(f"probes {settings.seed} {draw}")
    depths = balanced_depths(rng, count)
    most = max(most_pairs(settings), settings.num_shown + 2)
    return [
        _largest(tokenizer, Sketch(draw_pairs(rng, most, settings.key_length), depth, _shares(rng, most)), settings)
        for depth in depths
    ]


def make_graded_probes(tokenizer: PreTrainedTokenizerBase, settings: ProbeSettings, num_probes: int) -> list[Probe]:
    """Probes of one length and of more and more lookups: the first shows no answer, the last as many as fit.

    How much a set of heads costs such a probe must grow with the number of its lookups.
    """
    rng = random.Random(f"graded probes {settings.seed}")
    most = max(most_pairs(settings), 2)
    largest = 0
    sketch = Sketch(draw_pairs(rng, most, settings.key_length), 0.5, _shares(rng, most))
    while (
        largest + 3 <= most
        and len(_build(tokenizer, sketch, largest + 3, largest + 1).input_ids) <= settings.max_tokens
    ):
        largest += 1
    made = []
    for number, depth in enumerate(balanced_depths(rng, num_probes)):
        num_shown = round(largest * number / max(1, num_probes - 1))
        sketch = Sketch(draw_pairs(rng, most, settings.key_length), depth, _shares(rng, most))
        # Keys differ in length by their tokens: the last grade may be one answer too many for one of them.
        while num_shown and len(_build(tokenizer, sketch, num_shown + 2, num_shown).input_ids) > settings.max_tokens:
            num_shown -= 1
        made.append(_largest(tokenizer, sketch, replace_shown(settings, num_shown)))
    return made


def most_pairs(settings: ProbeSettings) -> int:
    """Pairs that are drawn for a probe: more than can fit, as a pair has at least a token for each of its parts; and
    where keys are short, no more than half of all keys, so that different ones are soon found."""
    return min(settings.max_tokens // 4, most_keys(settings.key_length) // 2)


def replace_shown(settings: ProbeSettings, num_shown: int) -> ProbeSettings:
    """The settings with another number of shown answers, which may be more than a user may ask for."""
    return settings.model_copy(update={"num_shown": num_shown})


def balanced_depths(rng: random.Random, count: int) -> list[float]:
    """`count` numbers of [0, 1) in random order, one in each of `count` equal parts."""
    depths = [(number + rng.random()) / count for number in range(count)]
    rng.shuffle(depths)
    return depths


def _shares(rng: random.Random, count: int) -> list[float]:
    return [rng.random() for _ in range(count)]


def _largest(tokenizer: PreTrainedTokenizerBase, sketch: Sketch, settings: ProbeSettings) -> Probe:
    """The probe with as many pairs as fit."""
    fits, too_many = settings.num_shown + 2, len(sketch.pairs) + 1
    best = _build(tokenizer, sketch, fits, settings.num_shown)
    if len(best.input_ids) > settings.max_tokens:
        raise ValueError(
            f"selection.probes: {fits} pairs with keys of {settings.key_length} characters and {settings.num_shown} "
            f"shown answers are {len(best.input_ids)} tokens, and max_tokens is {settings.max_tokens}: raise it (up to "
            "the context of the selector model), or lower num_shown or key_length"
        )
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        probe = _build(tokenizer, sketch, middle, settings.num_shown)
        if len(probe.input_ids) <= settings.max_tokens:
            fits, best = middle, probe
        else:
            too_many = middle
    return best


def _build(tokenizer: PreTrainedTokenizerBase, sketch: Sketch, num_pairs: int, num_shown: int) -> Probe:
    """The probe of the first `num_pairs` pairs."""
    pairs = sketch.pairs[:num_pairs]
    position = int(sketch.depth * num_pairs)
    others = sorted((number for number in range(num_pairs) if number != position), key=lambda one: sketch.order[one])
    text, needle, answer = render(pairs, [*others[:num_shown], position])
    return replace(tokenised(tokenizer, text, needle, answer), key=pairs[position].key, value=pairs[position].value,
                   num_pairs=num_pairs, num_shown=num_shown, position=position)  # fmt: skip


def render(pairs: Sequence[Pair], asked: Sequence[int]) -> tuple[str, tuple[int, int], tuple[int, int]]:
    """The text that asks for these pairs, one after the other, all answered; and where, in characters, the last one's
    value stands in the object and as the answer."""
    text = "\n".join([INSTRUCTION, as_object(pairs), *(as_line(pairs[number]) for number in asked)])
    key, value = pairs[asked[-1]]
    line = as_line(pairs[asked[-1]])
    start = text.index(line) + line.index(value, len(key) + 2)
    end = len(text) - 1  # the closing quote
    return text, (start, start + len(value)), (end - len(value), end)


def tokenised(tokenizer: PreTrainedTokenizerBase, text: str, needle: tuple[int, int], answer: tuple[int, int]) -> Probe:
    """The text's tokens, after what the tokenizer puts before a text, with two ranges of characters as tokens."""
    if not tokenizer.is_fast:
        raise ValueError(
            "the selector model's tokenizer tells no offsets (it is not a fast one), so that no answer is found among "
            "the tokens; give a model with a tokenizer.json"
        )
    before, _ = added_tokens(tokenizer)
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = made["offset_mapping"]

    def tokens(start: int, end: int) -> tuple[int, int]:
        inside = [number for number, (first, last) in enumerate(offsets) if first < end and last > start]
        return inside[0] + len(before), inside[-1] + 1 + len(before)

    ids = (*before, *made["input_ids"])
    return Probe(text, "", "", 0, 0, 0, ids, tokens(*needle), tokens(*answer))
