"""`smoltulu audit --review` and `--compare`: hits are read, and what two sets share is shown."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from smoltulu.flows.cli.audit_review import Hits, moved, review, shared_words
from smoltulu.flows.cli.main import app
from smoltulu.flows.cli.output import console

QUESTIONS = [
    "A baker sells nine loaves on Monday and twice as many on Tuesday. How many loaves does she sell in the two days?",
    "Tom reads fourteen pages before lunch and some more after it. If he reads forty, how many come after lunch?",
    "Seven friends share sixty-three marbles so that each gets the same number. How many marbles does each get?",
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two data sets, a file of a benchmark, and a store."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "eval").mkdir()
    write_jsonl(folder / "eval" / "gsm8k_test.jsonl", [{"question": text, "answer": "1"} for text in QUESTIONS])
    first = [{"instruction": f"Please solve: {text}", "output": "7"} for text in QUESTIONS]
    others = [
        {"instruction": f"Tell me what a {name} is made of and who makes it", "output": "?"} for name in "abcdefg"
    ]
    write_jsonl(folder / "a.jsonl", [*first, *others])
    near = {"instruction": first[0]["instruction"].replace("nine", "ten") + "\u2003Please.", "output": "7"}
    write_jsonl(folder / "b.jsonl", [near, {"instruction": first[1]["instruction"].upper() + "!", "output": "9"}])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOLTULU_BENCHMARKS", str(folder / "eval"))
        patch.chdir(folder)
        yield folder


def run_command(place: Path, *arguments: str) -> tuple[int, str, str]:
    os.chdir(place)
    store = str(place / "artifacts" / "store")
    invoked = CliRunner().invoke(app, ["audit", *arguments, "--store", store, "--threads", "1"])
    return invoked.exit_code, invoked.stdout, invoked.stderr


# Keys.


@pytest.mark.parametrize(
    ("position", "key", "expected"),
    [
        (0, "n", 1), (0, " ", 1), (0, "\r", 1), (0, "\x1b[C", 1), (5, "n", 5), (1, "p", 0), (0, "p", 0),
        (1, "b", 2), (0, "b", 2), (3, "b", 5), (5, "b", 5),
        (5, "B", 2), (4, "B", 0), (2, "B", 0), (1, "B", 0), (0, "B", 0),
        (2, "q", None), (2, "\x1b", None), (2, "\x03", None), (2, "", None), (2, "x", 2), (2, "\x1b[15~", 2),
    ],
)  # fmt: skip
def test_where_a_key_leads(position: int, key: str, expected: int | None) -> None:
    """Two hits of a benchmark, three of the next, one of the last."""
    assert moved([0, 2, 5], 6, position, key) == expected


def test_words_that_both_sides_have_are_marked() -> None:
    made = shared_words("Solve: Tom reads **fourteen** pages now", "tom reads fourteen pages before lunch")
    assert [made.plain[span.start : span.end] for span in made.spans if span.style] == [
        " Tom", " reads", " **fourteen**", " pages",
    ]  # fmt: skip
    assert made.plain == "Solve: Tom reads **fourteen** pages now"
    assert not [span for span in shared_words("the end of it", "of it all").spans if span.style]


def test_the_walk_goes_by_keys_and_ends(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hits = reviewed(place)
    pressed = iter(["n", "n", "p", "q", "n"])
    review(hits, "my\x1b[2Jset", console(), lambda: next(pressed))
    out = capsys.readouterr().out
    assert out.index("hit 1 of 3") < out.index("hit 2 of 3") < out.index("hit 3 of 3") < out.rindex("hit 2 of 3")
    assert list(pressed) == ["n"] and "\x1b[2Jset" not in out

    def closed() -> str:
        raise EOFError

    review(hits, "set", console(), closed)


def reviewed(place: Path) -> Hits:
    code, out, err = run_command(place, "a.jsonl", "-b", "gsm8k", "--detector", "none", "--json")
    assert code == 0, err
    (result,) = json.loads(out)
    folders = {stage: Path(folder) for stage, folder in result["folders"].items()}
    return Hits(
        folders["contamination"] / "hits.parquet",
        folders["benchmark_index"] / "queries.parquet",
        folders["dataset"] / "rows.parquet",
    )


def test_without_a_terminal_the_hits_are_printed(place: Path) -> None:
    code, out, err = run_command(place, "a.jsonl", "-b", "gsm8k", "--detector", "none", "--review")
    assert code == 0, err
    assert "hit 1 of 3" in out and "hit 3 of 3" in out and "gsm8k 0" in out and "row 0:0, column instruction" in out
    assert "A baker sells nine loaves" in out and "Please solve" in out


def test_no_hits_are_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hits = reviewed(place)
    hits._table = hits._table.slice(0, 0)
    review(hits, "my set", console())
    assert capsys.readouterr().out == "my set: no hits to review\n"


# What two sets share.


def test_two_sets_are_compared(place: Path) -> None:
    code, out, err = run_command(place, "--compare", "a.jsonl", "b.jsonl", "--similarity", "0.6")
    assert code == 0, err
    first, second = (
        next(line for line in out.splitlines() if f"{name}.jsonl" in line and "│" in line) for name in "ab"
    )
    assert [cell.strip() for cell in first.split("│")[2:7]] == ["10", "1", "10.00 %", "1", "10.00 %"]
    assert [cell.strip() for cell in second.split("│")[2:7]] == ["2", "1", "50.00 %", "1", "50.00 %"]
    assert "the same words" in out and "Jaccard 0." in out and "ten loaves" in out

    code, out, _ = run_command(place, "--compare", "a.jsonl", "b.jsonl", "--similarity", "0.6", "--json")
    shared = json.loads(out)
    assert [one["num_exact"] for one in shared["sets"]] == [1, 1]
    exact, near = shared["examples"]
    assert (exact["a_id"], exact["b_id"], exact["exact"], exact["jaccard"]) == ("0:1", "0:1", True, 1.0)
    assert (near["a_id"], near["b_id"], near["exact"]) == ("0:0", "0:0", False) and 0.6 <= near["jaccard"] < 1


def test_one_set_is_compared_with_itself(place: Path) -> None:
    rows = [{"instruction": QUESTIONS[number], "output": "1"} for number in (0, 1, 0, 0)]
    write_jsonl(place / "d.jsonl", rows)
    code, out, err = run_command(place, "--compare", "d.jsonl", "--json")
    assert code == 0, err
    shared = json.loads(out)
    (one,) = shared["sets"]
    assert (one["num_rows"], one["num_exact"], one["num_near"]) == (4, 2, 0)
    assert [(example["a_id"], example["b_id"]) for example in shared["examples"]] == [("0:2", "0:0"), ("0:3", "0:0")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--compare", "a.jsonl", "b.jsonl", "a.jsonl"],
            "or one for its own rows; given: 3",
        ),
        (["--compare", "a.jsonl", "b.jsonl", "--review"], "leave out --json and --compare"),
        (["a.jsonl", "--review", "--json"], "leave out --json and --compare"),
        (["--compare", "a.jsonl", "nowhere.jsonl"], "neither a file or folder"),
        (["--compare", "a.jsonl", "b.jsonl", "--similarity", "2"], "less than or equal to 1"),
        (["--compare", "a.jsonl", "b.jsonl", "--compare-text", "half"], "'user' or 'all'"),
    ],
)
def test_what_cannot_be_done_is_said(place: Path, arguments: list[str], message: str) -> None:
    code, _, err = run_command(place, *arguments)
    assert code == 1 and message in err and "Traceback" not in err
