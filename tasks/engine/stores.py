"""The store that a recipe names, and what is believed of what lies there."""

from __future__ import annotations

from smoltulu.artifacts.store import Store
from smoltulu.schemas.artifact import Manifest
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.data.sources import expand_path, expand_text
from smoltulu.tasks.stages import STAGES


def open_store(compute: ComputeSettings, checked: bool = True) -> Store:
    """The store of `compute`, with the shared one behind it where `compute.remote` names one.

    checked  try at once what a run needs of the shared store. Raises ValueError where it cannot be used.
    """
    root = expand_path(compute.store)
    if compute.remote is None:
        return Store(root, _refusal)
    from smoltulu.artifacts.shared.door import Remote, SharedStore

    store = SharedStore(root, Remote(expand_text(compute.remote), allow_http=compute.allow_http), _refusal)
    if checked:
        store.remote.check(writing=store.remote.writable)
    return store


def _refusal(manifest: Manifest) -> str | None:
    """Why an artifact does not count: its outputs are not its stage's."""
    stage = STAGES.get(manifest.spec.stage)
    try:
        if stage is not None and stage.version == manifest.spec.version:
            stage.outputs_of(manifest)
    except ValueError as error:
        return str(error)
    return None
