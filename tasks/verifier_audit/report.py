"""The reports of an audit, for people and for programs, and its figures for the report of a run."""

from __future__ import annotations

import json
from dataclasses import asdict

from smoltulu.schemas.verifier_audit import VerifierAuditConfig, VerifierAuditOutputs
from smoltulu.tasks.report.render import render
from smoltulu.tasks.verifier_audit.checks import chance_limit, checks, is_known


def json_report(config: VerifierAuditConfig, outputs: VerifierAuditOutputs) -> str:
    """The same as the page, for programs."""
    report = {
        "config": config.model_dump(mode="json"),
        "outputs": outputs.model_dump(mode="json"),
        "checks": [
            asdict(check) | {"examples": [one.model_dump() for one in check.examples]}
            for check in checks(outputs.groups, config.settings)
        ],
    }
    return json.dumps(report, indent=1, ensure_ascii=False)


def html_report(config: VerifierAuditConfig, outputs: VerifierAuditOutputs) -> str:
    """One page that loads nothing from anywhere."""
    return render(
        "verifier_audit.html.jinja",
        config=config,
        outputs=outputs,
        checks=checks(outputs.groups, config.settings),
        limits=[chance_limit(group, config.settings) for group in outputs.groups],
        known=[group.title for group in outputs.groups if is_known(group, config.settings)],
    )
