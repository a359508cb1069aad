"""Tables of the mode `normalised`: what each code point, entity, tag and LaTeX command becomes.

An index holds its tables, so that a scan depends on the index alone and not on the Unicode version of its Python.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from html.entities import html5
from typing import NamedTuple

import numpy as np

from smoltulu.tasks.contamination.kernels.layout import (
    DIGIT,
    DROP,
    ENTITY,
    GAP,
    LETTER,
    MARKUP,
    NAMED_ESCAPE,
    NUM_POINTS,
    SEQUENCE,
    SINGLE,
    TAG,
    ZERO_WIDTH,
    NormalTables,
)

#: Not drawn (Hangul's fillers: a blank), and used inside words or in the place of a blank.
ZERO_WIDTH_POINTS = (0x180E, 0x200B, 0x200C, 0x200D, 0x2060, 0x3164, 0xFEFF, 0xFFA0)
#: Apostrophes, primes and accents by themselves that Unicode counts as letters.
QUOTE_LETTERS = (*range(0x2B9, 0x2C0), 0x2C8, 0x2CA, 0x2CB, 0x2EE, 0xA78B, 0xA78C)
#: Ignored wherever they stand (Unicode's Default_Ignorable_Code_Point, which `unicodedata` does not know).
IGNORABLE = (
    *(0xAD, 0x34F, 0x61C, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0),
    0x640,  # not of that list: it makes an Arabic word wider
    *range(0x180B, 0x1810),
    *range(0x200B, 0x2010),
    *range(0x202A, 0x202F),
    *range(0x2060, 0x2070),
    *range(0xFE00, 0xFE10),
    *range(0xFFF0, 0xFFF9),
    *range(0x1BCA0, 0x1BCA4),
    *range(0x1D173, 0x1D17B),
)
#: Scripts without blanks between words, and Hangul, whose syllables may come as letters: a term is a character.
BY_CHARACTER = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x19E0, 0x19FF)),  # Thai, Lao, Myanmar, Khmer
    *((0x1100, 0x11FF), (0xA960, 0xA97F), (0xAC00, 0xD7FF)),  # Hangul
    *(
        (0x2E80, 0x2FDF),
        (0x3005, 0x3007),
        (0x3021, 0x3029),
        (0x3038, 0x303B),
        (0x3400, 0x4DBF),
        (0x4E00, 0x9FFF),
    ),  # Han
    *((0xF900, 0xFAFF), (0x20000, 0x323AF)),
    *((0x3041, 0x312F), (0x31A0, 0x31FF), (0x1AFF0, 0x1B16F)),  # kana, Bopomofo
    *((0xA9E0, 0xA9FF), (0xAA60, 0xAA7F)),  # more Myanmar
)
_SINGLES = frozenset(point for first, last in BY_CHARACTER for point in range(first, last + 1))
_DROPPED = frozenset(IGNORABLE)

#: Tags inside a line, which do not part words, and those that do.
INLINE_TAGS = (
    "a abbr acronym b bdi bdo big cite code data del dfn em font i ins kbd mark q s samp small span strike strong sub "
    "sup time tt u var wbr"
)
BLOCK_TAGS = (
    "address article aside blockquote body br button caption center col colgroup dd details dialog div dl dt fieldset "
    "figcaption figure footer form h1 h2 h3 h4 h5 h6 head header hr html img input label legend li link main meta nav "
    "ol option p pre script section select style summary table tbody td textarea tfoot th thead title tr ul"
)
#: LaTeX commands that begin with n, r or t, so that `\neq` is not an escaped line feed and "eq".
LATEX_NRT = (
    "nabla ncong ne nearrow neg neq newcommand newline newpage nexists ngeq nleq nless ngtr nmid noindent nolimits "
    "nonumber normalsize not notin nparallel nprec nsubseteq nsucc nsupseteq nu nwarrow rangle rbrace rbrack rceil "
    "rdots renewcommand rfloor rho right rightarrow rightharpoonup rightleftharpoons rm root rq rule rvert rVert "
    "tabular tag tan tanh tau tbinom text textasciicircum textasciitilde textbackslash textbf textdegree textdollar "
    "textgreater textit textless textmd textnormal textquoteleft textquoteright textquotedblleft textquotedblright "
    "textrm textsc textsf textsl textstyle texttt textup textwidth tfrac therefore theta thetasym thinspace tilde "
    "times tiny title to top triangle triangleleft triangleq triangleright twoheadrightarrow"
)
#: LaTeX commands that change how text looks, or stand for a symbol: no term.
LATEX_LOOKS = (
    "Big Bigg Biggl Biggr Bigl Bigr Large LARGE big bigg biggl biggr bigl bigr bf bfseries bm boldsymbol cal "
    "displaystyle emph em enspace footnotesize hfill hspace it itshape large ldots dots left limits lq mathbb "
    "mathbf mathcal mathit mathrm mathsf mathtt mbox hbox medskip middle newline noindent nonumber normalsize "
    "operatorname par phantom qquad quad right rm rq scriptstyle small smallskip tag text textasciicircum "
    "textasciitilde textbackslash textbf textdollar textgreater textit textless textmd textnormal textquotedblleft "
    "textquotedblright textquoteleft textquoteright textrm textsc textsf textsl textstyle texttt textup thinspace "
    "tiny tt underline vspace"
)
#: Commands of which only the first letter says how they look.
LATEX_SIZED = "dfrac tfrac cfrac dbinom tbinom"

_FNV_OFFSET, _FNV_PRIME, _64_BITS = 0xCBF29CE484222325, 0x100000001B3, (1 << 64) - 1


@cache
def normal_tables() -> NormalTables:
    """All tables; a fraction of a second, once."""
    kind, to, sequences = _point_tables()
    keys, values = _names()
    return NormalTables(kind, to, sequences, keys, values)


class Folded(NamedTuple):
    """A code point as it counts: its kind and itself."""

    kind: int
    point: int


def fold(point: int) -> list[Folded]:
    """What a code point becomes: NFKD and case folded until nothing changes, without marks that are no letters."""
    before, text = "", chr(point)
    while text != before:
        before = text
        text = unicodedata.normalize("NFKD", text).casefold()
    return [Folded(kind, ord(character)) for character in text if (kind := _kind(character)) not in (DROP, ZERO_WIDTH)]


def _kind(character: str) -> int:
    """Kind of a folded character."""
    point, category = ord(character), unicodedata.category(character)
    if point in ZERO_WIDTH_POINTS:
        return ZERO_WIDTH
    if point in _DROPPED or 0xE0000 <= point < 0xE1000 or category in ("Cf", "Me"):
        return DROP
    if category == "Mn" and unicodedata.combining(character):
        return DROP  # accents, harakat, nukta; vowel signs of Indic scripts have no such class, and stay
    if category[0] not in "LNM" or point in QUOTE_LETTERS:
        return GAP
    if point in _SINGLES:
        return SINGLE
    return DIGIT if category[0] == "N" else LETTER


def _point_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    kind, to = np.zeros(NUM_POINTS, np.uint8), np.arange(NUM_POINTS, dtype=np.int32)
    for first, last in ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0x20000, 0x2F7FF)):  # Han, most of all letters
        kind[first : last + 1] = SINGLE
    sequences: list[int] = []
    known = (
        range(0x3400),
        range(0x4DC0, 0x4E00),
        range(0xA000, 0xD800),
        range(0xE000, 0x20000),
        range(0x2F800, 0x2FA20),
    )
    for point in (point for points in known for point in points):
        if point in ZERO_WIDTH_POINTS:
            kind[point] = ZERO_WIDTH
        elif (folded := fold(point)) and all(each.kind == GAP for each in folded):
            kind[point] = GAP
        elif len(folded) == 1:
            kind[point], to[point] = folded[0]
        elif folded:
            kind[point], to[point] = SEQUENCE, len(sequences)
            sequences += [len(folded), *(value for each in folded for value in each)]
        else:
            kind[point] = DROP
    return kind, to, np.array(sequences, dtype=np.int32)


def _names() -> tuple[np.ndarray, np.ndarray]:
    """Names of entities, tags and commands by hash, in one open-addressing table."""
    named: dict[int, int] = {}
    for name, text in html5.items():
        if name.endswith(";"):
            named[name_hash(ENTITY, name[:-1])] = ord(text[0]) | (ord(text[1]) << 21 if len(text) > 1 else 0)
    for number, names in enumerate((INLINE_TAGS, BLOCK_TAGS)):
        named |= {name_hash(TAG, name): number for name in names.split()}
    named |= {name_hash(NAMED_ESCAPE, name): 0 for name in LATEX_NRT.split()}
    for number, names in enumerate((LATEX_LOOKS, LATEX_SIZED)):
        named |= {name_hash(MARKUP, name.lower()): number for name in names.split()}
    slots = 1 << (2 * len(named)).bit_length()
    keys, values = np.zeros(slots, np.uint64), np.full(slots, -1, np.int64)
    for key, value in named.items():
        slot = key & (slots - 1)
        while values[slot] >= 0:
            slot = (slot + 1) & (slots - 1)
        keys[slot], values[slot] = key, value
    return keys, values


def name_hash(category: int, name: str) -> int:
    """Hash under which a name is looked up, as the kernels compute it."""
    h = _FNV_OFFSET ^ (category << 40)
    for character in name:
        h = ((h ^ ord(character)) * _FNV_PRIME) & _64_BITS
    return h
