"""The commands nightly pin, unpin and show, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from smoltulu.artifacts.manifests import Ref
from smoltulu.tasks.nightly.history import History
from smoltulu.tasks.nightly.pins import read_pins
from tests.flows.cli.test_store_cli import call, words
from tests.hand_store import HandStore, pipeline
from tests.tasks.nightly.test_history import model, night, score


@pytest.fixture
def store(tmp_path: Path) -> HandStore:
    return HandStore(tmp_path / "store")


def pinned(store: HandStore, recipe: str = "by-hand") -> dict[str, str]:
    return {node: pin.measured.key for node, pin in read_pins(store.root, recipe).held().items()}


def test_a_run_pins_all_its_evaluations_and_a_key_or_tag_that_of_a_model(store: HandStore) -> None:
    made = pipeline(store)
    store.run("first", made)
    output = call(store, "nightly", "pin", "first").output
    sft, dpo = made["evaluation-sft"], made["evaluation-dpo"]
    assert f"by-hand: baseline of evaluation-sft is evaluation/{sft.key[:12]} gen-0001" in output
    assert pinned(store) == {"evaluation-sft": sft.key, "evaluation-dpo": dpo.key}
    assert call(store, "nightly", "unpin", "evaluation-sft").output.startswith(
        f"by-hand: evaluation-sft has no baseline any more; it was evaluation/{sft.key[:12]} gen-0001, pinned 20"
    )
    store.tag("good", made["sft"])
    # The model, by its tag; its evaluation, by its key; and one model as another's baseline.
    for what, given, expected in (
        ("good", (), {"evaluation-sft": sft.key, "evaluation-dpo": dpo.key}),
        (dpo.key[:12], (), {"evaluation-sft": sft.key, "evaluation-dpo": dpo.key}),
        ("good", ("--for", "evaluation-dpo"), {"evaluation-sft": sft.key, "evaluation-dpo": sft.key}),
    ):
        call(store, "nightly", "pin", what, *given)
        assert pinned(store) == expected
    assert pinned(store, "other") == {}
    call(store, "nightly", "pin", "good", "--recipe", "other")
    assert pinned(store, "other") == {"evaluation-sft": sft.key}


def test_what_cannot_be_pinned_is_one_clear_message(store: HandStore) -> None:
    made = pipeline(store)
    store.run("first", {"sft": made["sft"]})
    store.run("second", made, recipe="another")
    for what, options, said in (
        ("nobody", (), "has no key, tag or run 'nobody'"),
        (made["dataset-sft"].key[:12], (), "is neither an evaluation nor an evaluated model; evaluate it first"),
        ("first", (), "run first has no finished evaluation; run it first, or pin another"),
        ("second", ("--for", "evaluation-sft"), "second has 2 evaluations, evaluation-sft, evaluation-dpo; name one"),
        (made["sft"].key[:12], (), "give --recipe NAME; the store knows another, by-hand"),
        ("second", ("--recipe", "../up"), "'../up' is no recipe's name"),
    ):
        assert said in call(store, "nightly", "pin", what, *options, code=1).output
    assert "by-hand has no baseline of any evaluation" in call(
        store, "nightly", "unpin", "--recipe", "by-hand", code=1
    ).output  # fmt: skip
    again = store.evaluate(made["sft"], 0.5, harness="other")
    said = call(store, "nightly", "pin", made["sft"].key[:12], "--recipe", "another", code=1).output
    assert "was evaluated more than once as evaluation-sft" in said and again.key[:12] in said
    assert not (store.root / "history").exists()


def test_show_says_who_pinned_what_and_what_the_nights_told(store: HandStore) -> None:
    made = pipeline(store)
    store.run("first", made)
    assert "by-hand: no baseline; `smoltulu nightly pin` chooses one" in call(store, "nightly", "show").output
    call(store, "nightly", "pin", "first")
    call(store, "nightly", "unpin", "evaluation-dpo")
    history = History(store.root, "by-hand")
    history.add(night(1, score(1, model(1))), [])
    cut = history.add(night(2), [])
    cut.write_bytes(b"PAR1")
    result = call(store, "nightly", "show")
    output = words(result.output)
    held = read_pins(store.root, "by-hand").held()["evaluation-sft"]
    assert (
        f"{held.pinned_by} {held.pinned_at} now" in output
        and "2026-10-01T03:00:00+00:00 night-1 well no real" in output
    )
    assert f"note: history {cut.name} cannot be read" in result.output and cut.exists()  # who looks changes nothing
    values = json.loads(call(store, "nightly", "show", "--json").stdout)
    assert [bool(pin["unpinned_by"]) for pin in values["pins"]] == [False, True]
    assert [row["kind"] for row in values["nights"]] == ["night", "score"]
    assert words(call(store, "nightly", "show", "--recipe", "new").output) == (
        "new: no baseline; `smoltulu nightly pin` chooses one no night yet"
    )


def test_a_pinned_evaluation_stays_where_gc_takes_all(store: HandStore) -> None:
    made = pipeline(store)
    store.run("first", {"evaluation-sft": made["evaluation-sft"]})
    store.make("evaluation", "evaluation-sft", {"model": made["sft"]}, content="again")
    call(store, "nightly", "pin", "first")
    call(store, "gc", "--yes", "--keep-days", "0", "--keep-runs", "0")
    assert Ref("evaluation", pinned(store)["evaluation-sft"]) in store.finished()


@pytest.mark.parametrize("file", ["pins.json", "told.json"])
def test_gc_takes_nothing_where_it_cannot_see_what_nights_need(store: HandStore, file: str) -> None:
    """Of a newer version, or cut short: a baseline that was removed would be gone when the file is mended."""
    made = pipeline(store)
    store.pin("evaluation-sft", made["evaluation-sft"])
    (store.root / "history" / "by-hand" / file).write_text('{"pins": [')
    output = call(store, "gc", "--yes", "--keep-days", "0", "--keep-runs", "0", code=1).output
    assert f"{file} cannot be read" in output and "gc would remove what it names" in output
    assert set(made.values()) <= store.finished()


def test_pinning_imports_nothing_heavy(store: HandStore) -> None:
    store.run("first", pipeline(store))
    code = (
        "import sys\nfrom smoltulu.flows.cli.main import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'torch', 'transformers', 'lm_eval', 'prefect', 'pyarrow'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "nightly", "pin", "first", "--store", str(store.root)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.endswith("[]\n")
