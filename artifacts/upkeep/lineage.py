"""Who made what from which data: the inputs of an artifact down to their sources, and what was made from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from smoltulu.artifacts.manifests import InputRef, Ref, inputs_of, scores_of, sources_of
from smoltulu.artifacts.nearest import flat
from smoltulu.artifacts.upkeep.catalogue import Catalogue

#: Inputs of every training and evaluation alike: said once for an artifact itself, not at each of its ancestors.
_EVERYWHERE = ("chat_template: ", ".definition: ")


@dataclass
class Relative:
    """An ancestor or a descendant.

    binding   input that it is, or as which a descendant takes what is above it
    node      name in the graph that first asked for it; empty where its manifest is gone
    mark      what is wrong: gone, made again since, not finished; empty where nothing is
    repeated  shown above, with its own relatives
    digest    of a descendant: its content now
    """

    ref: Ref
    binding: str
    node: str = ""
    finished_at: str = ""
    mark: str = ""
    scores: list[dict[str, Any]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    relatives: list[Relative] = field(default_factory=list)
    repeated: bool = False
    digest: str = ""


def ancestors(catalogue: Catalogue, manifest: dict[str, Any]) -> list[Relative]:
    """Inputs of an artifact, their inputs, and so on; each with its scores and with its sources outside the store."""
    seen: set[tuple[Ref, str]] = set()

    def visit(given: InputRef) -> Relative:
        found, mark = _as_recorded(catalogue, given)
        relative = Relative(given.ref, given.binding, mark=mark)
        if found is None:
            return relative
        relative.node, relative.finished_at = str(found.get("node", "")), str(found.get("finished_at", ""))
        if (given.ref, given.digest) in seen:
            relative.repeated = True
            return relative
        seen.add((given.ref, given.digest))
        relative.scores = catalogue.scores(given.ref)
        relative.sources = [source for source in sources_of(found) if not any(one in source for one in _EVERYWHERE)]
        relative.relatives = [visit(upstream) for upstream in _direct(found)]
        return relative

    return [visit(given) for given in _direct(manifest)]


def planned_inputs(catalogue: Catalogue, spec: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Inputs of an artifact that is not finished, in the form of a manifest's: by its spec, as they are now."""
    stages = {ref.key: ref.stage for ref in catalogue.refs}
    found = {binding: Ref(stages[key], key) for binding, key in flat(spec.get("inputs")).items() if key in stages}
    return {
        binding: {"stage": ref.stage, "key": ref.key, "digest": str(catalogue.known(ref).get("digest", ""))}
        for binding, ref in found.items()
    }


def descendants(catalogue: Catalogue, ref: Ref, limit: int | None = None) -> tuple[list[Relative], int]:
    """What was made from an artifact, and from that, and so on: the first `limit`, and how many more there are."""
    seen = {ref}
    num_shown, num_left = 0, 0

    def visit(upstream: Ref, digest: str, is_root: bool) -> list[Relative]:
        nonlocal num_shown, num_left
        relatives = []
        consumers = catalogue.consumers.get(upstream.key, [])
        for consumer in sorted(consumers):
            if consumer in seen:
                continue
            if limit is not None and num_shown >= limit:
                # Only counted: reading thousands of manifests that nobody sees would take long.
                seen.add(consumer)
                num_left += 1
                visit(consumer, "", False)
                continue
            if (relative := _consumer(catalogue, consumer, upstream, digest, is_root)) is None:
                continue
            seen.add(consumer)
            num_shown += 1
            relative.relatives = visit(consumer, relative.digest, False)
            relatives.append(relative)
        return relatives

    return visit(ref, str(catalogue.known(ref).get("digest", "")), True), num_left


def _consumer(catalogue: Catalogue, consumer: Ref, upstream: Ref, digest: str, is_root: bool) -> Relative | None:
    """A consumer; None where it names the artifact only among the ancestors of its model."""
    try:
        manifest = catalogue.manifest(consumer)
        inputs = [given for given in inputs_of(manifest) if given.ref == upstream]
    except ValueError:
        return Relative(consumer, "", mark="not finished")
    bindings = [given.binding for given in inputs]
    # A publication names all ancestors of its model, and every evaluation: it is shown under its model.
    hidden = ("lineage.",) if is_root else ("lineage.", "evaluations.")
    if not inputs or all(binding.startswith(hidden) for binding in bindings):
        return None
    earlier = digest and all(given.digest != digest for given in inputs)
    return Relative(
        consumer,
        ", ".join(bindings),
        str(manifest.get("node", "")),
        str(manifest.get("finished_at", "")),
        "made from an earlier content" if earlier else "",
        scores_of(manifest),
        digest=str(manifest.get("digest", "")),
    )


def _direct(manifest: dict[str, Any]) -> list[InputRef]:
    """Inputs in the order of the pipeline, without those that a publication names although its model has them."""
    try:
        inputs = [given for given in inputs_of(manifest) if not given.binding.startswith("lineage.")]
    except ValueError:
        return []
    # Models first: what an artifact is a training or evaluation of.
    return sorted(inputs, key=lambda given: (given.binding != "model", given.binding))


def _as_recorded(catalogue: Catalogue, given: InputRef) -> tuple[dict[str, Any] | None, str]:
    """Manifest of an input as it was when it was taken, and what has become of it since."""
    current = catalogue.known(given.ref)
    if current.get("digest") == given.digest:
        return current, ""
    for name in catalogue.folder(given.ref).whole:
        if catalogue.generation(given.ref, name).digest == given.digest:
            earlier = catalogue.manifest(given.ref, name)
            return earlier, f"stale: made again since; this is {name}"
    return current or None, "stale: made again since, and what was taken is gone" if current else "gone"
