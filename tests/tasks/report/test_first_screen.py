"""The first screen of a run's report, the answers side by side, and pages of runs that have not ended."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.schemas.run import RunSummary
from smoltulu.schemas.verdict import Answer, AnsweredPrompt, Verdict
from smoltulu.tasks.report import html_report, markdown, summarise
from smoltulu.tasks.report.index import IndexedRun, index_page
from tests.browser import BROWSER, browser
from tests.tasks.report.test_hostile import HARMLESS, HOSTILE
from tests.tasks.report.test_report import Page, check_page, sample_run
from tests.tasks.report.test_verdict import NONE, OF_BASE, RLVR

WIDE = "w" * 3000
PHONE = 390


def prompts(text: str = HARMLESS) -> tuple[AnsweredPrompt, ...]:
    def answer(subject: str, is_right: bool | None, **more: Any) -> Answer:
        return Answer(subject=subject, text=f"{text} by {subject}", value=0.25, is_right=is_right, **more)

    models = [
        answer("sft", True),
        answer("dpo", None, marks=("empty",)),
        answer("rlvr", False, reason=text, num_samples=4),
    ]
    long = answer("rlvr", True).model_copy(update={"text": f"start {text} " + "y" * 900 + " end", "num_left_out": 7})
    return (
        AnsweredPrompt(task="greedy", id=text, fate="lost", prompt=text, target=text, answers=tuple(models)),
        AnsweredPrompt(task="verified_sampled", id="0:1", fate="right", answers=(long,)),
    )


def page_of(folder: Path, text: str = HARMLESS, made: int | None = None, **changes: Any) -> str:
    summary, manifests, folders, recipe = sample_run(folder, made=made)
    for node, start in (("sft", "base-model"), ("dpo", "sft"), ("rlvr", "dpo")):
        if node in manifests:
            inputs = manifests[node].inputs | {"model": manifests[node].inputs[f"input_{start}"]}
            manifests[node] = manifests[node].model_copy(update={"inputs": inputs})
    none = NONE.model_copy(update={"changes": tuple(one.model_copy(update={"reason": text}) for one in NONE.changes)})
    verdict = Verdict(
        measured=("base_model", "sft", "dpo", "rlvr"), comparisons=(none, RLVR, OF_BASE), unreadable={"dpo": text}
    )
    return html_report(
        summary.model_copy(update={"verdict": verdict} | changes), manifests, folders, recipe, prompts(text)
    )


def words_of(source: str) -> str:
    return " ".join(" ".join(check_page(source).words).split())


def test_the_first_screen_says_whether_it_is_good_before_anything_else(tmp_path: Path) -> None:
    source = page_of(tmp_path)
    words = words_of(source)
    first = words.partition("Scores Answers side by side")[0]  # the navigation
    assert "Made: RLVR , 1,070,464 parameters, by way of Base model → SFT → DPO → RLVR" in first
    assert (
        "RLVR is better than DPO on 1 of 2 scores and is better than Base model on 1 of 2 scores and worse on 1."
        in first
    )
    assert "RLVR over DPO: sampled +6.1 ± 0.6, greedy not distinguishable" in first
    assert "at 5 % for all 4 tests of this page together (Holm)" in first
    assert "DPO is compared with no other model: its samples cannot be read. x" in first
    assert "smoltulu chat tiny-20261121-070000:rlvr" in first and "chat tiny-20261121-070000:reward-model" not in first
    assert source.index('id="verdict"') < source.index('class="facts"') < source.index('id="scores"')
    assert source.index('id="scores"') < source.index('id="answers"') < source.index('id="stages"')


def test_answers_stand_side_by_side(tmp_path: Path) -> None:
    source = page_of(tmp_path)
    words = words_of(source)
    assert "greedy x lost by RLVR" in words and "SFT right" in words and "DPO 0.25 · empty" in words
    assert "RLVR wrong x by rlvr first of 4 samples, mean 0.25; x" in words
    assert "The samples keep the digest of this prompt only." in words
    assert "… and 7 characters more, in the samples" in words
    # A long answer is folded, and whole: nothing of it needs the script.
    folded = re.search(
        r'<details class="plain long"><summary><pre>(.*?)…</pre></summary><pre>(.*?)</pre>', source, re.S
    )
    assert folded and len(folded[1]) == 400 and folded[2].startswith(folded[1]) and "y end" in folded[2]
    assert '<div class="finder" hidden>' in source, "the search box is there only where the script runs"
    assert source.count("data-find") - source.count("[data-find]") == 2
    without = html_report(*sample_run(tmp_path / "without"))
    assert "Answers side by side" not in without and "<script" not in without


@pytest.mark.parametrize("bad", HOSTILE)
def test_answers_and_reasons_stay_text(bad: str, tmp_path: Path) -> None:
    """Whatever a model writes; what cannot be shown is written out, `\\u202e`."""
    harmless, hostile = Page(page_of(tmp_path / "a")), Page(page_of(tmp_path / "b", bad))
    assert not hostile.open
    # A text of several lines, or a long one, lies in other boxes than a short one.
    boxes = {"pre", "details", "summary", "div", "code", "span", "p"}
    built = [[(tag, list(names)) for tag, names in page.tags if tag not in boxes] for page in (harmless, hostile)]
    assert built[0] == built[1]
    source = page_of(tmp_path / "c", bad)
    check_page(source)
    for character in "\u202e\u2066\u200f\u2028\u2029\x1b\x00":
        assert character not in source
        if character in bad:
            assert f"\\u{ord(character):04x}" in source


def test_a_page_of_a_run_that_goes_on_says_what_is_not_there_yet(tmp_path: Path) -> None:
    summary, manifests, folders, recipe = sample_run(tmp_path, made=15)
    stages = [
        one.model_copy(update={"outcome": "Running", "error": None, "seconds": 0.0}) if one.outcome == "Failed" else one
        for one in summary.stages
    ]
    going = {"state": "Running", "finished_at": "", "error": None, "written_at": "2026-11-21T07:03:00+00:00"}
    summary = summary.model_copy(update={"stages": tuple(stages), **going})
    words = words_of(html_report(summary, manifests, folders, recipe))
    assert (
        "The run goes on. 15 of 23 stages are there; running: evaluation-reward-model. Written 2026-11-21 07:03:00 UTC"
        in words
    )
    assert "3 min 00 s so far" in words and "Stopped" not in words
    assert "Not there yet: evaluation-reward-model (running), evaluation-dpo (not run)," in words
    killed = [one.model_copy(update={"outcome": "Killed"}) if one.outcome == "Running" else one for one in stages]
    words = words_of(
        html_report(summary.model_copy(update={"state": "Killed", "stages": tuple(killed)}), manifests, folders, recipe)
    )
    assert "Killed. The process of this run ended without a word, while these ran: evaluation-reward-model." in words
    assert "Not there: evaluation-reward-model (killed)," in words and "The run goes on" not in words


@pytest.mark.parametrize("made", [0, 10, 12, 14, 18])
def test_a_run_that_stopped_anywhere_claims_nothing_that_was_not_measured(made: int, tmp_path: Path) -> None:
    words = words_of(html_report(*sample_run(tmp_path, made=made)))
    assert "No language model has been measured, so nothing can be said of one." in words
    assert "Not there: " in words and ("No model has been made" in words) == (made < 10)


def test_counts_stand_beside_every_score(tmp_path: Path) -> None:
    _, manifests, folders, recipe = sample_run(tmp_path)
    counted = {"num_empty": 3, "num_unparsed": 0, "num_truncated": 12, "num_left_cut": 1, "is_near_chance": True}
    before = {"num_truncated": 5, "num_ungradable": 2}  # of prompts, in evaluations of earlier versions
    for node, details in (("evaluation-sft", counted), ("evaluation-dpo", before)):
        scores = [score | {"details": details} for score in manifests[node].outputs["scores"]]
        outputs = manifests[node].outputs | {"scores": scores}
        manifests[node] = manifests[node].model_copy(update={"outputs": outputs})
    made = [
        (
            ArtifactReference(stage="evaluation", node=node, key=one.key, digest=one.digest, path="p", outcome="Cached",
                              outputs=one.outputs, metrics={}),
            one,
        )
        for node, one in manifests.items() if node.startswith("evaluation")
    ]  # fmt: skip
    again = summarise(planned=[], made=made, run_name="r", recipe="t", state="Completed", started_at="", finished_at="")
    words = words_of(html_report(again, manifests, folders, recipe))
    assert "0.702 ± 0.020 n = 500 near chance 3 empty 12 cut at the limit 1 prompts cut" in words
    assert "0.706 ± 0.020 n = 500 5 prompts cut 2 not graded" in words
    assert "5 prompts cut" in words and "5 cut at the limit" not in words and "0 unparsed" not in words
    assert "A score near chance is within noise of what guessing gives." in words
    assert json.loads(again.model_dump_json())["scores"][3]["counts"] == {
        "empty": 3,
        "cut at the limit": 12,
        "prompts cut": 1,
    }
    assert "near chance, 3 empty" in markdown(again)


def test_the_markdown_of_a_run_says_it_too(tmp_path: Path) -> None:
    summary, *_ = sample_run(tmp_path)
    text = markdown(summary.model_copy(update={"verdict": Verdict(measured=("dpo", "rlvr"), comparisons=(RLVR,))}))
    assert "- **RLVR over DPO**: sampled +6.1 ± 0.6, greedy not distinguishable" in text


# A phone: 390 pixels.


def pages(folder: Path) -> dict[str, str]:
    """Pages with words that do not break, long tables and long names."""
    run = IndexedRun(WIDE, WIDE, "Running", "2026", 1.0, 1, 2, "a", [("RLVR", WIDE)], WIDE)
    return {
        "run": page_of(folder, WIDE),
        "going on": page_of(folder, WIDE, made=15, state="Running", run_name=WIDE, recipe=WIDE, error=WIDE),
        "index": index_page(WIDE, [run] * 3, [WIDE], "2026-11-21T07:03:00+00:00"),
    }


def test_what_is_wider_than_a_phone_lies_in_a_box_that_scrolls(tmp_path: Path) -> None:
    """The rules that the style keeps, without a browser.

    Every table and drawing of fixed width lies in a `.scroll`, texts that do not break in tables only, and no width in
    the style is above what a phone has inside the page's margins.
    """
    room = PHONE - 2 * 16
    for name, source in pages(tmp_path).items():
        page = Nested(source)
        for tag, classes, inside in page.boxes:
            is_wide = tag == "table" or "lineage" in classes
            assert not is_wide or "scroll" in inside, f"{name}: a {tag} outside of .scroll"
            assert not classes & {"n", "tight", "key"} or "scroll" in inside, f"{name}: a text that does not break"
        style = source[source.index("<style>") : source.index("</style>")]
        assert re.search(r"\.scroll \{[^}]*overflow-x: auto", style)
        outside = re.sub(r"max-width: \d+px|@media \(max-width: \d+px\)", "", style)
        widths = [int(found) for found in re.findall(r"(?:width|minmax\(min\(100%, |minmax\()[: ]*(\d+)px", outside)]
        assert widths and max(widths) <= room, f"{name}: {max(widths)} px of {room}"


class Nested(Page):
    """Every element with its classes and the classes of those around it."""

    def __init__(self, source: str) -> None:
        self.around: list[set[str]] = []
        self.boxes: list[tuple[str, set[str], set[str]]] = []
        super().__init__(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = set((dict(attrs).get("class") or "").split())
        self.boxes.append((tag, classes, set().union(*self.around)))
        if tag not in self.VOID:
            self.around.append(classes)
        super().handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        self.around.pop()
        super().handle_endtag(tag)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")
def test_a_browser_of_390_pixels_scrolls_no_page_sideways(tmp_path: Path) -> None:
    """And the search box works under the page's own policy; without scripts there is none, and all else is there."""
    (tmp_path / "pages").mkdir()
    with browser(tmp_path / "profile") as shown:
        for number, (name, source) in enumerate(pages(tmp_path / "made").items()):
            file = tmp_path / "pages" / f"{number}.html"
            file.write_text(source, "utf-8")
            shown.open(file, PHONE)
            assert shown.value("document.documentElement.scrollWidth") == PHONE, name
            assert shown.value("document.querySelector('.finder').hidden") is False
            shown.value(
                "box = document.querySelector('input[data-of]'); box.value = 'LOST by'; "
                "box.dispatchEvent(new Event('input'))"
            )
            left = shown.value("[...document.querySelectorAll('[data-find]')].filter((one) => !one.hidden).length")
            assert left == {"run": 1, "going on": 1, "index": 0}[name]
            shown.ask("Emulation.setScriptExecutionDisabled", value=True)
            shown.open(file, PHONE)
            assert shown.value("getComputedStyle(document.querySelector('.finder')).display") == "none"
            shown.ask("Emulation.setScriptExecutionDisabled", value=False)


def test_the_summary_of_a_run_survives_json(tmp_path: Path) -> None:
    summary, *_ = sample_run(tmp_path)
    summary = summary.model_copy(update={"verdict": Verdict(measured=("dpo", "rlvr"), comparisons=(RLVR, NONE))})
    assert RunSummary.model_validate_json(summary.model_dump_json()) == summary
