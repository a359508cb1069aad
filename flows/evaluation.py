"""Flow `smoltulu-eval`: evaluates a recipe's finished models again and tests whether their scores changed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from smoltulu.artifacts.store import Found, read_manifest
from smoltulu.artifacts.upkeep.catalogue import Catalogue
from smoltulu.flows.endings import Interruption, close_earlier_attempts
from smoltulu.flows.follow_worker import follow_worker
from smoltulu.flows.forms import described, with_form
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.logs import RunFailed, shield_run_logs
from smoltulu.flows.pipeline import Overrides, RecipeParameter
from smoltulu.flows.recipe import check_evaluation, load_recipe
from smoltulu.flows.runs import begin_run, end_run
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.schemas.evaluation import EvaluationOutputs
from smoltulu.tasks.comparison.evaluations import Comparison, Measured, compare, measured, verdicts
from smoltulu.tasks.engine.runner import reference_to, run_stage
from smoltulu.tasks.engine.stores import open_store
from smoltulu.tasks.report import artifact_key

#: A difference is significant below this p-value, adjusted for all comparisons of the night (Holm).
SIGNIFICANCE = 0.05
#: Scores that could not be compared, named in the message; the table has all.
_NUM_NAMED = 3


def told(comparisons: Sequence[Comparison], num_evaluations: int, failed: Mapping[str, str]) -> tuple[bool, str]:
    """Whether the night went well, and what it says: never that nothing dropped where nothing could be compared."""
    judged = verdicts(list(comparisons), SIGNIFICANCE)
    drops = [one for one, _, verdict in judged if verdict == "drop"]
    lost = [one for one in comparisons if one.test is None]
    num_compared = len(comparisons) - len(lost)
    parts = [f"{num_evaluations:,} evaluations"]
    if failed:
        parts.append(f"{len(failed):,} FAILED: " + "; ".join(f"{name}: {why}" for name, why in failed.items()))
    if drops:
        parts.append("dropped beyond noise: " + ", ".join(f"{one.model} {one.task}" for one in drops))
    elif num_compared:
        parts.append(f"no real drop in {num_compared:,} scores")
    else:
        parts.append("nothing was compared" if lost else "nothing to compare with yet")
    if lost:
        shown = ", ".join(f"{one.model} {one.task} ({one.reason})" for one in lost[:_NUM_NAMED])
        more = f" and {len(lost) - _NUM_NAMED:,} more" if len(lost) > _NUM_NAMED else ""
        parts.append(f"{len(lost):,} not comparable: {shown}{more}")
    return not (failed or drops), "; ".join(parts)


def rows_of(comparisons: Sequence[Comparison]) -> list[dict[str, str]]:
    """The table of a night."""
    return [
        {
            "model": one.model,
            "task": one.task,
            "metric": one.metric,
            "last": f"{one.before:.4f}",
            "tonight": f"{one.after:.4f}",
            "items": f"{one.test.num_items:,}" if one.test else "-",
            "lost, gained": f"{one.test.num_lost:,}, {one.test.num_gained:,}" if one.test else "-",
            "p (paired)": f"{one.test.p_value:.3g}" if one.test else "-",
            "p (Holm)": "-" if adjusted is None else f"{adjusted:.3g}",
            "verdict": f"not comparable: {one.reason}" if one.reason else verdict,
        }
        for one, adjusted, verdict in verdicts(list(comparisons), SIGNIFICANCE)
    ]


@with_form
@flow(name="smoltulu-eval", persist_result=False, validate_parameters=False)
@described
def nightly_evaluation(recipe: RecipeParameter = "smoltulu-1130", overrides: Overrides = {}) -> Any:  # noqa: B006
    """Evaluate every finished model of a recipe again and compare with the last time. Trains nothing.

    The flow fails if a score dropped significantly or an evaluation failed, so that Prefect's notifications for failed
    runs report it.
    """
    shield_run_logs()
    follow_worker()
    close_earlier_attempts()
    log = get_run_logger()
    checked = load_recipe(recipe, overrides)
    check_evaluation(checked)
    graph = Graph(checked)
    store = open_store(checked.compute)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

    finished: dict[str, ArtifactReference] = {}
    evaluations = []
    for name, node in graph.nodes.items():
        bindings = node.bindings()
        if not {binding.node for binding in bindings.values()} <= finished.keys():
            continue
        digests = {dotted: finished[binding.node].digest for dotted, binding in bindings.items()}
        if node.stage.makes(EvaluationOutputs):
            evaluations.append(name)
            digests = {}  # compared with last night's, even if its inputs were made again since
        if (found := store.obtain(graph.spec(name), digests, name, log)) is not None:
            finished[name] = reference_to(found, name, "Cached")

    @task(cache_policy=NO_CACHE, persist_result=False)
    def measure(node: str) -> Any:
        try:
            reference = run_stage(graph.job(node, finished, refresh=True), store, get_run_logger())
        except Exception as error:
            if (stopped := interruption.state_of_stage(error)) is not None:
                return stopped
            raise
        return Completed(name=reference.outcome, message=reference.path, data=reference)

    interruption = Interruption()
    if not evaluations:
        log.warning("recipe %s has no finished model in %s: nothing to evaluate", checked.name, store.root)
        return Completed(name="Skipped", message="no finished model")

    last, compared_with = _last_night(evaluations, finished, Catalogue(store.root), log)
    name = f"{checked.name}-nightly-{runtime.flow_run.name}"
    record = begin_run(store, name, graph, str(runtime.flow_run.id), compared_with)
    outcomes: dict[str, str] = {}
    comparisons: list[Comparison] = []
    failed: dict[str, str] = {}
    state, futures = "Completed", []
    try:
        for name in evaluations:
            futures.append(measure.with_options(name="evaluation", task_run_name=name).submit(name))
            outcomes[name] = "Failed"
            try:
                tonight = futures[-1].result()
                outcomes[name] = tonight.outcome
                if name in last:
                    comparisons += _compare(name.removeprefix("evaluation-"), last[name], tonight)
            except Exception as error:  # one that fails is not the end of the others
                failed[name] = str(error) or type(error).__name__
                log.error("%s failed: %s", name, failed[name])
        rows = rows_of(comparisons)
        for row in rows:
            log.info("%(model)s %(task)s: %(last)s -> %(tonight)s, %(verdict)s (p %(p (paired))s)", row)
        key = artifact_key(f"{checked.name}-nightly")
        create_table_artifact(key=key, table=rows, description="last night and tonight")
        # From here on the verdict is told: the next night compares with this one, but for models that failed.
        untold = {name: generation for name, generation in compared_with.items() if name in failed}
        record = record.model_copy(update={"compared_with": untold})
        state = "Failed" if failed else state
    except BaseException as error:
        state = interruption.stop(error, futures)
        if state == "Cancelled":
            outcomes |= {name: state for name, outcome in outcomes.items() if outcome == "Failed"}
        raise
    finally:
        end_run(store, record, state, outcomes)
    went_well, message = told(comparisons, len(evaluations), failed)
    if not went_well:
        raise RunFailed(message)
    return Completed(name="Completed", message=message)


def _compare(model: str, last: ArtifactReference, tonight: ArtifactReference) -> list[Comparison]:
    """The scores of both; where those of last time cannot be read, that is told once, and tonight is the next one's."""
    try:
        before = _measured(last)
    except (OSError, ValueError) as error:
        reason = f"the last time cannot be read: {error}"
        return [Comparison(model, name, one.score.metric, one.score.value, one.score.value, reason=reason)
                for name, one in _measured(tonight).items()]  # fmt: skip
    return compare(model, before, _measured(tonight))


def _measured(reference: ArtifactReference) -> dict[str, Measured]:
    return measured(Path(reference.path), EvaluationOutputs.model_validate(reference.outputs))


def _last_night(
    evaluations: list[str], finished: dict[str, ArtifactReference], catalogue: Catalogue, log: Any
) -> tuple[dict[str, ArtifactReference], dict[str, str]]:
    """What tonight's scores are compared with, and its generations: the newest, or what an untold night compared with.

    A night that was killed, or failed, has measured some of its models. Their newest scores are its own, not those of
    the last night that told a verdict.
    """
    last = {name: finished[name] for name in evaluations if name in finished}
    earlier = catalogue.untold()
    for name, newest in last.items():
        folder, generation = Path(newest.path).parent, earlier.get(newest.key)
        if generation in (None, Path(newest.path).name):
            continue
        try:
            last[name] = reference_to(Found(read_manifest(folder / generation), folder / generation), name, "Cached")
            log.info(
                "%s: the night before told no verdict; compared with %s, as that night would have been",
                name,
                generation,
            )
        except (OSError, ValueError) as error:
            log.warning("%s: the night before told no verdict, and what it compared with is gone: %s", name, error)
    return last, {name: Path(reference.path).name for name, reference in last.items()}
