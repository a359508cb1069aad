"""The model card (README.md) and the records beside it, from manifests and a recipe. Pure.

Nothing private may get in: paths are cut to their last part, and `find_private` finds folders and secrets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts.secrets import known_secrets, secrets_in
from smoltulu.schemas.artifact import Manifest
from smoltulu.schemas.evaluation import EvaluationOutputs, Score
from smoltulu.schemas.publish import PublishStageConfig
from smoltulu.tasks.report.render import render

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_ABSOLUTE = re.compile(r"^(?:~|/|\$\{|[A-Za-z]:\\|file:)")


def without_paths(value: Any, field: str = "") -> Any:
    """`value` with every local path cut to its last part: fields called `path`, and text that is an absolute path."""
    if isinstance(value, Mapping):
        return {str(name): without_paths(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(item, field) for item in value]
    if isinstance(value, str) and "\n" not in value and (field == "path" or _ABSOLUTE.match(value)):
        return value.replace("\\", "/").rstrip("/}").rsplit("/", 1)[-1]
    return value


def find_private(text: str, private: Iterable[str], secrets: dict[str, str] | None = None) -> str | None:
    """What of `private` (folders), or which secret, is in `text`; None if nothing.

    secrets  as from `known_secrets`, which are looked up here where none are given
    """
    if (found := next((item for item in private if item and item in text), None)) is not None:
        return found
    known = known_secrets() if secrets is None else secrets
    return next((secret for secret, _ in secrets_in(text, known)), None)


def lineage_records(lineage: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    """One record per artifact the model was made from; no config, no paths."""
    records = []
    for node, manifest in lineage.items():
        environment = {
            name: manifest.environment[name]
            for name in ("packages", "python", "git_commit")
            if manifest.environment.get(name) is not None
        }
        records.append(
            {
                "node": node,
                "stage": manifest.spec.stage,
                "stage_version": manifest.spec.version,
                "key": manifest.key,
                "digest": manifest.digest,
                "made_from": {
                    name: {"stage": record.stage, "key": record.key, "digest": record.digest}
                    for name, record in sorted(manifest.inputs.items())
                },
                "metrics": manifest.metrics,
                "finished_at": manifest.finished_at,
                "duration_seconds": manifest.duration_seconds,
                "resumed_from_steps": list(manifest.resumed_from_steps),
                "environment": environment,
            }
        )
    return records


def score_records(evaluations: Mapping[str, EvaluationOutputs]) -> list[dict[str, Any]]:
    """Every score of every evaluation, with its source."""
    return [
        {"evaluation": node, "subject": outputs.subject, **without_paths(score.model_dump(mode="json"))}
        for node, outputs in evaluations.items()
        for score in outputs.scores
    ]


def model_card(
    config: PublishStageConfig,
    lineage: Mapping[str, Manifest],
    evaluations: Mapping[str, EvaluationOutputs],
    recipe_yaml: str,
    model_digest: str,
) -> str:
    """README.md: metadata for the Hub (scores as model-index), then text for a reader."""
    from huggingface_hub import ModelCard, ModelCardData

    own = [score for outputs in evaluations.values() if outputs.subject == config.subject for score in outputs.scores]
    base = config.recipe.get("base_model")
    base = base if isinstance(base, Mapping) else {}
    base_model = base.get("repository")
    data = ModelCardData(
        language=config.settings.language,
        license=config.settings.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["smoltulu", "tulu-3", config.subject.replace("_", "-")],
        base_model=base_model,
        model_name=config.recipe_name if own else None,
        eval_results=[_eval_result(score) for score in own] or None,
    )
    body = render(
        "card.md.jinja",
        config=config,
        base_model=base_model,
        base_path=without_paths(base.get("path"), "path"),
        base_digest=lineage["base-model"].spec.externals.get("base_model") if "base-model" in lineage else None,
        model_digest=model_digest,
        scores=[(outputs.subject, score) for outputs in evaluations.values() for score in outputs.scores],
        lineage=lineage.items(),
        recipe_yaml=recipe_yaml,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _eval_result(score: Score) -> EvalResult:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type=score.task,
        dataset_name=score.task + (" (part)" if score.limited else ""),
        dataset_revision=score.task_version,
        dataset_args=None if score.num_fewshot is None else {"num_few_shot": score.num_fewshot},
        metric_type=score.metric,
        metric_name=f"{score.metric} ({score.harness}, n={score.num_samples})",
        metric_value=score.value,
    )
