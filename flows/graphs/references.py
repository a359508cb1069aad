"""What a graph takes from outside the store: commits of Hub revisions, digests of local files, texts of models."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from smoltulu.flows.graphs.nodes import hub_reference, local_digests
from smoltulu.recipes import CHAT_TEMPLATES
from smoltulu.schemas.data import DataSource
from smoltulu.schemas.models import ModelSource
from smoltulu.tasks.data.hub import Reference, SourceUnavailable, hub_text, resolve_commits
from smoltulu.tasks.data.sources import expand_path


class References:
    """References of one recipe, resolved once.

    commits     Hub reference -> its commit, or why there is none
    unresolved  those without a commit that were asked for -> whether a run needs them (a benchmark may be missing)
    """

    def __init__(self, references: list[Reference], resolve: Callable[[Reference], str], keep_unresolved: bool) -> None:
        """`keep_unresolved`: a revision that cannot be resolved stays as written."""
        self.commits = resolve_commits(references, resolve)
        self.unresolved: dict[Reference, bool] = {}
        self._keep_unresolved = keep_unresolved

    def commit(self, reference: Reference, may_be_missing: bool = False) -> str:
        """The commit of a Hub reference. What `resolve` raised, where it may not be missing."""
        found = self.commits[reference]
        if isinstance(found, str):
            return found
        if not may_be_missing and not (self._keep_unresolved and isinstance(found, SourceUnavailable)):
            raise found
        self.unresolved[reference] = self.unresolved.get(reference, False) or not may_be_missing
        return reference.revision

    def pinned(
        self, sources: Iterable[DataSource], may_be_missing: bool = False
    ) -> tuple[tuple[DataSource, ...], dict[str, str]]:
        """Sources with Hub revisions resolved to commits, and the content digests of the local ones by position.

        With `may_be_missing`, an unreachable Hub source stays as it is: the stage reports it as not checked.
        """
        pinned = []
        for source in sources:
            if source.repository is not None:
                revision = self.commit(hub_reference(source), may_be_missing)
                source = source.model_copy(update={"revision": revision})
            pinned.append(source)
        return tuple(pinned), local_digests(pinned)

    def text_of_model(self, model: ModelSource, name: str) -> str | None:
        """Text of a file of a model, for its own chat template; None where it has no such file."""
        if model.repository is not None:
            reference = Reference("model", model.repository, model.revision)
            commit = self.commit(reference)
            try:
                if reference not in self.unresolved:
                    return hub_text(reference._replace(revision=commit), name)
            except SourceUnavailable as error:
                if not self._keep_unresolved:
                    raise
                self.commits[reference] = error
                self.commit(reference)
            # For looking only: all keys that follow from this text are provisional.
            return (CHAT_TEMPLATES / "tulu.jinja").read_text(encoding="utf-8")
        if model.path is None:
            raise ValueError(
                "chat_template own: a base model that is made here (base_model.scratch) has none; name a shipped "
                "template, e.g. tulu, or give the path of a .jinja file"
            )
        file = expand_path(model.path) / name
        return file.read_text(encoding="utf-8") if file.is_file() else None
