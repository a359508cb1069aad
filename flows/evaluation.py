"""Flow `smoltulu-eval`: evaluates a recipe's finished models again and tests whether their scores changed."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
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
from smoltulu.tasks.engine.runner import reference_to, run_stage
from smoltulu.tasks.engine.stores import open_store
from smoltulu.tasks.evaluation.sampling import paired_difference
from smoltulu.tasks.report import artifact_key

#: A difference is significant below this p-value divided by the number of comparisons of the night (Bonferroni).
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Comparison:
    """Scores of one model on one task, last time and tonight, paired by document."""

    node: str
    task: str
    last: float
    tonight: float
    num_documents: int
    p_value: float

    def verdict(self, num_comparisons: int) -> str:
        """`same`, `within noise`, `drop` or `gain`."""
        if self.last == self.tonight and self.p_value == 1.0:
            return "same"
        if self.p_value >= SIGNIFICANCE / num_comparisons:
            return "within noise"
        return "drop" if self.tonight < self.last else "gain"


def document_scores(reference: ArtifactReference) -> dict[str, dict[str, float]]:
    """task -> document -> score of the headline metric, from the samples of an evaluation.

    The name of a document holds the hashes of its text and target, so a changed document is not compared.
    """
    outputs = EvaluationOutputs.model_validate(reference.outputs)
    headlines = {score.task: score.metric.split(",")[0] for score in outputs.scores}
    scores: dict[str, dict[str, float]] = {}
    if outputs.samples_file is None:
        return scores
    for line in (Path(reference.path) / outputs.samples_file).read_text().splitlines():
        row = json.loads(line)
        name = f"{row['id']} {row.get('doc_hash', '')} {row.get('target_hash', '')}"
        if "metrics" in row:
            value = row["metrics"].get(headlines.get(row["task"]))
        else:
            value = row.get("right", row.get("mean"))
        if value is not None:
            scores.setdefault(row["task"], {})[name] = float(value)
    return scores


def compare(node: str, last: dict[str, dict[str, float]], tonight: dict[str, dict[str, float]]) -> list[Comparison]:
    """Paired comparison of every task that both evaluations measured on the same documents."""
    comparisons = []
    for name in last.keys() & tonight.keys():
        before, after = last[name], tonight[name]
        if before.keys() != after.keys() or len(before) < 2:
            continue
        _, _, p_value = paired_difference(before, after)
        means = [sum(values.values()) / len(values) for values in (before, after)]
        comparisons.append(Comparison(node, name, means[0], means[1], len(before), p_value))
    return sorted(comparisons, key=lambda comparison: comparison.task)


@with_form
@flow(name="smoltulu-eval", persist_result=False, validate_parameters=False)
@described
def nightly_evaluation(recipe: RecipeParameter = "smoltulu-1130", overrides: Overrides = {}) -> Any:  # noqa: B006
    """Evaluate every finished model of a recipe again and compare with the last time. Trains nothing.

    The flow fails if a score dropped significantly, so that Prefect's notifications for failed runs report it.
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
    state, futures = "Completed", []
    try:
        for name in evaluations:
            futures.append(measure.with_options(name="evaluation", task_run_name=name).submit(name))
            outcomes[name] = "Failed"
            tonight = futures[-1].result()
            outcomes[name] = tonight.outcome
            if name in last:
                comparisons += compare(name, document_scores(last[name]), document_scores(tonight))
        rows = [
            {
                "model": comparison.node.removeprefix("evaluation-"),
                "task": comparison.task,
                "last": f"{comparison.last:.4f}",
                "tonight": f"{comparison.tonight:.4f}",
                "documents": str(comparison.num_documents),
                "p (paired)": f"{comparison.p_value:.3g}",
                "verdict": comparison.verdict(len(comparisons)),
            }
            for comparison in comparisons
        ]
        for row in rows:
            log.info("%(model)s %(task)s: %(last)s -> %(tonight)s, %(verdict)s (p %(p (paired))s)", row)
        key = artifact_key(f"{checked.name}-nightly")
        create_table_artifact(key=key, table=rows, description="last night and tonight")
        # From here on the verdict is told: the next night compares with this one.
        record = record.model_copy(update={"compared_with": {}})
    except BaseException as error:
        state = interruption.stop(error, futures)
        if state == "Cancelled":
            outcomes |= {name: state for name, outcome in outcomes.items() if outcome == "Failed"}
        raise
    finally:
        end_run(store, record, state, outcomes)
    drops = [row for row in rows if row["verdict"] == "drop"]
    if drops:
        raise RunFailed("dropped beyond noise: " + ", ".join(f"{row['model']} {row['task']}" for row in drops))
    return Completed(name="Completed", message=f"{len(evaluations)} evaluations, no real drop")


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
