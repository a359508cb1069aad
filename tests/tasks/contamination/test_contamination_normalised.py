"""The mode `normalised`: terms by hand, the engine against plain Python on odd Unicode, and every wrapping found."""

from __future__ import annotations

import html
import json
import tempfile
import unicodedata
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoltulu.tasks.contamination.build import build_index, joined
from smoltulu.tasks.contamination.kernels.layout import NUM_POINTS
from smoltulu.tasks.contamination.kernels.normal import normalise_fields
from smoltulu.tasks.contamination.normal_form import normal_tables
from smoltulu.tasks.contamination.queries import LoadedBenchmark
from smoltulu.tasks.contamination.scan import load_index, scan_texts
from tests.tasks.contamination import contamination_normalised as plain
from tests.tasks.contamination.contamination_fuzz import GAPS, WORDS

TABLES = normal_tables()


def normalised(texts):
    """Normal form of each text, as the index has it."""
    out, bounds, num_terms = normalise_fields(*joined([text.encode() for text in texts]), TABLES)
    found = [out[start:end].tobytes().decode() for start, end in pairwise(bounds)]
    assert [len(text.split(" ")) if text else 0 for text in found] == num_terms.tolist()
    return found


def find(items, texts):
    """{(text, item): matched source text} of the engine."""
    with tempfile.TemporaryDirectory() as folder:
        build_index(Path(folder), [LoadedBenchmark("x", [(item,) for item in items])], "normalised")
        hits, _ = scan_texts(load_index(Path(folder)), texts)
    return {(hit["row"], hit["instance"]): hit["text"] for hit in hits.to_pylist()}


BY_HAND = {
    "**Bold** `code` \u201cquoted\u201d \u2014 dash\u2026": "bold code quoted dash",
    "don\u2019t don't": "don t don t",
    "\uff26\uff55\uff4c\uff4c \ufb01ne caf\u00e9 cafe\u0301 STRASSE stra\u00dfe": "full fine cafe cafe strasse strasse",
    "zero\u200bwidth soft\u00adhyphen": "zerowidth softhyphen",
    "5th x\u00b2 1,000 \u00bd": "5 th x 2 1 000 1 2",
    "&lt;b&gt; a &amp;amp;#39; b&nbsp;c": "a b c",
    r"one\ntwo\\nthree \u0041\u00e9 \"x\" \ud83d\ude00y": "one two three ae x y",
    r"\neq \nu \text{cm} \frac{1}{2} \dfrac{1}{2} \(x\) \left(": "neq nu cm frac 1 2 frac 1 2 x",
    "<p class='a'>H<sub>2</sub>O</p><br/>x<y and y>z un<b>believ</b>able": "h 2 o x y and y z unbelievable",
    "[link](https://a.b/c) f[i](j)": "link f i j",
    "a%20b 50% of 5%zz caf%C3%A9": "a b 50 of 5 zz cafe",
    "\u4f60\u597d\uff0c\u4e16\u754c": "\u4f60 \u597d \u4e16 \u754c",
    "\u0e44\u0e17\u0e22": "\u0e44 \u0e17 \u0e22",
    "\ud55c": "\u1112 \u1161 \u11ab",
    "-- ** ``` \u2026": "",
    "don\u02bct \u0633\u0640\u0640\u0644\u0627\u0645": "don t \u0633\u0644\u0627\u0645",
    '[a](https://e.org/b_(c) "d e") [f](<www.g.h>) [i](mailto:j@k) f[l](m n)': "a f i f l m n",
}


def test_normal_forms_by_hand():
    assert dict(zip(BY_HAND, normalised(list(BY_HAND)), strict=True)) == BY_HAND
    for text, form in BY_HAND.items():
        assert " ".join(term for term, _, _ in plain.readings(text)[0]) == form


def test_tables_are_those_of_plain_python_for_all_of_unicode():
    names = ("gap", "letter", "digit", "single", "drop", "zero width", "several")
    for point in (*range(0xD800), *range(0xE000, NUM_POINTS)):
        kind = names[TABLES.kind[point]]
        assert kind == plain.kind(chr(point)), hex(point)
        if kind in ("letter", "digit", "single"):
            assert plain.fold(chr(point)) == [(chr(TABLES.to[point]), kind)], hex(point)
    # above the tables: Han, tags, and nothing else that has terms
    assert all(plain.kind(chr(point)) == "single" for point in range(NUM_POINTS, 0x323B0) if chr(point).isalpha())
    others = (point for point in range(0x323B0, 0x110000, 7))
    assert all(plain.kind(chr(point)) == ("drop" if 0xE0000 <= point < 0xE1000 else "gap") for point in others)


WRAPPINGS = {
    "verbatim": lambda text: text,
    "bold": lambda text: f"**{text}**",
    "bold words": lambda text: " ".join(f"**{word}**" if len(word) % 3 else word for word in text.split(" ")),
    "instruction": lambda text: f"[INST]{text}[/INST]",
    "\u95ee\u9898": lambda text: f"\u95ee\u9898\uff1a{text}",
    "curly": lambda text: text.replace("'", "\u2019").replace('"', "\u201d"),
    "CRLF": lambda text: text.replace("\n", "\r\n").replace(" ", "\t"),
    "HTML": html.escape,
    "HTML twice": lambda text: html.escape(html.escape(text)),
    "HTML by number": lambda text: "".join(f"&#{ord(c)};" for c in text),
    "JSON": lambda text: json.dumps(text),
    "JSON in JSON of HTML": lambda text: json.dumps(json.dumps(html.escape(text))),
    "URL": quote,
    "form": lambda text: quote(text).replace("%20", "+"),
    "NBSP": lambda text: text.replace(" ", "\u00a0"),
    "ideographic": lambda text: text.replace(" ", "\u3000"),
    "zero width inside": lambda text: "\u200b".join(text),
    "zero width between": lambda text: text.replace(" ", "\u200b"),
    "soft hyphens": lambda text: "\u00ad".join(text),
    "full width": lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
    "upper case": str.upper,
    "combining": lambda text: unicodedata.normalize("NFD", text),
    "lines of a word": lambda text: text.replace(" ", "\n> "),
    "comment": lambda text: "# " + text.replace(" ", "\n# "),
    "numbered": lambda text: "\n".join(f"{i:3} {word}" for i, word in enumerate(text.split(" "), 1)),
    "numbered in HTML": lambda text: "<br>".join(f"{i}. {word}" for i, word in enumerate(text.split(" "), 1)),
    "numbered in Chinese": lambda text: "\n".join(f"{i}\u3001{word}" for i, word in enumerate(text.split(" "), 1)),
    "letters as quotes": lambda text: text.replace("'", "\u02bc").replace("\u2019", "\ua78c"),
    "Hangul fillers": lambda text: text.replace(" ", "\u3164"),
    "attributes": lambda text: " ".join(
        f'<span class="w" data-x2=y>{html.escape(word)}</span>' for word in text.split(" ")
    ),
    "hyphenated": lambda text: text.replace("friends", "fri-\nends").replace("function", "func-\n  tion"),
    "table": lambda text: "| " + text.replace(" ", " | ") + " |",
    "tags": lambda text: "<p>" + html.escape(text).replace(" ", "</i> <b class=\"x\">") + "</p>",
    "titled links": lambda text: "[" + text.replace(" ", "](<https://e.org/a_(b)> 'of it') [") + "](mailto:a@b)",
    "links": lambda text: "[" + text.replace(" ", "](https://example.org/a?b=c) [") + "](/x)",
    "LaTeX": lambda text: r"\textbf{" + text.replace(" ", r"}\ \emph{") + "}",
    "Python bytes": lambda text: repr(text.encode()),
}  # fmt: skip
ITEMS = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    'What\'s the "best" way of 5 & 6 < 7 for friends?',
    'def f(x):\n\t"""A function: returns x\'s square > 3, e.g. [1, 2]."""\n    return x ** 2\\n',
    "Find all $x \\neq \\frac{1}{2}$ such that $\\text{the function } f(x) = \\theta$ is nu.",
    "\u4ed6\u7684\u540d\u5b57\u662f\u4ec0\u4e48\uff1f\u4eca\u5929 friends \u5929\u6c14\u5f88\u597d\u3002",
    "Qu\u2019est-ce que l\u2019\u00e9t\u00e9 \u2014 na\u00efve friends \u00e0 No\u00ebl?",
]


@pytest.mark.parametrize("name", WRAPPINGS)
def test_every_wrapping_is_found_and_points_to_its_source(name):
    texts = [f"Please answer. {WRAPPINGS[name](item)} Thank you" for item in ITEMS]
    found = find(ITEMS, [*texts, "Natalia sold clips to 48 of her friends", ""])
    assert sorted(found) == [(number, number) for number in range(len(ITEMS))]
    for (number, _), matched in found.items():
        assert plain.occurrence(matched.rstrip("\u2026"), ITEMS[number]) or matched.endswith("\u2026")


_ESCAPES = (
    *(
        "\\n",
        "\\",
        "\\\\",
        "\\u0041",
        "\\ud83d\\ude00",
        "\\ud83d",
        "\\u{41}",
        "\\U0001F600",
        "\\x41",
        "\\xe2\\x80\\x99",
    ),
    *("&", "&amp;", "amp;", "&lt;", "&#39;", "&#x41;", "&#128;", "&fjlig;", "&nope;", "#", ";", "%20", "%C3%A9", "%c3"),
    *(
        "<",
        ">",
        "<b>",
        "</b>",
        "<br/>",
        "<p class='x'>",
        "<a href=x>",
        "<b",
        " a=",
        "'",
        "](",
        "](http://x)",
        ")",
        "(",
        "](</a",
        "](mailto:",
    ),
    *(' "t")', "\u02bc", "\u3164", "\u0640", "\n1\u3001", "\n2\u3002", "<br>1.", "<br>2.", "<p a1.b=c>"),
    *("\\text", "\\left", "\\dfrac", "\\neq", "\\ntext", "\\theta", "1", "2", "3", "\n1 ", "\n2. ", "\n\n3", "\r\n4:"),
    *("\n", "a-\n", "-\n", "-\r\n> ", "\u00ad\n", "\u2010 \n", "\u200b", "\u200d", "\ufeff", "\u0301", "\u0345"),
    *("\ufdfa", "\u0e33", "\uff11", "\uff08", "\uff0e", "\uff3c", "\n\uff08", "\ufe0f", "\u20e3", "\u00ad", "\uff06"),
    *("\uff1c", "\uff0d", "%"),
)
_odd = st.sampled_from([*WORDS, *_ESCAPES, *_ESCAPES])
_texts = st.lists(st.one_of(_odd, _odd, st.sampled_from(GAPS), st.text(max_size=3)), max_size=25).map("".join)
_many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@_many
@given(st.lists(_texts, min_size=1, max_size=8))
def test_normal_forms_are_those_of_plain_python(texts):
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    expected = [" ".join(term for term, _, _ in plain.readings(text)[0]) for text in texts]
    assert normalised(texts) == expected


@settings(_many, max_examples=100)
@given(st.lists(_texts, min_size=1, max_size=6), st.data())
def test_the_engine_finds_what_plain_python_finds(texts, data):
    """Instances are cut out of the turns' terms, in either reading, so that hits are common."""
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    items = [data.draw(_texts).encode("utf-8", "replace").decode()]
    bounds = {}
    for number, text in enumerate(texts):
        for terms in plain.readings(text):
            if terms:
                first = data.draw(st.integers(0, len(terms) - 1))
                last = data.draw(st.integers(first, min(len(terms), first + 12) - 1))
                bounds.setdefault((number, len(items)), (terms[first][1], terms[last][2]))
                items.append(" ".join(term for term, _, _ in terms[first : last + 1]))
    found = find(items, texts)
    wanted = {
        (number, item)
        for number, text in enumerate(texts)
        for item in range(len(items))
        if plain.holds(text, items[item])
    }
    assert set(found) == wanted
    for (number, item), matched in found.items():
        assert matched.rstrip("\u2026") in texts[number]
        form = [term for term, _, _ in plain.readings(items[item])[0]]
        of_turn = [
            texts[number][terms[at][1] : terms[at + len(form) - 1][2]]
            for terms in plain.readings(texts[number])
            for at in range(len(terms) - len(form) + 1)
            if [term for term, _, _ in terms[at : at + len(form)]] == form
        ]
        # The passage to the byte, or its first 200 characters.
        assert matched in [source if len(source) <= 200 else f"{source[:199]}\u2026" for source in of_turn]


@_many
@given(st.lists(st.text(alphabet=st.characters(codec="utf-8"), max_size=20), min_size=1, max_size=5))
def test_canonical_and_compatible_forms_are_one(texts):
    # What becomes ASCII may be an escape or a tag, so it is left out here.
    texts = ["".join(c for c in text if not unicodedata.normalize("NFKC", c).isascii()) for text in texts]
    for form in ("NFC", "NFD"):
        assert normalised([unicodedata.normalize(form, text) for text in texts]) == normalised(texts)


def test_words_are_joined_behind_the_numbers_of_lines():
    lines = ITEMS[0].replace("friends", "fri-\nends").replace(", and", ",\nand").split("\n")
    numbered = "\n".join(f"{number:3} {line}" for number, line in enumerate(lines, 1))
    assert set(find(ITEMS, [numbered])) == {(0, 0)}
    assert plain.holds(numbered, ITEMS[0])


def test_few_terms_count_as_in_full_or_standing_alone():
    items = ["fire", "4 + 3 =", "x + y = z", "the end"]
    texts = [
        "set on fire/",
        "**Fire**!",
        "a\n- fire.\nb",
        "fire works",
        "4-3",
        "4 3",
        "x-y, z",
        "it is surely 'the end'",
    ]
    assert sorted(find(items, texts)) == [(1, 0), (2, 0), (3, 0)]


_plain_words = st.lists(st.sampled_from(["a", "b", "ab", "the", "water", "nbsp", "text"]), max_size=30).map(" ".join)


@settings(_many, max_examples=50)
@given(st.lists(_plain_words, min_size=1, max_size=6), st.lists(_plain_words, min_size=1, max_size=4))
def test_plain_text_gives_what_full_gives(items, texts):
    tables = []
    for mode in ("full", "normalised"):
        with tempfile.TemporaryDirectory() as folder:
            build_index(Path(folder), [LoadedBenchmark("x", [(item,) for item in items])], mode)
            hits, best = scan_texts(load_index(Path(folder)), texts)
        tables.append((hits.to_pylist(), best.tolist()))
    assert tables[0] == tables[1]


def test_turns_that_are_not_utf8_and_long_ones():
    source = np.frombuffer(b"a \xff b", np.uint8).copy()
    assert source.size == 5  # scan_texts takes texts, which are UTF-8; files are tested with the other modes
    long = "word &amp; " * 20_000 + ITEMS[0]
    assert (0, 0) in find(ITEMS, [long])
    assert (0, 0) in find(ITEMS, ["\ufdfa" * 1_000 + " " + ITEMS[0]])  # a character that becomes eighteen
