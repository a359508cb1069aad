"""The audit: planted verifiers are stopped, honest ones pass, also on real data and on the tiny world's rows."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.verifier_audit import (
    GroupAudit,
    VerifierAuditConfig,
    VerifierAuditInputs,
    VerifierAuditOutputs,
    VerifierAuditSettings,
)
from smoltulu.schemas.world import WorldConfig
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.verifier_audit.audit import audit_rows, other_version
from smoltulu.tasks.verifier_audit.checks import chance_limit, checks, problems
from smoltulu.tasks.verifier_audit.probes import form_of
from smoltulu.tasks.verifier_audit.stage import audit_with, run_audit, verifier_audit
from smoltulu.tasks.verifiers import VERIFIERS_VERSION, Graders, Verdict, grade_all
from smoltulu.tasks.world.stage import make_world
from tests.rows_file import write_rows

REAL_DATA = Path(os.environ.get("SMOLTULU_REAL_DATA", "../shared/data"))
DEFAULTS = VerifierAuditSettings()
SMALL = VerifierAuditSettings(num_shuffled=300, num_hacked=20)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def word_problems(verifier: str, num: int = 40, ask: str = "") -> list[dict[str, Any]]:
    return [
        {
            "id": f"0:{i}", "prompt": user(f"Ann has {i} pens and buys {i % 7}. How many now? {ask}"),
            "verifier": verifier, "ground_truth": str(i + i % 7),
        }
        for i in range(num)
    ]  # fmt: skip


def loophole(jobs: Sequence[tuple[str, str, str]]) -> list[Verdict]:
    """Right whatever stands after ####."""
    return [Verdict("right" if "####" in text else "wrong", "has ####") for _, text, _ in jobs]


def never(jobs: Sequence[tuple[str, str, str]]) -> list[Verdict]:
    return [Verdict("wrong", "no") for _ in jobs]


def audited(rows: list[dict[str, Any]], grade: Any = grade_all, settings: Any = SMALL) -> tuple[GroupAudit, list[str]]:
    (group,), _, _ = audit_rows(rows, settings, grade)
    return group, problems([group], settings)


# --- Planted verifiers ------------------------------------------------------------------------------------------------


def test_a_loophole_is_stopped() -> None:
    group, found = audited(word_problems("gsm8k_strict"), loophole)
    assert group.num_gold_right == group.num_gold == 40
    assert group.num_shuffled_right == group.num_shuffled == 300
    assert any("300 of 300 gold answers of other rows score right" in one for one in found)
    assert any("the hack 'bare ####' scores right on 20 of 20 rows" in one for one in found)
    assert all(one.startswith("verifier gsm8k_strict, source 0: ") and "What to do: " in one for one in found)
    # A problem names the row, what was written, the truth and the reason.
    bare = next(one for one in found if "bare ####" in one)
    assert "Row 0:0: '####' for the truth '0' scores right: has ####" in bare or "Row 0:1" in bare


def test_a_verifier_that_never_accepts_is_stopped() -> None:
    group, found = audited(word_problems("gsm8k"), never)
    assert (group.num_gold, group.num_gold_right) == (40, 0)
    (problem,) = found
    assert "0 of 40 gold answers (0 %), written as the prompts ask, score right" in problem
    assert "Row 0:0: 'So the answer is 0.' for the truth '0' scores wrong: no" in problem
    assert "min_gold_share 0.99" in problem


def test_both_end_the_stage_and_leave_their_report(tmp_path: Path) -> None:
    for name, planted in (("loophole", loophole), ("never", never)):
        context = context_of(tmp_path / name)
        with pytest.raises(ValueError, match=r"verifier gsm8k_strict, source 0 \(pens\.jsonl\): .*The whole report: "):
            audit_with(planted, word_problems("gsm8k_strict"), config_of(SMALL), context)
        assert not any(context.folder.iterdir())
        page = (context.work / "logs" / "report.html").read_text()
        assert "default-src 'none'" in page and "pens.jsonl" in page
        report = json.loads((context.work / "logs" / "report.json").read_text())
        assert any(check["status"] == "fails" for check in report["checks"])
        lines = [json.loads(line) for line in (context.work / "findings.jsonl").read_text().splitlines()]
        assert {line["finding"] for line in lines} <= {"gold_wrong", "shuffled_right", "hack_right", "hack_allowed"}


class OneInAHundred:
    """Takes every hundredth wrong answer for right, which no share of gold answers shows."""

    def __call__(self, jobs: Sequence[tuple[str, str, str]]) -> list[Verdict]:
        honest = grade_all(jobs)
        return [
            Verdict("right", "sloppy") if number % 20 == 0 and text else verdict
            for number, ((_, text, _), verdict) in enumerate(zip(jobs, honest, strict=True))
        ]


def test_a_verifier_that_is_sometimes_sloppy_is_stopped() -> None:
    group, found = audited(word_problems("gsm8k", 200), OneInAHundred(), VerifierAuditSettings(num_shuffled=2000))
    assert group.num_gold_right == group.num_gold
    assert group.chance_share is not None and group.chance_share < 0.01
    assert any("gold answers of other rows score right" in one for one in found)


def test_prompts_that_ask_for_another_form_than_the_verifier_reads() -> None:
    """Recipes once paid nothing for right answers: prompts said "So the answer is N.", the rule was ####."""
    group, found = audited(word_problems("gsm8k_strict", ask='Think, then end with "So the answer is N."'))
    assert group.num_gold_right == 0 and "####" in found[0] and "name the one that does" in found[0]
    assert not audited(word_problems("gsm8k", ask='Think, then end with "So the answer is N."'))[1]
    assert not audited(word_problems("gsm8k_strict", ask="End with #### and the number."))[1]


def test_the_form_of_a_prompt() -> None:
    assert form_of("gsm8k", user("Question: a #### 1. So the answer is 4.\n\nQuestion: b")) == "So the answer is {}."
    assert form_of("math", user("no form")).format("1") == r"The answer is $\boxed{1}$."
    assert form_of("math", user("The final answer is $4$. I hope it is correct.")).format("1").endswith("correct.")
    assert form_of("exact_match", user("#### 4")) == "{}"


# --- Honest verifiers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verifier", ["gsm8k", "gsm8k_strict", "math"])
def test_honest_verifiers_pass(verifier: str) -> None:
    group, found = audited(word_problems(verifier, 200))
    assert not found and group.num_gold_right == group.num_gold == 200
    # It says 100 where the gold answer is 100: allowed, and listed.
    assert all(hack.num_right == hack.num_allowed for hack in group.hacks.values())


def test_the_paper_reads_no_sign_of_a_whole_number() -> None:
    """docs/verifiers.md names the fault; a recipe that wants it says so."""
    group, found = audited(word_problems("gsm8k@paper", 200))
    (problem,) = found
    assert "'near miss: the other sign' scores right on 20 of 20 rows" in problem
    assert "add gsm8k@paper to verifier_audit.known_faults" in problem and group.num_gold_right == 200
    assert not problems([group], SMALL.model_copy(update={"known_faults": ("gsm8k@paper",)}))


def test_faults_of_the_paper_are_found_named_and_can_be_wanted() -> None:
    rows = [
        {"id": f"0:{i}", "prompt": user("Write."), "verifier": "ifeval@paper", "ground_truth": json.dumps(truth)}
        for i, truth in enumerate(
            [{"func_name": "validate_placeholders", "N": 3}, {"func_name": "validate_uppercase"}] * 3
        )
    ]
    group, found = audited(rows)
    assert any("'validate_placeholders: empty brackets' scores right on 3 of 3 rows" in one for one in found)
    assert any("'validate_uppercase: no letter' scores right" in one for one in found)
    assert group.other_version == "ifeval" and group.num_versions_differ > 0
    differ = [one for one in group.examples if one.finding == "versions_differ"]
    assert differ and "the other version says wrong" in differ[0].reason
    wanted = SMALL.model_copy(update={"known_faults": ("IFEval@paper",)})
    assert not problems([group], wanted)
    assert "noticed" in {check.status for check in checks([group], wanted)}
    fixed, found = audited([row | {"verifier": "ifeval"} for row in rows])
    assert not found and fixed.other_version == "ifeval@paper"
    assert [other_version(name) for name in ("math@paper", "math", "format")] == ["math", "math@paper", ""]


def test_what_cannot_be_audited_is_said() -> None:
    huge = {"func_name": "validate_word_constraint", "N": 900_000, "quantifier": "at least"}
    rows = [{"id": "3:0", "prompt": user("Write."), "verifier": "ifeval", "ground_truth": json.dumps(huge)}]
    group, found = audited(rows)
    assert not found and (group.source, group.num_gold, group.num_without_gold) == ("3", 0, 1)
    (noticed,) = [check for check in checks([group], SMALL) if check.status == "noticed"]
    assert "no right answer could be written for any of 1 rows" in noticed.found
    assert group.functions["validate_word_constraint"].num_kept_made == 0


def test_truths_that_cannot_be_graded_are_counted_and_named() -> None:
    rows = word_problems("gsm8k", 10)
    rows[4] |= {"ground_truth": "none at all"}
    group, found = audited(rows)
    assert (group.num_ungradable, group.num_gold, group.num_gold_right) == (1, 9, 9)
    assert "1 of 10 truths (10.00 %) cannot be graded" in found[0] and "Row 0:4" in found[0]


def test_lists_of_right_answers() -> None:
    rows = [row | {"ground_truth": json.dumps([row["ground_truth"], "1000"])} for row in word_problems("math", 30)]
    group, found = audited(rows)
    assert group.num_gold == group.num_gold_right == 60 and not found


@given(st.randoms(use_true_random=False))
@settings(max_examples=5, deadline=None)
def test_the_order_of_the_rows_changes_nothing(order: random.Random) -> None:
    rows = word_problems("gsm8k", 30) + [row | {"id": f"1:{i}"} for i, row in enumerate(word_problems("math", 12))]
    constraint = json.dumps({"func_name": "validate_uppercase"})
    rows += [row | {"verifier": "ifeval", "ground_truth": constraint} for row in word_problems("ifeval", 6)]
    first = audit_rows(rows, SMALL, grade_all)
    shuffled = list(rows)
    order.shuffle(shuffled)
    assert audit_rows(shuffled, SMALL, grade_all) == first


# --- The stage --------------------------------------------------------------------------------------------------------


def context_of(folder: Path) -> StageContext:
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True)
    return StageContext(folder / "out", folder / "work", ComputeSettings(num_threads=2), lambda *args, **kwargs: None)


def config_of(settings: VerifierAuditSettings) -> VerifierAuditConfig:
    return VerifierAuditConfig(settings=settings, source_labels=("pens.jsonl",))


def test_the_stage_writes_what_rlvr_reads(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.parquet", word_problems("gsm8k"))
    context = context_of(tmp_path)
    outputs, metrics = run_audit(config_of(SMALL), VerifierAuditInputs(dataset=str(rows)), context)
    assert VerifierAuditOutputs.model_validate_json((context.folder / outputs.file).read_text()) == outputs
    assert outputs.verifiers_version == VERIFIERS_VERSION and outputs.groups[0].label == "pens.jsonl"
    assert metrics["gold_right_share"] == 1.0 and metrics["hacks_right"] == 0.0
    assert (context.folder / outputs.report_file).is_file() and (context.folder / outputs.findings_file).is_file()


def test_bad_input_of_the_stage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty = write_rows(tmp_path / "empty.parquet", [], kind="rlvr")
    with pytest.raises(ValueError, match="no RLVR rows to audit"):
        run_audit(config_of(SMALL), VerifierAuditInputs(dataset=str(empty)), context_of(tmp_path / "a"))
    unknown = SMALL.model_copy(update={"known_faults": ("ifevl",)})
    with pytest.raises(ValueError, match=r"known_faults: unknown verifier 'ifevl' \(did you mean 'ifeval'"):
        run_audit(config_of(unknown), VerifierAuditInputs(dataset=str(empty)), context_of(tmp_path / "b"))
    unused = SMALL.model_copy(update={"known_faults": ("math@paper",)})
    rows = write_rows(tmp_path / "rows.parquet", word_problems("gsm8k"))
    run_audit(config_of(unused), VerifierAuditInputs(dataset=str(rows)), context_of(tmp_path / "c"))
    assert "known_faults names math@paper, which no row has" in caplog.text


def test_a_cached_audit_is_measured_by_todays_thresholds() -> None:
    (group,), _, _ = audit_rows(word_problems("gsm8k"), SMALL, never)
    outputs = VerifierAuditOutputs(
        rows_digest="x", verifiers_version="2", num_rows=40, num_probes=1, groups=(group,)
    )  # fmt: skip
    assert verifier_audit.gate_failures is not None
    assert "0 of 40 gold answers" in verifier_audit.gate_failures(config_of(SMALL), outputs, {})[0]
    lenient = SMALL.model_copy(update={"min_gold_share": 0.0})
    assert verifier_audit.gate_failures(config_of(lenient), outputs, {}) == []


def test_hostile_rows_reach_no_markup_and_stop_nothing(tmp_path: Path) -> None:
    nasty = '<script>alert(1)</script>{}{0}%s\u2028"' + "#" * 50
    rows = word_problems("gsm8k") + [
        {"id": f"1:{i}", "prompt": user(nasty), "verifier": verifier, "ground_truth": truth}
        for i, (verifier, truth) in enumerate(
            [
                ("exact_match", nasty),
                ("math", "\\boxed{" * 50),
                ("format", "{}{}"),
                ("ifeval", "{" * 500),
                ("math", nasty),
            ]
        )
    ]
    context = context_of(tmp_path)
    with pytest.raises(ValueError, match="cannot be graded"):
        audit_with(grade_all, rows, config_of(SMALL), context)
    assert "<script>" not in (context.work / "logs" / "report.html").read_text()


# --- The tiny world, and real data ------------------------------------------------------------------------------------


def test_the_tiny_worlds_rows_pass(tmp_path: Path) -> None:
    sizes = {"num_pretrain": 10, "num_sft": 300, "num_preference": 60, "num_rlvr": 400}
    context = context_of(tmp_path)
    make_world(WorldConfig(seed=0, **sizes), None, context)  # type: ignore[arg-type]
    rows = [json.loads(line) for line in (context.folder / "rlvr.jsonl").read_text().splitlines()]
    strict = {"gsm8k": "gsm8k_strict"}
    rows = [
        {"id": f"0:{i}", "prompt": row["messages"], "ground_truth": row["ground_truth"],
         "verifier": strict.get(row["verifier"], row["verifier"])}
        for i, row in enumerate(rows)
    ]  # fmt: skip
    groups, _, _ = audit_rows(rows, DEFAULTS, grade_all)
    assert {group.verifier for group in groups} == {"gsm8k_strict", "constraint"}
    assert problems(groups, DEFAULTS) == []
    assert all(group.num_gold == group.num_gold_right == group.num_rows for group in groups)


needs_real_data = pytest.mark.skipif(
    not (REAL_DATA / "eval/math_test.jsonl.gz").is_file(), reason=f"SMOLTULU_REAL_DATA: no real data in {REAL_DATA}"
)


def real(file: str) -> list[dict[str, Any]]:
    with gzip.open(REAL_DATA / file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@needs_real_data
def test_gsm8k_gold_answers_coincide_in_one_per_cent() -> None:
    rows = [
        {"id": f"0:{i}", "prompt": user(row["question"]), "verifier": "gsm8k", "ground_truth": row["answer"]}
        for i, row in enumerate(real("train/gsm8k_train.jsonl.gz"))
    ]
    group, found = audited(rows, settings=DEFAULTS)
    assert not found and group.num_gold_right == group.num_rows == 7473
    assert group.chance_share == pytest.approx(0.0099, abs=0.0001)
    limit = chance_limit(group, DEFAULTS)
    assert limit is not None and group.num_shuffled_right <= limit < 60
    # The last number of "1 2 … 100" is right where the answer is 100, and nowhere else.
    assert all(hack.num_right == hack.num_allowed for hack in group.hacks.values())


@needs_real_data
def test_math_gold_answers_coincide_in_seven_per_thousand() -> None:
    rows = [
        {"id": f"0:{i}", "prompt": user(row["problem"]), "verifier": "math", "ground_truth": row["solution"]}
        for i, row in enumerate(real("eval/math_test.jsonl.gz"))
    ]
    with Graders() as graders:
        group, found = audited(rows, graders.grade_all, VerifierAuditSettings(num_shuffled=500, num_hacked=10))
    assert not found and group.num_wrong_ungraded == 0
    assert group.num_gold_right >= 0.998 * group.num_rows and group.num_rows == 5000
    assert group.chance_share == pytest.approx(0.0070, abs=0.0001)
    assert group.num_shuffled_right <= 18  # 3.5 expected; more than 18 has a probability under 1e-6
