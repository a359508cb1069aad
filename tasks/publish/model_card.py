"""The model card (README.md) and what goes beside it. Pure: from manifests and a recipe to text.

Nothing private may get in: paths are cut to their last part, and `find_private` names what must not be there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from smoltulu.schemas.artifact import Manifest
from smoltulu.schemas.evaluation import EvaluationOutputs, Score
from smoltulu.schemas.publish import PublishStageConfig

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
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


def find_private(text: str, private: Iterable[str]) -> str | None:
    """What of `private` (folders, tokens) is in `text`, or anything that looks like a Hub token; None if nothing."""
    token = _TOKEN.search(text)
    if token:
        return token.group()
    return next((item for item in private if item and item in text), None)


def lineage_records(lineage: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    """One record per artifact the model was made from, in time order; no config, no paths."""
    records = []
    for node, manifest in sorted(lineage.items(), key=lambda item: (item[1].finished_at, item[0])):
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
        for node, outputs in sorted(evaluations.items())
        for score in outputs.scores
    ]


def model_card(
    config: PublishStageConfig,
    lineage: Mapping[str, Manifest],
    evaluations: Mapping[str, EvaluationOutputs],
    recipe_yaml: str,
    model_digest: str,
) -> str:
    """README.md: metadata that the Hub reads (scores as model-index), then what a person wants to know."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    own = [score for outputs in evaluations.values() if outputs.subject == config.subject for score in outputs.scores]
    base_model = _base_repository(config.recipe)
    data = ModelCardData(
        language=config.settings.language,
        license=config.settings.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["smoltulu", "tulu-3", config.subject.replace("_", "-")],
        base_model=base_model,
        model_name=config.recipe_name if own else None,
        eval_results=[_eval_result(EvalResult, score) for score in own] or None,
    )
    body = f"""# {config.recipe_name}

The model of the stage `{config.subject}` of a smoltulu run: Tulu-3-style
post-training{f" of `{base_model}`" if base_model else " of a model made from scratch"} with the recipe
`{config.recipe_name}`.

Weights digest: `{model_digest}`. The weights are those that were evaluated, byte for byte.

## Scores

{_score_table(evaluations)}

n: documents (or pairs, or samples) measured; ± is one standard error. A score marked "part" was measured on a part of
its task and is not comparable with others'. `scores.json` has all metrics and the digest of the chat template.

## Made from

{_lineage_table(lineage)}

`lineage.json` has whole keys, digests, package versions and metrics.

## Use

The chat template is in the tokenizer:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{{"role": "user", "content": "Tom has 12 apples and buys 7 more. How many has he?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```

## Recipe

```yaml
{recipe_yaml.rstrip()}
```
"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _base_repository(recipe: Mapping[str, Any]) -> str | None:
    base = recipe.get("base_model")
    return base.get("repository") if isinstance(base, Mapping) else None


def _eval_result(kind: type, score: Score) -> Any:
    arguments = {"num_few_shot": score.num_fewshot} if score.num_fewshot is not None else None
    return kind(
        task_type="text-generation",
        dataset_type=score.task,
        dataset_name=score.task + (" (part)" if score.limited else ""),
        dataset_revision=score.task_version,
        dataset_args=arguments,
        metric_type=score.metric,
        metric_name=f"{score.metric} ({score.harness}, n={score.num_samples})",
        metric_value=score.value,
    )


def _score_table(evaluations: Mapping[str, EvaluationOutputs]) -> str:
    rows = [
        [
            outputs.subject,
            score.task,
            score.metric,
            f"{score.value:.4f}" + (f" ± {score.stderr:.4f}" if score.stderr is not None else ""),
            f"{score.num_samples:,}" + (" (part)" if score.limited else ""),
            "" if score.num_fewshot is None else str(score.num_fewshot),
            f"{score.harness}, task {score.task_version}",
        ]
        for _, outputs in sorted(evaluations.items())
        for score in outputs.scores
    ]
    if not rows:
        return "This run evaluated nothing."
    return _table(["model", "task", "metric", "score", "n", "shots", "harness and task version"], rows)


def _lineage_table(lineage: Mapping[str, Manifest]) -> str:
    rows = [
        [
            node,
            manifest.spec.stage,
            f"`{manifest.key[:12]}`",
            ", ".join(f"{record.stage} `{record.key[:12]}`" for _, record in sorted(manifest.inputs.items())) or "–",
        ]
        for node, manifest in sorted(lineage.items(), key=lambda item: (item[1].finished_at, item[0]))
    ]
    return _table(["node", "stage", "key", "made from"], rows) if rows else "Not recorded."


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
