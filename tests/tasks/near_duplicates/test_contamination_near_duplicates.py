"""Near-duplicates: shingles, signatures, the greedy walk, the stage; against brute force."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.near_duplicates import (
    NearDuplicateInputs,
    NearDuplicateOutputs,
    NearDuplicateRules,
    NearDuplicateSettings,
    NearDuplicateStageConfig,
    candidate_probability,
)
from smoltulu.tasks.near_duplicates import greedy, minhash
from smoltulu.tasks.near_duplicates.page import marked
from smoltulu.tasks.near_duplicates.shingles import compared_text, jaccard, plain_words, shingles
from smoltulu.tasks.near_duplicates.stage import find_near_duplicates
from smoltulu.tasks.stage import StageContext
from tests.rows_file import read_rows, write_rows

VOCABULARY = [f"{first}{second}" for first in "bcdfghklmnprst" for second in ("a", "e", "io", "una", "ore")]


def conversation(number: int, user: str, source: int = 0, answer: str = "Yes.") -> dict[str, Any]:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return {"id": f"{source}:{number}", "messages": turns}


def run(
    folder: Path, rows: list[dict[str, Any]], within: bool = True, index: Path | None = None, **given: Any
) -> tuple[NearDuplicateOutputs, Path]:
    """The stage on these rows. `others`: name -> rows of other sets; what is left are the rules."""
    folder.mkdir(exist_ok=True)
    others = {name: str(write_rows(folder / f"{name}.parquet", some)) for name, some in given.pop("others", {}).items()}
    place = StageContext(folder / "out", folder / "work", ComputeSettings(num_threads=1), lambda *_, **__: None)
    place.folder.mkdir()
    place.work.mkdir()
    outputs, _ = find_near_duplicates(
        NearDuplicateStageConfig(kind="sft", within=within, settings=NearDuplicateRules(**given)),
        NearDuplicateInputs(
            dataset=str(write_rows(folder / "rows.parquet", rows)), others=others, index=str(index) if index else None
        ),
        place,
    )
    assert not list(place.work.iterdir())
    return outputs, place.folder


def pairs_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "pairs.parquet").to_pylist()


def sentence(rng: random.Random, num_words: int) -> list[str]:
    return [rng.choice(VOCABULARY) for _ in range(num_words)]


def edited(rng: random.Random, words: list[str], num_edits: int) -> list[str]:
    """Some words replaced by others."""
    words = list(words)
    for place in rng.sample(range(len(words)), min(num_edits, len(words))):
        words[place] = rng.choice(VOCABULARY)
    return words


# Shingles.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The **Quick**  brown-fox,\n'jumps'!", "the quick brown fox jumps"),
        ("What is x^2 + 3*y / 4 = -5?", "what is x ^ 2 + 3 * y / 4 = - 5"),
        ("Ｆｕｌｌ width, Straße, ÉCOLE", "full width strasse école"),
        ("- one\n- two\n-----\n=====", "one two"),
        ("图书馆在哪里?", "图 书 馆 在 哪 里"),
        ("हिन्दी में", "हिन्दी में"),
        ("snake_case __init__", "snake case init"),
        ("", ""),
        (" \n\t?!", ""),
    ],
)
def test_words_are_folded_and_signs_of_arithmetic_stay(text: str, words: str) -> None:
    assert plain_words(text) == words


def test_ascii_texts_have_the_same_words_by_both_ways() -> None:
    """The fast way of ASCII text is the general one."""
    rng = random.Random(1)
    characters = [chr(code) for code in range(128)]
    for _ in range(300):
        text = "".join(rng.choices(characters, k=40))
        assert plain_words(text) == plain_words(text + " ä").removesuffix("ä").removesuffix(" "), text


def test_shingles_by_hand() -> None:
    assert shingles("a b c d", "words", 2) == ["a b", "b c", "c d"]
    assert shingles("a b c d", "words", 3) == ["a b c", "b c d"]
    assert shingles("a b", "words", 3) == ["a b"] and shingles("", "words", 3) == []
    assert shingles("abcd", "characters", 3) == ["abc", "bcd"] and shingles("ab", "characters", 3) == ["ab"]
    assert shingles("", "characters", 3) == []


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 5))
def test_shingles_of_any_size_are_all_runs(words: list[str], size: int) -> None:
    expected = (
        [" ".join(words[start : start + size]) for start in range(max(len(words) - size, 0) + 1)] if words else []
    )
    assert shingles(" ".join(words), "words", size) == expected


def test_jaccard_by_hand() -> None:
    assert jaccard({"a", "b", "c"}, {"b", "c", "d"}) == 2 / 4
    assert jaccard({"a"}, {"b"}) == 0 and jaccard(set(), set()) == 0 and jaccard({"a"}, {"a"}) == 1


def test_which_text_is_compared() -> None:
    row = {
        "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        "chosen": [{"role": "assistant", "content": "C", "reasoning_content": "T"}],
        "rejected": [{"role": "assistant", "content": "R"}],
    }
    assert compared_text(row, "user") == "U"
    assert compared_text(row, "all") == "S\nU\nC\nT\nR"


# Signatures and bands.


def test_signatures_are_the_pinned_ones() -> None:
    """What is stored must be found again, on every machine and with every rensa that the range allows."""
    assert minhash.probe_digest() == minhash._PROBE_DIGEST
    assert minhash.check_signatures().startswith("rensa ")


def test_a_library_that_signs_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minhash, "_SEED", 2)
    minhash.check_signatures.cache_clear()
    with pytest.raises(ValueError, match="makes other signatures here"):
        minhash.check_signatures()
    minhash.check_signatures.cache_clear()


def test_the_signature_estimates_jaccard() -> None:
    """Of 400 pairs the mean error is near 0 and the spread is that of 128 hash functions: sqrt(j (1 - j) / 128)."""
    rng = random.Random(2)
    errors = []
    for _ in range(400):
        shared, own = rng.randint(20, 80), rng.randint(5, 60)
        tokens = [f"{rng.random()}" for _ in range(shared + 2 * own)]
        one, other = tokens[: shared + own], tokens[:shared] + tokens[shared + own :]
        signed = minhash.signatures([one, other], 128)
        errors.append(float((signed[0] == signed[1]).mean()) - jaccard(set(one), set(other)))
    assert abs(np.mean(errors)) < 0.01 and 0.02 < np.std(errors) < 0.06


def test_order_and_repeats_change_no_signature() -> None:
    signed = minhash.signatures([["a", "b", "c"], ["c", "a", "b", "a"], []], 64)
    assert (signed[0] == signed[1]).all() and signed.shape == (3, 64)


def test_bands_by_hand() -> None:
    signed = np.array([[1, 2, 3, 4, 9], [1, 2, 4, 3, 9], [2, 1, 3, 4, 8]], np.uint32)
    bands = minhash.band_hashes(signed, 2, 2)
    assert bands.shape == (3, 2)
    assert bands[0, 0] == bands[1, 0] != bands[2, 0]  # (1, 2) is not (2, 1)
    assert bands[0, 1] == bands[2, 1] != bands[1, 1]


def test_bands_find_99_of_100_pairs_at_the_threshold() -> None:
    assert candidate_probability(0.5, 2, 2) == pytest.approx(1 - 0.75**2)
    assert NearDuplicateRules(threshold=0.8, num_perm=128).bands() == (21, 6)  # 1 - (1 - 0.8^6)^21 = 0.9983
    assert NearDuplicateRules(threshold=0.5, num_perm=128).bands() == (42, 3)
    assert candidate_probability(0.8, 21, 6) > 0.99 > candidate_probability(0.8, 18, 7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threshold": 0.2}, "greater than or equal to 0.3"),
        ({"shingle_size": 0}, "greater than or equal to 1"),
        ({"text": "all"}, "text: user, or against without benchmarks"),
        ({"against": ["benchmarks", "benchmarks"]}, "named once"),
        ({"against": ["nothing"]}, "against"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        NearDuplicateSettings.model_validate(given)


def test_the_fewest_hash_functions_are_enough_for_the_least_threshold() -> None:
    assert NearDuplicateRules(threshold=0.3, num_perm=16).bands() == (16, 1)  # 1 - 0.7^16 = 0.9967


# The walk.


def walk(
    sets: list[set[str]], threshold: float, num_others: int = 0, within: bool = True
) -> list[tuple[int, int, float]]:
    """The rule, word for word: all pairs are candidates."""
    pairs = []
    kept = list(range(num_others))
    for item in range(num_others, len(sets)):
        mine = [(other, jaccard(sets[item], sets[other])) for other in kept]
        others = [(item, other, like) for other, like in mine if other < num_others and like >= threshold]
        rows = [(item, other, like) for other, like in mine if other >= num_others and like >= threshold]
        pairs += others or rows
        if not others and not rows and within:
            kept.append(item)
    return pairs


def test_a_chain_loses_its_middle_only() -> None:
    """1 is alike to 0, 2 is alike to 1 and not to 0: 0 and 2 stay."""
    likeness = {(1, 0): 0.9, (2, 1): 0.9}
    bands = np.zeros((3, 1), np.uint64)
    found = greedy.near_duplicates(bands, np.ones(3, bool), 0, lambda a, b: likeness.get((a, b)))
    assert found.pairs == [greedy.Pair(1, 0, 0.9)] and not found.unfinished


def test_all_pairs_with_other_sets_are_told_and_one_within() -> None:
    bands = np.zeros((5, 1), np.uint64)  # 0 and 1 are of another set
    found = greedy.near_duplicates(bands, np.ones(5, bool), 2, lambda a, b: 1.0 if a != 3 else None)
    told = [(pair.item, pair.other) for pair in found.pairs]
    assert told == [(2, 0), (2, 1), (4, 0), (4, 1)]  # 3 stays, and 4 went before it was compared with 3


def test_items_without_text_meet_nobody() -> None:
    bands = np.zeros((3, 1), np.uint64)
    found = greedy.near_duplicates(bands, np.array([True, False, True]), 0, lambda a, b: 1.0)
    assert [(pair.item, pair.other) for pair in found.pairs] == [(2, 0)]


def test_a_crowd_is_bounded_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy, "MAX_COMPARISONS", 3)
    calls: list[tuple[int, int]] = []
    found = greedy.near_duplicates(np.zeros((6, 2), np.uint64), np.ones(6, bool), 0, lambda a, b: calls.append((a, b)))
    assert max(sum(a == item for a, _ in calls) for item in range(6)) == 3
    assert found.unfinished == [4, 5] and not found.pairs


@settings(max_examples=100)
@given(st.lists(st.sampled_from("abcdef"), max_size=30), st.integers(0, 12), st.booleans(), st.integers(1, 3))
def test_no_limit_hides_a_copy(texts: list[str], num_others: int, within: bool, limit: int) -> None:
    """a and b are alike, the others are not; all share their bands."""
    num_others = min(num_others, len(texts))
    hashes = np.array([ord(text) for text in texts], np.uint64)

    def alike(one: int, other: int) -> float | None:
        pair = {texts[one], texts[other]}
        return 1.0 if len(pair) == 1 else 0.9 if pair == {"a", "b"} else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "MAX_COMPARISONS", limit)
        patch.setattr(greedy, "MAX_KEPT_PER_BAND", limit)
        bands = np.zeros((len(texts), 2), np.uint64)
        found = greedy.near_duplicates(bands, np.ones(len(texts), bool), num_others, alike, within, hashes)
    gone = {pair.item for pair in found.pairs}
    for item in range(num_others, len(texts)):
        before = range(item) if within else range(num_others)
        assert item in gone or all(texts[other] != texts[item] for other in before)
    assert all(pair.other < num_others or pair.other not in gone for pair in found.pairs)


def test_a_copy_of_a_template_row_is_found_beside_another_set_of_them(tmp_path: Path) -> None:
    """More rows of the other set are candidates than are compared, and come first."""
    rng = random.Random(0)
    template = " ".join(f"word{number}" for number in range(60))
    rows = [
        conversation(number, f"{template} {' '.join(str(rng.randrange(10**6)) for _ in range(25))}")
        for number in range(700)
    ]
    copies = [conversation(700 + k, row["messages"][0]["content"].upper()) for k, row in enumerate(rows[-50:])]
    outputs, folder = run(tmp_path / "a", [*rows[600:], *copies], others={"sft": rows[:600]})
    assert outputs.num_unfinished > 0
    assert [(pair["row"], pair["other_row"]) for pair in pairs_of(folder)] == [(100 + k, 50 + k) for k in range(50)]


@given(st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=6), max_size=14), st.data())
def test_the_walk_is_brute_force_where_all_meet(texts: list[list[str]], data: st.DataObject) -> None:
    """With one band that all share, every pair is a candidate."""
    sets = [set(words) for words in texts]
    num_others = data.draw(st.integers(0, len(sets)))
    within = data.draw(st.booleans())

    def alike(one: int, other: int) -> float | None:
        like = jaccard(sets[one], sets[other])
        return like if like >= 0.6 else None

    found = greedy.near_duplicates(
        np.zeros((len(sets), 1), np.uint64), np.ones(len(sets), bool), num_others, alike, within
    )
    expected = walk(sets, 0.6, num_others, within)
    told = [(pair.item, pair.other, pair.jaccard) for pair in found.pairs]
    # Of the rows the first that is alike is told, and with one band these are in order.
    first = [pair for number, pair in enumerate(expected) if pair[1] < num_others or number == 0
             or expected[number - 1][0] != pair[0]]  # fmt: skip
    assert told == first


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), max_size=20))
def test_items_meet_where_they_share_a_band(values: list[list[int]]) -> None:
    bands = np.array(values, np.uint64).reshape(len(values), 3)
    items, places = greedy.meeting_places(bands, np.ones(len(bands), bool))
    met = {
        frozenset((a, b))
        for place in set(places.tolist())
        for a in items[places == place].tolist()
        for b in items[places == place].tolist()
        if a != b
    }
    expected = {frozenset((a, b)) for a in range(len(bands)) for b in range(a) if (bands[a] == bands[b]).any()}
    assert met == expected and (np.diff(items) >= 0).all()


# The stage.


def test_planted_near_duplicates_are_found_and_clean_rows_stay(tmp_path: Path) -> None:
    rng = random.Random(3)
    clean = [sentence(rng, rng.randint(20, 60)) for _ in range(300)]
    rows = [conversation(number, " ".join(words)) for number, words in enumerate(clean)]
    planted = {}
    for number in range(0, 300, 10):
        planted[len(rows)] = number
        rows.append(conversation(len(rows), " ".join(edited(rng, clean[number], 1)).upper() + "!", source=1))
    sets = [set(shingles(plain_words(row["messages"][0]["content"]), "words", 3)) for row in rows]
    expected = {copy: jaccard(sets[copy], sets[number]) for copy, number in planted.items()}
    wanted = {copy for copy, like in expected.items() if like >= 0.7}
    assert len(wanted) > 20
    outputs, folder = run(tmp_path, rows, policy="remove", threshold=0.7)
    found = pairs_of(folder)
    assert {pair["row"] for pair in found} == wanted
    for pair in found:
        assert pair["other_row"] == planted[pair["row"]] and pair["jaccard"] == expected[pair["row"]]
        assert pair["row_id"] == f"1:{pair['row']}" and pair["removed"] and pair["other_set"] == "itself"
    kept = read_rows(folder / outputs.file)
    assert kept == [row for number, row in enumerate(rows) if number not in wanted]
    assert outputs.num_removed == len(wanted) == outputs.num_rows_read - outputs.num_rows
    (count,) = outputs.counts
    assert (count.source, count.other_set, count.other_source) == ("1", "itself", "0")
    assert count.num_rows == count.num_others == len(wanted)


def test_recall_by_jaccard_against_brute_force(tmp_path: Path) -> None:
    """Of the pairs above the threshold at least 98 of 100 are found; below it none."""
    rng = random.Random(4)
    rows: list[dict[str, Any]] = []
    for _ in range(150):
        words = sentence(rng, 40)
        rows += [conversation(len(rows) + step, " ".join(edited(rng, words, step))) for step in range(2)]
    sets = [set(shingles(plain_words(row["messages"][0]["content"]), "words", 3)) for row in rows]
    expected = {item: like for item, _, like in walk(sets, 0.5)}
    _, folder = run(tmp_path, rows, threshold=0.5)
    found = {pair["row"]: pair["jaccard"] for pair in pairs_of(folder)}
    assert found.keys() <= expected.keys() and len(found) >= 0.98 * len(expected) > 100


def test_report_keeps_every_row_and_says_what_would_go(tmp_path: Path) -> None:
    rows = [conversation(number, "Tell me a story about the old lighthouse keeper.") for number in range(3)]
    outputs, folder = run(tmp_path, rows)
    assert (folder / "rows.parquet").read_bytes() == (tmp_path / "rows.parquet").read_bytes()
    assert (outputs.num_near_duplicates, outputs.num_removed, outputs.num_clusters) == (2, 0, 1)
    assert [pair["removed"] for pair in pairs_of(folder)] == [False, False]
    (cluster,) = pq.read_table(folder / "clusters.parquet").to_pylist()
    assert cluster == {"kept_set": "itself", "kept_row": 0, "kept_id": "0:0", "num_rows": 2, "rows": [1, 2]}


def test_other_sets_keep_theirs_and_rows_go(tmp_path: Path) -> None:
    held_out = {"prompt": [{"role": "user", "content": "How many eggs does the blue duck lay in one week?"}]}
    rows = [
        conversation(0, "How many EGGS does the blue duck lay in one week"),
        conversation(1, "How many eggs does the blue duck lay in one week"),
        conversation(2, "Where does the river end?"),
    ]
    outputs, folder = run(tmp_path, rows, policy="remove", others={"verified_eval": [held_out]})
    assert [row["id"] for row in read_rows(folder / "rows.parquet")] == ["0:2"]
    assert [(pair["row"], pair["other_set"], pair["other_id"], pair["exact"]) for pair in pairs_of(folder)] == [
        (0, "verified_eval", "0:0", True), (1, "verified_eval", "0:0", True),
    ]  # fmt: skip
    assert outputs.counts[0].num_rows == 2 and outputs.counts[0].num_others == 1


def test_benchmarks_are_read_from_their_index(tmp_path: Path) -> None:
    import pyarrow as pa

    index = tmp_path / "index"
    index.mkdir()
    fields = [["A train leaves the station at noon and travels north for nine hours.", "How far does it go?"], ["Why?"]]
    columns = {"instance": [0, 1], "benchmark": ["trains", "trains"], "row": [7, 9], "fields": fields}
    pq.write_table(pa.table(columns), index / "queries.parquet")
    question = "A train leaves the station at noon and travels north for ten hours. How far does it go?"
    outputs, folder = run(
        tmp_path / "run", [conversation(0, question), conversation(1, "Why")], threshold=0.6, index=index
    )
    assert [(pair["row"], pair["other_set"], pair["other_row"], pair["exact"]) for pair in pairs_of(folder)] == [
        (0, "benchmark trains", 7, False), (1, "benchmark trains", 9, True),
    ]  # fmt: skip
    page = (folder / outputs.page_file).read_text()
    assert "<mark> ten</mark>" in page and "<mark> nine</mark>" in page and "<script" not in page


def test_the_same_rows_in_any_batch_give_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smoltulu.tasks.near_duplicates import stage as stage_module

    rng = random.Random(5)
    words = [sentence(rng, 12) for _ in range(20)]
    rows = [conversation(number, " ".join(edited(rng, rng.choice(words), rng.randint(0, 2)))) for number in range(120)]
    written = []
    for size in (2048, 7):
        monkeypatch.setattr(stage_module, "_ROWS_AT_A_TIME", size)
        _, folder = run(tmp_path / str(size), rows, policy="remove", threshold=0.5)
        names = ("rows.parquet", "pairs.parquet", "clusters.parquet", "near_duplicates.html")
        written.append([(folder / name).read_bytes() for name in names])
    assert written[0] == written[1]


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False))
def test_every_removed_row_is_alike_to_a_row_that_stays(rng: random.Random) -> None:
    import tempfile

    words = [sentence(rng, rng.randint(1, 10)) for _ in range(4)]
    rows = [conversation(n, " ".join(edited(rng, rng.choice(words), rng.randint(0, 2)))) for n in range(30)]
    sets = {row["id"]: set(shingles(plain_words(row["messages"][0]["content"]), "words", 2)) for row in rows}
    with tempfile.TemporaryDirectory() as name:
        outputs, folder = run(Path(name), rows, policy="remove", threshold=0.5, shingle_size=2)
        kept = {row["id"] for row in read_rows(folder / "rows.parquet")}
        for pair in pairs_of(folder):
            assert pair["other_id"] in kept and pair["row_id"] not in kept
            assert jaccard(sets[pair["row_id"]], sets[pair["other_id"]]) == pair["jaccard"] >= 0.5
        assert len(kept) == outputs.num_rows == 30 - outputs.num_near_duplicates


def test_numbers_that_differ_are_other_words(tmp_path: Path) -> None:
    rows = [conversation(0, "What is 12 + 5?"), conversation(1, "What is 12 - 5?"), conversation(2, "What is 13 + 5?")]
    outputs, _ = run(tmp_path, rows)
    assert outputs.num_near_duplicates == 0


def test_a_task_with_other_numbers_can_be_another_task(tmp_path: Path) -> None:
    text = "The farmer sold {} eggs on Monday and twice as many on Tuesday, and wants to know how many eggs she sold"
    rows = [conversation(0, text.format(12)), conversation(1, text.format(15)), conversation(2, text.format(12) + ".")]
    for same_numbers, expected in ((False, {1: 0, 2: 0}), (True, {2: 0})):
        _, folder = run(tmp_path / str(same_numbers), rows, threshold=0.7, same_numbers=same_numbers)
        assert {pair["row"]: pair["other_row"] for pair in pairs_of(folder)} == expected


def test_rows_without_a_word_are_counted_and_stay(tmp_path: Path) -> None:
    outputs, _ = run(tmp_path, [conversation(number, "?!") for number in range(2)], policy="remove")
    assert outputs.num_without_text == 2 and outputs.num_rows == 2


def test_no_rows_and_no_row_left_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row to compare"):
        run(tmp_path / "none", [])
    rows = [conversation(0, "The same few words again")]
    with pytest.raises(ValueError, match=r"all 1 rows are alike.*policy: report"):
        run(tmp_path / "all", rows, policy="remove", others={"verified_eval": rows})


def test_words_that_differ_are_marked() -> None:
    left, right = marked("Anna buys 3 red apples", "Anna  buys 4 red apples")
    assert left == [("Anna buys", False), (" 3", True), (" red apples", False)]
    assert right == [("Anna  buys", False), (" 4", True), (" red apples", False)]
    long, _ = marked("a b c d", "a", num_words=2)
    assert long == [("a", False), (" b …", True)]


def test_pieces_are_the_whole_text() -> None:
    rng = random.Random(6)
    for one, other in pairwise([" ".join(sentence(rng, 10)) for _ in range(20)]):
        assert "".join(text for text, _ in marked(one, other)[0]) == one


def test_the_run_s_report_has_the_counts(tmp_path: Path) -> None:
    from smoltulu.tasks.report.render import _environment

    rows = [conversation(number, f"Tell me a story about {name}", source=number) for number, name in enumerate("aab")]
    outputs, _ = run(tmp_path, rows, policy="remove")
    section = str(_environment().get_template("sections.html.jinja").module.near_duplicates([("sft", outputs)]))
    assert "sft" in section and "1 removed" in section and "itself, source 0" in section


# Paraphrases.


def test_the_most_alike_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    from smoltulu.tasks.near_duplicates import paraphrases

    rows = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    others = np.array([[0.8, 0.6], [1, 0], [0.8, 0.6], [-1, 0]], np.float16)
    for size in (16_384, 1):
        monkeypatch.setattr(paraphrases, "_OTHERS_AT_A_TIME", size)
        found = list(paraphrases.most_alike(rows, others, 0.9))
        assert [(one.number, one.other) for one in found] == [(0, 1), (2, 0)]
        assert [one.cosine for one in found] == pytest.approx([1, 0.96], abs=1e-3)
    assert not list(paraphrases.most_alike(rows, others[:0], 0.5))


def test_numbers_of_a_text() -> None:
    from smoltulu.tasks.near_duplicates.paraphrases import numbers_of

    assert numbers_of("She paid $1,200.50 for 3 of 12, and 3 more.") == ("12", "1200.50", "3", "3")


def test_paraphrases_are_told_and_stay(tmp_path: Path) -> None:
    pytest.importorskip("wordllama")
    question = "A farmer has 12 cows and sells 5 of them. How many cows are left?"
    other = {"prompt": [{"role": "user", "content": question}]}
    rows = [
        conversation(0, "A farmer sells 5 cows. How many are left, if 12 cows were owned by the farmer?"),
        conversation(1, "A farmer sells 7 cows. How many are left, if 19 cows were owned by the farmer?"),
        conversation(2, "Write a poem about the northern lights over a frozen lake."),
        conversation(3, question.upper()),
    ]
    outputs, folder = run(tmp_path, rows, policy="remove", paraphrases=0.75, others={"verified_eval": [other]})
    assert [row["id"] for row in read_rows(folder / "rows.parquet")] == ["0:0", "0:1", "0:2"]
    assert (outputs.num_paraphrases, outputs.num_paraphrases_same_numbers) == (2, 1)
    told = pq.read_table(folder / "paraphrases.parquet").to_pylist()
    assert [(one["row"], one["other_set"], one["other_id"], one["same_numbers"]) for one in told] == [
        (0, "verified_eval", "0:0", True), (1, "verified_eval", "0:0", False),
    ]  # fmt: skip


def test_paraphrases_need_no_network() -> None:
    import subprocess
    import sys

    pytest.importorskip("wordllama")
    program = """
import socket
def refuse(*arguments, **options): raise AssertionError("the network was asked for")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from smoltulu.tasks.near_duplicates.paraphrases import embed
print(embed(["a red house", ""]).shape, abs(embed(["a red house"])).sum() > 1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "(2, 256) True", done.stderr


def test_another_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from smoltulu.tasks.near_duplicates import paraphrases

    pytest.importorskip("wordllama")
    paraphrases._load.cache_clear()
    monkeypatch.setattr(paraphrases, "_FILES", dict.fromkeys(paraphrases._FILES, "0"))
    with pytest.raises(ValueError, match="is not the model that this version was made with"):
        paraphrases.check_model()
    monkeypatch.setattr(paraphrases, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"install `smoltulu\[paraphrases\]`"):
        paraphrases.check_model()
