"""Generated instances and turns in which matches, near-matches and awkward characters are common."""

from __future__ import annotations

import random

#: Words whose lower case, encoding or separators are easy to get wrong.
WORDS = (
    *("a", "B", "b", "the", "The", "of", "x1", "don't", "can't.", "e.g.", "U.S.", "well-known", "$x^2$"),
    *("\\frac{1}{2}", "{", "}", "[1]", "_", "____", "___x___", "'", "''", "`", "/", "=", "*", "+"),
    *("...", "--", "?!", '"', "(", ")", ":", ";"),
    # dotted and dotless i, sigma and final sigma, sharp s, long s
    *("\u0130stanbul", "i\u0307", "\u0131", "I", "ΟΔΟΣ", "οδος", "οδοσ", "Σ", "σ", "ς", "Straße", "STRASSE"),
    *("\u1e9e", "ß", "\u017f", "\u017ft"),
    # ligatures and digraphs, Kelvin, Angstrom and Ohm, letters that grow or shrink when lower-cased, other forms
    *("\ufb01", "\ufb01ne", "\ufb00", "\u01c5", "\u01c6", "\u01c4", "\u212a", "k", "\u212b", "å", "\u2126", "ω"),
    *("\u023a", "\u2c65", "É", "é", "e\u0301", "\u2167", "\u2177", "\u24b6", "\uff21", "\uff41"),
    *("你好", "你好。世界", "世界", "日本語のテキスト", "한국어", "العربية", "हिन्दी", "ไทย"),
    # beyond the basic plane: emoji, a joined family, Deseret and Adlam letters in both cases; Georgian, Cherokee
    *("\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U00010400", "\U00010428", "\U0001e900"),
    *("\U0001e922", "\u1c90", "\u10d0", "\u13a0", "\uab70"),
    *("\u2019", "don\u2019t", "“quoted”", "–", "—", "…", "、", "¿", "\u00ad", "\u200b", "\ufeff", "\u2028"),
    *("\0", "\0a", "a\0", "\x01", "\x1f", "\x7f", "\x85", "\uffff", "\U0010ffff"),
)
#: What stands between two words; the empty one joins them.
GAPS = (*(" ",) * 12, "  ", "\n", "\n\n", ", ", ". ", "-", " - ", "\t", "\r\n", "\u00a0", "\u3000", "\\", '"', "", "")
ODD_TEXTS = ("", " ", "\n", "-", ' ,.?!:;()"-\n\\', "\t", "\0", " \0 ", "İ", "Σ", "a", "a\n")


def text(rng: random.Random, max_words: int) -> str:
    """Words of a small vocabulary, so that equal runs occur by themselves; now and then one of the odd texts."""
    if rng.random() < 0.04:
        return rng.choice(ODD_TEXTS)
    words = rng.choices(WORDS, k=rng.randint(1, max_words))
    if rng.random() < 0.3:  # spans that repeat
        start = rng.randrange(len(words))
        words += words[start : start + rng.randint(1, 12)] * rng.randint(1, 3)
    return "".join(word + rng.choice(GAPS) for word in words)


def disguised(rng: random.Random, field: str) -> str:
    """The same text, a copy in other case, with other gaps, with one word changed, or a part of it."""
    kind = rng.randrange(6)
    if kind == 0:
        return field.upper()
    if kind == 1:
        return field.replace(" ", rng.choice((" - ", "\n", ", ", "\t")))
    if kind == 2 and field:
        at = rng.randrange(len(field))
        return field[:at] + rng.choice(WORDS) + field[at + 1 :]
    if kind == 3:
        return field[rng.randint(0, len(field)) :]
    if kind == 4:
        return field[: rng.randint(0, len(field))]
    return field


def generate(seed: int, num_instances: int, num_turns: int) -> tuple[list[tuple[str | None, ...]], list[str]]:
    """Instances of one to three fields, some of them None, and turns of which most hold (parts of) instances."""
    rng = random.Random(seed)
    instances: list[tuple[str | None, ...]] = []
    for _ in range(num_instances):
        if instances and rng.random() < 0.1:  # fields that several instances share
            field = rng.choice(instances)[0]
            instances.append((field, *(text(rng, 12) for _ in range(rng.randrange(3)))))
        else:
            instances.append(tuple(text(rng, rng.choice((1, 3, 12, 30))) for _ in range(rng.choice((1, 1, 1, 2, 3)))))
        if rng.random() < 0.03:
            instances[-1] = (*instances[-1][:-1], None)
    turns = []
    for _ in range(num_turns):
        pieces = [text(rng, 20)]
        for _ in range(rng.choice((0, 1, 1, 2))):
            fields = [field or "" for field in rng.choice(instances)]
            rng.shuffle(fields)
            for field in fields:
                pieces += [field if rng.random() < 0.5 else disguised(rng, field), rng.choice(GAPS)]
            pieces.append(text(rng, 10))
        turns.append("".join(pieces))
    return instances, turns


def conversation(row_id, *texts):
    """A normalised row of these turns, the first one of the user."""
    roles = ("user", "assistant")
    return {"id": row_id, "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}
