"""The processes of a stage that is no training: each takes its share of the work, and they meet at its end."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from smoltulu.tasks.models.folders import device_of
from smoltulu.tasks.stage import StageContext

if TYPE_CHECKING:
    from accelerate import PartialState

#: Shares are not equally long, and one may be done already: torch's own 10 or 30 minutes would end ranks that are
#: well. One that hangs is told by tasks/engine/pulse.py. Milliseconds of 25 days fit into no C int.
_WAIT = timedelta(days=20)


def processes_of(context: StageContext) -> PartialState:
    """The processes of the stage. Asked for before anything else that would ask: the first to do so decides."""
    from accelerate import PartialState

    return PartialState(cpu=device_of(context.compute) == "cpu", timeout=_WAIT)
