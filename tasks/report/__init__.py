"""What a run shows: its summary, Prefect artifacts, and one self-contained HTML page."""

from tasks.report.page import html_report
from tasks.report.summary import collect_scores, markdown, stage_runs, stage_table, summarise
from tasks.report.text import artifact_key

__all__ = ["artifact_key", "collect_scores", "html_report", "markdown", "stage_runs", "stage_table", "summarise"]
