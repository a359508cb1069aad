"""The reports of the preflight, for people and for programs, and the thresholds that the rows fail."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from smoltulu.schemas.preflight import PreflightConfig, PreflightOutputs
from smoltulu.tasks.preflight.checks import checks
from smoltulu.tasks.report.render import render

if TYPE_CHECKING:
    from smoltulu.tasks.preflight.rows import Shown


def problems(config: PreflightConfig, outputs: PreflightOutputs, examples: dict[str, list[int]]) -> list[str]:
    """Every threshold that the rows fail, in words."""
    return [str(check) for check in checks(config, outputs, examples) if check.status == "fails"]


def json_report(config: PreflightConfig, outputs: PreflightOutputs) -> str:
    """The same as the page, for programs."""
    examples = {name: list(rows) for name, rows in outputs.first_rows.items()}
    report = {
        "config": config.model_dump(mode="json"),
        "outputs": outputs.model_dump(mode="json"),
        "checks": [asdict(check) for check in checks(config, outputs, examples)],
    }
    return json.dumps(report, indent=1, ensure_ascii=False)


def html_report(
    config: PreflightConfig,
    outputs: PreflightOutputs,
    examples: dict[str, list[int]],
    texts: Mapping[int, str] | None = None,
    shown: Sequence[Shown] = (),
) -> str:
    """One page that loads nothing from anywhere. `texts`: row number -> the row as JSON, of those in `examples`."""
    training, texts = config.training, texts or {}
    findings = [
        (
            number,
            ", ".join(name.removeprefix("num_") for name, rows in examples.items() if number in rows),
            texts[number],
        )
        for number in sorted({row for rows in examples.values() for row in rows if row in texts})
    ]
    return render(
        "preflight.html.jinja",
        config=config,
        outputs=outputs,
        checks=checks(config, outputs, examples),
        num_steps=training.budget.num_steps(outputs.num_rows, outputs.num_tokens) if training else None,
        shown=shown,
        findings=findings,
    )
