"""The store that a recipe names, and what is believed of what lies there."""

from __future__ import annotations

from collections.abc import Mapping

from smoltulu.artifacts.store import Found, Missing, Store
from smoltulu.schemas.artifact import Manifest, Spec
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.data.sources import expand_path, expand_text
from smoltulu.tasks.stage import Stage
from smoltulu.tasks.stages import STAGES


def open_store(compute: ComputeSettings, checked: bool = True) -> Store:
    """The store of `compute`, with the shared one behind it where `compute.remote` names one.

    checked  try at once what a run needs of the shared store. Raises ValueError where it cannot be used.
    """
    root = expand_path(compute.store)
    if compute.remote is None:
        return Store(root)
    from smoltulu.artifacts.shared.door import Remote, SharedStore

    store = SharedStore(root, Remote(expand_text(compute.remote), allow_http=compute.allow_http), _refusal)
    if checked:
        store.remote.check(writing=store.remote.writable)
    return store


def find(store: Store, stage: Stage, spec: Spec, input_digests: Mapping[str, str]) -> Found | Missing:
    """The artifact of a spec as `Store.find`; one whose outputs are not the stage's own counts as damaged."""
    found = store.find(spec, dict(input_digests))
    if isinstance(found, Found):
        try:
            stage.outputs_of(found.manifest)
        except ValueError as error:
            return Missing(f"{found.folder.name}: {error}", damaged=found.folder.name)
    return found


def _refusal(manifest: Manifest) -> str | None:
    """Why an artifact of the shared store is not taken."""
    try:
        STAGES[manifest.spec.stage].outputs_of(manifest)
    except ValueError as error:
        return str(error)
    return None
