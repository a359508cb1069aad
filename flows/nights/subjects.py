"""Models that a night evaluates beside those of its recipe: tags of the store, and revisions on the Hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from smoltulu.artifacts.manifests import Ref
from smoltulu.artifacts.store import Found, read_manifest
from smoltulu.artifacts.upkeep.catalogue import Catalogue
from smoltulu.flows.graphs.nodes import Binding, Node
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.recipe import RecipeError
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.schemas.evaluation import EvaluationOutputs, EvaluationStageConfig
from smoltulu.schemas.models import ModelSource
from smoltulu.tasks.data.hub import resolve_commit
from smoltulu.tasks.engine.runner import reference_to
from smoltulu.tasks.stages import STAGES, made_by


@dataclass
class Subjects:
    """What was added to a graph.

    finished  node -> model that is there
    commits   evaluation -> commit of its Hub revision
    to_fetch  nodes that fetch a model from the Hub
    failed    model as it was named -> why it cannot be had
    """

    finished: dict[str, ArtifactReference] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)
    to_fetch: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def check_models(models: object) -> None:
    """Refuse what is no list of names."""
    if not isinstance(models, list) or not all(isinstance(name, str) and name for name in models):
        raise RecipeError(
            f'models: give a list of tags and Hub revisions, e.g. ["best", "me/model@main"]; got {models!r}'
        )
    if doubles := sorted({name for name in models if models.count(name) > 1}):
        raise RecipeError(f"models: {', '.join(doubles)} given more than once; name each once")


def add_models(
    graph: Graph, models: Sequence[str], catalogue: Catalogue, resolve: Callable[..., str] = resolve_commit
) -> Subjects:
    """Add models to a graph, each with an evaluation as the recipe's own models have.

    models  tags of the store, or owner/name@revision of the Hub (main unless given)
    """
    subjects = Subjects()
    for name in models:
        try:
            if "/" in name:
                _add_from_hub(graph, name, subjects, resolve)
            else:
                _add_tag(graph, name, catalogue, subjects)
        except (OSError, ValueError) as error:
            subjects.failed[name] = str(error)
    return subjects


def _add_tag(graph: Graph, name: str, catalogue: Catalogue, subjects: Subjects) -> None:
    tags = catalogue.tags()
    if name not in tags:
        raise ValueError(f"the store has no tag {name!r}; there: {', '.join(tags) or 'none'}")
    tag, node = tags[name], f"tag-{name}"
    stage, makes = STAGES.get(tag.stage), made_by(tag.stage)
    if stage is None or makes not in ("language model", "reward model"):
        raise ValueError(f"tag {name!r} names {tag.stage}/{tag.key[:12]}, which is no model; tag the model itself")
    ref = Ref.checked(tag.stage, tag.key)
    folder, newest = catalogue.path(ref), catalogue.folder(ref).newest
    if newest is None:
        raise ValueError(f"tag {name!r} names {tag.stage}/{tag.key[:12]}, which is gone; make it again or untag it")
    subjects.finished[node] = reference_to(Found(read_manifest(folder / newest), folder / newest), node, "Cached")
    graph.add_made(node, stage, tag.key)
    _evaluate(graph, node, name, makes.replace(" ", "_"))


def _add_from_hub(graph: Graph, name: str, subjects: Subjects, resolve: Callable[..., str]) -> None:
    repository, _, revision = name.partition("@")
    node = f"hub-{name}"
    commit = resolve("model", repository, revision or "main")
    base = next(one for one in graph.nodes.values() if isinstance(one.config, ModelSource))
    graph.add(Node(node, base.stage, ModelSource(repository=repository, revision=commit)))
    subjects.commits[_evaluate(graph, node, name, "language_model")] = commit
    subjects.to_fetch.append(node)


def _evaluate(graph: Graph, model: str, name: str, kind: str) -> str:
    """An evaluation of a model by the settings of the recipe's own models, with sampling where one of these has it."""
    alike = [node for node in graph.nodes.values() if node.stage.makes(EvaluationOutputs) and _kind(node) == kind]
    if not alike:
        raise ValueError(f"recipe {graph.name} evaluates no {kind.replace('_', ' ')}, so that it does not say how")
    own = max(alike, key=lambda node: len(node.inputs))
    assert isinstance(own.config, EvaluationStageConfig)
    config = own.config.model_copy(update={"subject": name})
    inputs = {**own.inputs, "model": Binding(model, "folder")}
    return graph.add(replace(own, name=f"evaluation-{model}", config=config, inputs=inputs))


def _kind(node: Node) -> str:
    assert isinstance(node.config, EvaluationStageConfig)
    return node.config.kind
