"""What the preflight found, for people: the page, and the thresholds that are not met."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from smoltulu.schemas.preflight import LengthReport, PreflightConfig, PreflightOutputs
from smoltulu.tasks.preflight.checks import Check, checks
from smoltulu.tasks.report import text
from smoltulu.tasks.report.charts import ticks
from smoltulu.tasks.report.document import document
from smoltulu.tasks.report.markup import e, preformatted, table

if TYPE_CHECKING:
    from smoltulu.tasks.preflight.rows import Shown

_STATUS_CLASSES = {"ok": "good", "noticed": "warn", "fails": "bad"}


def problems(config: PreflightConfig, outputs: PreflightOutputs, examples: dict[str, list[int]]) -> list[str]:
    """Every threshold that the rows do not meet, in words."""
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
    found = checks(config, outputs, examples)
    title = f"Preflight of {text.title(config.subject)}" if config.subject else "Preflight"
    body = (
        f"<header><h1>{e(title)}</h1>{_facts(config, outputs, found)}</header><main>"
        f"<section><h2>Checks</h2>{_checks(found)}</section>"
        f"<section><h2>Lengths</h2>{_lengths(config, outputs.lengths)}</section>"
        f"<section><h2>Dry run</h2>{_dry_run(outputs)}</section>"
        f"{_rows(config, shown)}{_findings(examples, texts or {})}</main>"
        "<footer>Rows are counted from 0, as in the rows file of the data set.</footer>"
    )
    return document(title, body)


def _facts(config: PreflightConfig, outputs: PreflightOutputs, found: Sequence[Check]) -> str:
    counts = {status: sum(check.status == status for check in found) for status in _STATUS_CLASSES}
    facts = [
        ("Checks", ", ".join(f'<span class="{_STATUS_CLASSES[s]}">{n} {s}</span>' for s, n in counts.items() if n)),
        ("Rows", f"{outputs.num_rows:,} of {outputs.num_source_rows:,}"),
        ("Tokens an epoch", f"{outputs.num_tokens:,}"),
    ]
    if config.kind != "prompts":
        share = outputs.num_trained_tokens / max(outputs.num_tokens, 1)
        facts.append(("Trained tokens", f"{outputs.num_trained_tokens:,} ({text.percent(share)})"))
    facts.append(("Longest row", f"{outputs.longest:,} tokens of {config.max_length:,}"))
    steps = config.training and config.training.budget.num_steps(outputs.num_rows, outputs.num_tokens)
    if config.training is not None and steps is not None:
        facts.append(("Planned steps", f"{steps:,}, effective batch {config.training.effective_batch_size:,}"))
    if outputs.disk_bytes is not None:
        facts.append(("Disk of the training", f"up to {text.size(outputs.disk_bytes)}"))
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{items}</dl>'


def _checks(found: Sequence[Check]) -> str:
    rows = []
    for check in found:
        numbers = f"<small>rows {', '.join(f'{row:,}' for row in check.rows)}</small>" if check.rows else ""
        advice = "" if check.status == "ok" else e(check.advice)
        rows.append(
            f'<tr><th scope="row" class="tight">{e(check.name)}</th>'
            f'<td class="{_STATUS_CLASSES[check.status]} tight">{check.status}</td>'
            f"<td>{e(check.found)}{numbers}</td><td>{e(check.threshold)}</td><td>{advice}</td></tr>"
        )
    return table(["check", "", "found", "allowed", "what to do"], rows)


def _lengths(config: PreflightConfig, lengths: LengthReport) -> str:
    heads: list[str | tuple[str, str]] = [("mean", "n")]
    heads += [("longest" if p == "100" else f"{p} %", "n") for p in lengths.percentiles]
    cells = "".join(f'<td class="n">{value:,}</td>' for value in (round(lengths.mean), *lengths.percentiles.values()))
    longer = "Tokens of a pair's longer side" if config.kind == "pairs" else "Tokens of a row"
    note = f'<p class="muted">{longer} as it is written, nothing cut. The last bar holds all that is longer.</p>'
    return note + histogram(lengths, config.max_length) + table(heads, [f"<tr>{cells}</tr>"])


def histogram(lengths: LengthReport, max_length: int) -> str:
    """Bars of rows over tokens, with a line at max_length, as inline SVG."""
    bins = lengths.histogram
    if not any(bins):
        return '<p class="muted">No rows.</p>'
    width, height, left, right, top, bottom = 760, 200, 56, 10, 10, 26
    end, most = len(bins) * lengths.bin_width, max(bins)

    def x(tokens: float) -> float:
        return left + tokens / end * (width - left - right)

    def y(rows: float) -> float:
        return top + (1 - rows / most) * (height - top - bottom)

    parts = []
    for value in ticks(0, most):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y(value) + 3.5:.1f}" text-anchor="end">{value:,.0f}</text>')
    for value in ticks(0, end, 8):
        parts.append(f'<text x="{x(value):.1f}" y="{height - 8}" text-anchor="middle">{value:,.0f}</text>')
    for number, rows in enumerate(bins):
        start, stop = x(number * lengths.bin_width), x((number + 1) * lengths.bin_width)
        style = "bar" if number * lengths.bin_width <= max_length else "bar over"
        parts.append(
            f'<rect class="{style}" x="{start + 0.5:.1f}" y="{y(rows):.1f}" width="{max(stop - start - 1, 0.5):.1f}" '
            f'height="{height - bottom - y(rows):.1f}"/>'
        )
    if max_length <= end:
        parts.append(
            f'<line class="axis" x1="{x(max_length):.1f}" x2="{x(max_length):.1f}" y1="{top}" y2="{height - bottom}"/>'
            f'<text x="{x(max_length) - 4:.1f}" y="{top + 8}" text-anchor="end">max_length {max_length:,}</text>'
        )
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}"/>')
    label = f"rows by length in tokens, bars of {lengths.bin_width}"
    drawing = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f'<figure class="chart">{drawing}</figure>'


def _dry_run(outputs: PreflightOutputs) -> str:
    run = outputs.dry_run
    if run is None:
        return '<p class="muted">Not made: switched off, or no rows.</p>'
    facts = [
        ("Device", e(run.device)),
        ("Precision", e(run.precision)),
        ("Longest rows at once", str(run.per_device_train_batch_size)),
        ("Tokens", f"{run.num_tokens:,}"),
        ("Packed", "yes" if run.packing else "no"),
        ("Activation checkpointing", "yes" if run.activation_checkpointing else "no"),
        ("Trained", "every weight" if run.lora_r is None else f"LoRA of rank {run.lora_r}"),
        ("Peak memory", text.size(run.peak_memory_bytes)),
        ("Time of the step", text.duration(run.seconds)),
    ]
    if run.generation_bytes:
        facts.append(("Memory while rollouts are generated, computed", text.size(run.generation_bytes)))
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    note = (
        "Forward, backward and AdamW step on the longest rows of a micro-batch. Memory: model, gradients and optimizer "
        "state included; on a CPU the growth of the process."
    )
    return f'<p class="muted">{note}</p><dl class="facts">{items}</dl>'


def _rows(config: PreflightConfig, shown: Sequence[Shown]) -> str:
    if not shown:
        return ""
    parts = []
    for row in shown:
        names = ("chosen", "rejected") if config.kind == "pairs" else ("",)
        for name, side in zip(names, row.sides, strict=True):
            tokens = "".join(
                f'<span class="{"t trained" if trained else "t"}">{e(piece).replace(chr(10), "↵" + chr(10))}</span>'
                for piece, trained in side
            )
            parts.append(f'<h3>Row {row.number:,}{f", {name}" if name else ""}</h3><pre class="tokens">{tokens}</pre>')
        if row.num_left_out:
            parts.append(f'<p class="muted">{row.num_left_out:,} more tokens.</p>')
    note = "The first rows, token by token, as they are trained on."
    if config.kind != "prompts":
        note += " Tokens with a loss are marked."
    return f'<section><h2>Rows</h2><p class="muted">{note}</p>{"".join(parts)}</section>'


def _findings(examples: Mapping[str, list[int]], texts: Mapping[int, str]) -> str:
    numbers = sorted({row for rows in examples.values() for row in rows if row in texts})
    if not numbers:
        return ""
    parts = []
    for number in numbers:
        names = ", ".join(finding.removeprefix("num_") for finding, rows in examples.items() if number in rows)
        summary = f"<summary>Row {number:,}: {e(names)}</summary>"
        parts.append(f'<details class="plain">{summary}{preformatted(texts[number])}</details>')
    return f"<section><h2>First rows of each finding</h2>{''.join(parts)}</section>"
