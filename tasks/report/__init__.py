"""Report of a run: its summary, Prefect artifacts, and one self-contained HTML page."""

from smoltulu.tasks.report.page import html_report
from smoltulu.tasks.report.summary import markdown, stage_table, summarise
from smoltulu.tasks.report.text import artifact_key

__all__ = ["artifact_key", "html_report", "markdown", "stage_table", "summarise"]
