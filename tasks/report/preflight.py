"""What a run's preflights found: one line a training stage, in the report and in Prefect's table of the stage."""

from __future__ import annotations

from smoltulu.schemas.preflight import PreflightOutputs
from smoltulu.tasks.report import text


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
