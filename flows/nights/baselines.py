"""What a user means by a baseline: the evaluations of a run, or that of a model."""

from __future__ import annotations

from smoltulu.artifacts import layout
from smoltulu.artifacts.manifests import Ref, inputs_of
from smoltulu.artifacts.upkeep.catalogue import Catalogue
from smoltulu.schemas.nightly import MeasuredModel
from smoltulu.schemas.run import RunRecord
from smoltulu.tasks.stages import made_by


def chosen(catalogue: Catalogue, what: str, of: str | None = None) -> dict[str, MeasuredModel]:
    """Evaluation node -> what it measured: all of a run, or those of a key or tag. ValueError where there is none.

    of  the node that it becomes the baseline of, instead of its own
    """
    made = _chosen(catalogue, what)
    if of is None:
        return made
    if len(made) != 1:
        raise ValueError(f"{what} has {len(made)} evaluations, {', '.join(made)}; name one of them to pin it for {of}")
    return {of: next(iter(made.values()))}


def _chosen(catalogue: Catalogue, what: str) -> dict[str, MeasuredModel]:
    found = catalogue.resolve(what)
    if isinstance(found, RunRecord):
        refs = {node: Ref(found.stages[node], key) for node, key in found.keys.items() if node in found.stages}
        finished = {
            node: ref for node, ref in refs.items() if made_by(ref.stage) == "scores" and catalogue.folder(ref).newest
        }
        made = {node: _measured(catalogue, ref) for node, ref in finished.items()}
        if not made:
            raise ValueError(f"run {what} has no finished evaluation; run it first, or pin another")
        return made
    refs_of = [found] if made_by(found.stage) == "scores" else catalogue.evaluations_of(found)
    if not refs_of:
        raise ValueError(
            f"{found.stage}/{found.key[:12]} is neither an evaluation nor an evaluated model; evaluate it first"
        )
    by_node: dict[str, list[Ref]] = {}
    for ref in refs_of:
        by_node.setdefault(str(catalogue.manifest(ref).get("node") or ""), []).append(ref)
    for node, refs_of_node in by_node.items():
        if len(refs_of_node) > 1:
            names = ", ".join(f"evaluation/{ref.key[:12]}" for ref in refs_of_node)
            raise ValueError(f"{what} was evaluated more than once as {node}: {names}; pin one of these")
    return {node: _measured(catalogue, refs_of_node[0]) for node, refs_of_node in by_node.items()}


def _measured(catalogue: Catalogue, ref: Ref) -> MeasuredModel:
    newest = catalogue.folder(ref).newest
    if newest is None:
        raise ValueError(f"{ref.stage}/{ref.key[:12]} is gone: it is not finished")
    manifest = catalogue.manifest(ref, newest)
    model = next((given for given in inputs_of(manifest) if given.binding == "model"), None)
    if model is None:
        raise ValueError(f"{ref.stage}/{ref.key[:12]} does not say which model it measured")
    return MeasuredModel(
        stage=ref.stage, key=ref.key, generation=newest, digest=manifest["digest"], model_digest=model.digest
    )


def recipe_of(catalogue: Catalogue, what: str) -> str:
    """The recipe whose run is named, or whose runs have the artifact. ValueError where that is not one."""
    found = catalogue.resolve(what)
    if isinstance(found, RunRecord):
        return found.recipe
    model = found.key
    near = {model, *(ref.key for ref in catalogue.consumers.get(model, []))}
    names = sorted({run.recipe for run in catalogue.runs() if near & set(run.keys.values())})
    return names[0] if len(names) == 1 else only_recipe(catalogue, names)


def only_recipe(catalogue: Catalogue, names: list[str] | None = None) -> str:
    """The one recipe of a store that has nights (or of `names`). ValueError where there are several, or none."""
    if not names:
        folders = layout.scan(catalogue.root / layout.HISTORY)
        names = [entry.name for entry in folders if entry.is_dir()] or sorted({run.recipe for run in catalogue.runs()})
    if len(names) != 1:
        raise ValueError(f"give --recipe NAME; the store knows {', '.join(names) or 'none'}")
    return names[0]
