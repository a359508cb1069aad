"""Progress lines are few, whatever a stage reports."""

from __future__ import annotations

import logging

import pytest

from smoltulu.tasks.progress import Progress


def test_an_end_that_is_reported_again_and_again_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress("sft", logging.getLogger("test"))
    with caplog.at_level(logging.INFO, logger="test"):
        for step in (0, 1, *[2] * 1000):
            progress(step, 2)
    assert [record.getMessage() for record in caplog.records] == ["sft: step 0 of 2", "sft: step 2 of 2"]
