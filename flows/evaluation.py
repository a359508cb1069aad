"""Flow `smoltulu-eval`: tells what is new among a recipe's finished models, and whether any of it is worse.

A night evaluates what no night told of, by the contents of the models. It compares each with the pinned baseline and
with the last different model, item by item (`tasks/comparison/night.py`). Identical weights are not measured again, but
for one task a night, which must give identical samples.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.states import Completed
from pydantic import Field

from smoltulu.artifacts.upkeep.catalogue import Catalogue
from smoltulu.flows.endings import Interruption, close_earlier_attempts
from smoltulu.flows.follow_worker import follow_worker
from smoltulu.flows.forms import described, with_form
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.logs import RunFailed, shield_run_logs
from smoltulu.flows.nights import events
from smoltulu.flows.nights.subjects import Subjects, add_models, check_models
from smoltulu.flows.nights.tonight import Tonight
from smoltulu.flows.pipeline import Overrides, RecipeParameter
from smoltulu.flows.recipe import check_evaluation, load_recipe
from smoltulu.flows.runs import begin_run, end_run
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.tasks.comparison.night import table
from smoltulu.tasks.engine.runner import run_stage
from smoltulu.tasks.engine.stores import open_store
from smoltulu.tasks.nightly.history import History
from smoltulu.tasks.report import artifact_key
from smoltulu.tasks.report.text import markdown_text

Models = Annotated[
    list[str],
    Field(
        description='models beside the recipe\'s own: tags of the store, and Hub revisions, e.g. ["best", '
        '"me/model@main"]'
    ),
]


@with_form
@flow(name="smoltulu-eval", persist_result=False, validate_parameters=False)
@described
def nightly_evaluation(
    recipe: RecipeParameter = "smoltulu-1130",
    overrides: Overrides = {},  # noqa: B006 - Prefect reads the default for its form
    models: Models = [],  # noqa: B006
) -> Any:
    """Evaluate what is new among the finished models of a recipe, and say whether it is worse. Trains nothing.

    The flow fails where scores fell at the level of a loss or an evaluation failed, so that Prefect's notifications
    for failed runs report it.
    """
    shield_run_logs()
    follow_worker()
    close_earlier_attempts()
    log = get_run_logger()
    checked = load_recipe(recipe, overrides)
    check_evaluation(checked)
    check_models(models)
    graph = Graph(checked)
    store = open_store(checked.compute)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    history = History(store.root, checked.name)
    with history.alone(lambda holder: log.info("waiting for %s, which evaluates %s", holder, checked.name)):
        subjects = add_models(graph, models, Catalogue(store.root)) if models else Subjects()
        night = Tonight(graph, store, history, subjects, log)
        if not night.evaluations and not subjects.failed:
            log.warning("recipe %s has no finished model in %s: nothing to evaluate", checked.name, store.root)
            return Completed(name="Skipped", message="no finished model")

        @task(cache_policy=NO_CACHE, persist_result=False)
        def make(node: str, refresh: bool) -> Any:
            try:
                reference = run_stage(graph.job(node, night.finished, refresh=refresh), store, get_run_logger())
            except Exception as error:
                if (stopped := interruption.state_of_stage(error)) is not None:
                    return stopped
                raise
            return Completed(name=reference.outcome, message=reference.path, data=reference)

        def made(node: str, refresh: bool) -> ArtifactReference:
            name = graph.nodes[node].stage.name
            futures.append(make.with_options(name=name, task_run_name=node).submit(node, refresh))
            reference: ArtifactReference = futures[-1].result()
            return reference

        interruption = Interruption()
        futures: list[PrefectFuture[Any]] = []
        run_name = f"{checked.name}-nightly-{runtime.flow_run.name}"
        record, state = begin_run(store, run_name, graph, str(runtime.flow_run.id)), "Completed"
        try:
            night.measure(made)
            night.compare()
            night.repeat(made)
            found = night.found()
            for row in table(found.judged):
                log.info(
                    "%(model)s %(task)s against %(against)s: %(before)s -> %(tonight)s, %(verdict)s (p %(p (paired))s)",
                    row,
                )
            if found.judged:
                key = artifact_key(f"{checked.name}-nightly")
                create_table_artifact(key=key, table=table(found.judged), description=markdown_text(found.message()))
            events.send(checked.name, found)
            # From here on the verdict is told.
            history.add(night.rows(record.run_name), night.kept())
            state = "Failed" if found.failed else state
        except BaseException as error:
            state = interruption.stop(error, futures)
            if state == "Cancelled":
                stopped = {name: state for name, outcome in night.outcomes.items() if outcome == "Failed"}
                night.outcomes.update(stopped)
            raise
        finally:
            end_run(store, record, state, night.outcomes)
    if not found.went_well:
        raise RunFailed(found.message())
    log.info("%s", found.message())
    return Completed(name="Nothing new" if found.is_nothing_new else "Completed", message=found.message())
