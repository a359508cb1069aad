"""The reports of the preflight, for people and for programs, and the thresholds that the rows fail."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from smoltulu.schemas.preflight import PreflightConfig, PreflightOutputs
from smoltulu.schemas.training import TrainingSettings
from smoltulu.tasks.preflight.checks import checks
from smoltulu.tasks.report.render import render

if TYPE_CHECKING:
    from smoltulu.tasks.preflight.rows import Shown


def problems(config: PreflightConfig, outputs: PreflightOutputs) -> list[str]:
    """Every threshold that the rows fail, in words."""
    return [str(check) for check in checks(config, outputs) if check.status == "fails"]


def json_report(config: PreflightConfig, outputs: PreflightOutputs) -> str:
    """The same as the page, for programs."""
    report = {
        "config": config.model_dump(mode="json"),
        "outputs": outputs.model_dump(mode="json"),
        "checks": [asdict(check) for check in checks(config, outputs)],
    }
    return json.dumps(report, indent=1, ensure_ascii=False)


def html_report(
    config: PreflightConfig,
    outputs: PreflightOutputs,
    training: TrainingSettings | None,
    texts: Mapping[int, str],
    shown: Sequence[Shown],
) -> str:
    """One page that loads nothing from anywhere.

    training  settings of the training that the rows are for
    texts     row number -> the row as JSON, of the first rows of each finding
    """
    first_rows = outputs.first_rows.items()
    findings = [
        (number, ", ".join(name.removeprefix("num_") for name, rows in first_rows if number in rows), text)
        for number, text in sorted(texts.items())
    ]
    return render(
        "preflight.html.jinja",
        config=config,
        outputs=outputs,
        training=training,
        checks=checks(config, outputs),
        num_steps=training.budget.num_steps(outputs.num_rows, outputs.num_tokens) if training else None,
        shown=shown,
        findings=findings,
    )
