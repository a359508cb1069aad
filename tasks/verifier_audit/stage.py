"""Audit of the verifiers before RLVR: on the rows that it will train on, before any training.

A policy learns whatever its verifier pays. So every verifier is tried on texts whose worth is known: gold answers, gold
answers of other rows, and hacks. This takes minutes and no model; a verifier that fails ends the run before SFT.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smoltulu.schemas.verifier_audit import VerifierAuditConfig, VerifierAuditInputs, VerifierAuditOutputs
from smoltulu.tasks.data.rows import rows_digest, stored_rows
from smoltulu.tasks.stage import Stage, StageContext
from smoltulu.tasks.verifier_audit.audit import Grade, audit_rows
from smoltulu.tasks.verifier_audit.checks import known_verifiers, problems
from smoltulu.tasks.verifier_audit.report import html_report, json_report
from smoltulu.tasks.verifiers import VERIFIERS_VERSION, Graders

#: Failed checks of which an error message tells; the report has all.
_NUM_SAID = 8

logger = logging.getLogger("smoltulu")


def run_audit(
    config: VerifierAuditConfig, inputs: VerifierAuditInputs, context: StageContext
) -> tuple[VerifierAuditOutputs, dict[str, float]]:
    """Audit, report. ValueError lists every threshold that a verifier fails, with the rows that show it."""
    known_verifiers(config.settings)
    rows = list(stored_rows(Path(inputs.dataset)))
    if not rows:
        raise ValueError("there are no RLVR rows to audit; look at data.rlvr and at what the preflight left out")
    with Graders(context.compute.num_threads) as graders:
        return audit_with(graders.grade_all, rows, config, context)


def audit_with(
    grade: Grade, rows: list[dict[str, Any]], config: VerifierAuditConfig, context: StageContext
) -> tuple[VerifierAuditOutputs, dict[str, float]]:
    """The stage, but for where rows and verdicts come from."""
    _warn_of_unused(config, {row["verifier"] for row in rows})
    groups, findings, num_probes = audit_rows(rows, config.settings, grade, config.source_labels, context.report)
    outputs = VerifierAuditOutputs(
        rows_digest=rows_digest(rows),
        verifiers_version=VERIFIERS_VERSION,
        num_rows=len(rows),
        num_probes=num_probes,
        groups=tuple(groups),
    )
    found = problems(groups, config.settings)
    # A failed audit makes no artifact: its report stays in `work`.
    folder = context.work if found else context.folder
    report = folder / outputs.report_file
    report.parent.mkdir(exist_ok=True)
    report.write_text(html_report(config, outputs), encoding="utf-8")
    report.with_suffix(".json").write_text(json_report(config, outputs), encoding="utf-8")
    with (folder / outputs.findings_file).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(finding, ensure_ascii=False) + "\n" for finding in findings)
    if found:
        more = f"; and {len(found) - _NUM_SAID:,} more" if len(found) > _NUM_SAID else ""
        raise ValueError("; ".join(found[:_NUM_SAID]) + more + f". The whole report: {report}")
    (folder / outputs.file).write_text(outputs.model_dump_json(indent=1) + "\n", encoding="utf-8")
    context.report(len(groups), len(groups))
    num_gold = sum(group.num_gold for group in groups)
    return outputs, {
        "num_rows": float(len(rows)),
        "num_probes": float(num_probes),
        "gold_right_share": sum(group.num_gold_right for group in groups) / max(num_gold, 1),
        "hacks_right": float(sum(h.num_right - h.num_allowed for group in groups for h in group.hacks.values())),
    }


def _warn_of_unused(config: VerifierAuditConfig, verifiers: set[str]) -> None:
    for name in known_verifiers(config.settings):
        if name not in verifiers:
            logger.warning(
                "verifier_audit.known_faults names %s, which no row has: it changes nothing (rows have %s)",
                name,
                ", ".join(sorted(verifiers)),
            )


def _gate_failures(
    config: VerifierAuditConfig, outputs: VerifierAuditOutputs, metrics: Mapping[str, float]
) -> list[str]:
    return problems(outputs.groups, config.settings)


verifier_audit = Stage(
    "verifier_audit", 1, VerifierAuditConfig, VerifierAuditInputs, VerifierAuditOutputs, run_audit, _gate_failures,
    grows_with_model=False,
)  # fmt: skip
