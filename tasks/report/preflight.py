"""What a run's preflights found: one line a training stage, in the report and in Prefect's table of the stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from smoltulu.schemas.artifact import Manifest
from smoltulu.schemas.preflight import PreflightOutputs
from smoltulu.schemas.run import StageRun
from smoltulu.tasks.report import text
from smoltulu.tasks.report.markup import e, table


def preflight_section(stages: Sequence[StageRun], manifests: Mapping[str, Manifest]) -> str:
    """One line per preflight that was made; nothing where there is none."""
    rows = []
    for run in stages:
        manifest = manifests.get(run.node)
        if manifest is None:
            continue
        try:
            figures = preflight_figures(PreflightOutputs.model_validate(manifest.outputs))
        except ValidationError:
            continue
        cells = "".join(f'<td class="n">{e(value)}</td>' for value in figures.values())
        rows.append(f'<tr><th scope="row" class="tight">{e(run.node.removeprefix("preflight-"))}</th>{cells}</tr>')
        heads = list(figures)
    if not rows:
        return ""
    note = "Lengths in tokens, before anything is cut. The preflight's own folder has its report with every check."
    return table(["Training", *((head, "n") for head in heads)], rows) + f'<p class="muted">{note}</p>'


def preflight_figures(outputs: PreflightOutputs) -> dict[str, str]:
    """The figures of one preflight, by their name, as a reader sees them."""
    source = max(outputs.num_source_rows, 1)
    left_out = outputs.num_empty + outputs.num_malformed
    run = outputs.dry_run
    trained = outputs.num_trained_tokens / max(outputs.num_tokens, 1)
    return {
        "Rows": f"{outputs.num_rows:,} of {outputs.num_source_rows:,}",
        "Dropped": text.percent(outputs.num_dropped / source),
        "Cut": text.percent(outputs.num_truncated / source),
        "Left out": f"{left_out:,}",
        "Tokens an epoch": f"{outputs.num_tokens:,}",
        "Trained": text.percent(trained) if outputs.num_trained_tokens else "–",
        "Mean length": f"{outputs.lengths.mean:,.0f}",
        "Longest": f"{outputs.lengths.percentiles.get('100', 0):,}",
        "Peak memory": "–" if run is None else text.size(run.peak_memory_bytes),
    }
