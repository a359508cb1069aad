"""Flow of the deployment `smoltulu-sweep/ladder`: sweeps small models, predicts for a large one, and tests it there."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.states import Completed
from pydantic import Field

from smoltulu.flows.follow_worker import follow_worker
from smoltulu.flows.forms import described, with_form
from smoltulu.flows.logs import RunFailed, shield_run_logs
from smoltulu.flows.sweep import smoltulu_sweep
from smoltulu.flows.sweeping.grid import store_of
from smoltulu.flows.sweeping.ladder import begin_ladder, load_ladder
from smoltulu.flows.sweeping.ladder_results import lines_of, result_of, write_ladder

LadderParameter = Annotated[
    str | dict[str, Any], Field(description="a shipped ladder, the path of a YAML file, or a ladder written out")
]


@with_form
@flow(
    name="smoltulu-sweep",
    persist_result=False,
    validate_parameters=False,
)
@described
def smoltulu_ladder(ladder: LadderParameter) -> Any:
    """Sweep the proxies, predict the target's learning rate, and train the target around it: three runs in one.

    Cells are ordinary ones of a sweep. What is finished is found again, so that a second call trains nothing.
    """
    shield_run_logs()
    follow_worker()
    log = get_run_logger()
    asked = load_ladder(ladder)
    begin_ladder(asked, log)
    smoltulu_sweep(asked.proxies.model_dump(mode="json"))
    root = store_of(asked.proxies)
    predicted = result_of(asked, root)
    for line in lines_of(predicted):
        log.info("%s", line)
    if predicted.log2_lr is None:
        log.info("page: %s", write_ladder(asked, root))
        raise RunFailed(f"ladder {asked.name}: the proxies predict nothing for the target; {predicted.problems[-1]}")
    smoltulu_sweep(asked.confirmation(predicted.log2_lr).model_dump(mode="json"))
    lines = lines_of(result_of(asked, root))
    for line in lines:
        log.info("%s", line)
    log.info("page: %s", write_ladder(asked, root))
    return Completed(name="Completed", message=f"ladder {asked.name}: {'; '.join(lines[:2])}")
