"""Full check of a store: every byte against its manifest, every manifest against its key, every pointer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from smoltulu.artifacts.files import READ_ERRORS
from smoltulu.artifacts.keys import artifact_key, records_digest
from smoltulu.artifacts.layout import CURRENT, TAGS, KeyFolder, number_of
from smoltulu.artifacts.locks import hold_if_idle
from smoltulu.artifacts.manifests import Ref
from smoltulu.artifacts.store import Found, ManifestVersionError, Store, read_manifest
from smoltulu.artifacts.upkeep.catalogue import Catalogue
from smoltulu.schemas.artifact import Manifest, Spec
from smoltulu.schemas.common import printable

#: Artifacts at a time: their files are hashed by several threads each, this hides the waiting for many small ones.
_NUM_AT_ONCE = 4
_EFFECTIVE = os.access in os.supports_effective_ids


@dataclass(frozen=True)
class Finding:
    """What the check of one generation, pointer or tag gave.

    status  ok, damaged, unreadable (rights, or a disk that fails for a moment), other version
    faults  a sentence each
    aside   what became of a damaged one: where it was set aside, or why it was not
    """

    ref: Ref
    name: str
    status: str
    faults: tuple[str, ...] = ()
    num_bytes: int = 0
    aside: str = ""


def verify_artifacts(catalogue: Catalogue, refs: Iterable[Ref], *, report_only: bool) -> Iterator[Finding]:
    """Check every generation of the given artifacts; damaged ones are set aside unless `report_only`."""
    folders = [catalogue.folder(ref) for ref in refs]
    todo = [(folder, name) for folder in folders for name in (*folder.whole, *folder.headless)]
    pool = ThreadPoolExecutor(_NUM_AT_ONCE)
    try:
        for (folder, _), finding in zip(todo, pool.map(lambda work: _check_generation(*work), todo), strict=True):
            if finding.status == "damaged" and not report_only:
                finding = _set_aside(catalogue.root, folder, finding)
            yield finding
    finally:
        # Interrupted: what was not begun must not be waited for.
        pool.shutdown(cancel_futures=True)
    for folder in folders:
        yield from _check_pointer(folder)


def verify_tags(catalogue: Catalogue) -> list[Finding]:
    """Tags that name nothing that is there."""
    return [
        Finding(Ref(tag.stage, tag.key), f"{TAGS}/{name}", "damaged", ("names an artifact that is not there",))
        for name, tag in catalogue.tags().items()
        if catalogue.folder(Ref(tag.stage, tag.key)).newest is None
    ]


def _check_generation(folder: KeyFolder, name: str) -> Finding:
    path = folder.path / name
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        return Finding(folder.ref, name, "damaged", ("it has no manifest",))
    except ManifestVersionError as error:
        return Finding(folder.ref, name, "other version", (str(error),))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in READ_ERRORS:
            return Finding(folder.ref, name, "unreadable", (f"its manifest cannot be read ({error.strerror})",))
        what = f"it {error.strerror}" if isinstance(error, OSError) else str(error)
        return Finding(folder.ref, name, "damaged", (f"its manifest is unreadable: {what}",))
    closed = [
        file
        for file in manifest.files
        if os.path.exists(path / file) and not os.access(path / file, os.R_OK, effective_ids=_EFFECTIVE)
    ]
    if closed:
        return Finding(folder.ref, name, "unreadable", tuple(f"{printable(file)} may not be read" for file in closed))
    try:
        faults = [*_manifest_faults(folder, manifest), *Store(folder.path.parent.parent).verify(Found(manifest, path))]
    except (OSError, ValueError) as error:  # whatever one of them is, the others are looked at too
        # What may not be read now is not damaged: it is left where it is.
        if isinstance(error, OSError) and error.errno in READ_ERRORS:
            where = printable(os.path.relpath(error.filename, path)) if error.filename else "a file of it"
            return Finding(folder.ref, name, "unreadable", (f"{where} could not be read ({error.strerror})",))
        return Finding(folder.ref, name, "damaged", (f"it cannot be checked: {printable(str(error))}",))
    size = sum(record.size for record in manifest.files.values())
    return Finding(folder.ref, name, "damaged" if faults else "ok", tuple(faults), size)


def _manifest_faults(folder: KeyFolder, manifest: Manifest) -> Iterator[str]:
    if manifest.key != folder.ref.key or manifest.spec.stage != folder.ref.stage:
        yield "its manifest is that of another artifact"
    # Another format of the spec has another spelling, and so another key.
    elif manifest.spec.format == Spec.model_fields["format"].default and artifact_key(manifest.spec) != manifest.key:
        yield "the spec in its manifest does not give its key"
    if records_digest(manifest.files) != manifest.digest:
        yield "the file list in its manifest does not give its digest"


def _check_pointer(folder: KeyFolder) -> Iterator[Finding]:
    """A pointer to nothing. One to a generation that was set aside is as it should be."""
    name = folder.current
    if name is None or name in folder.whole or name in folder.headless:
        return
    if not number_of(name):
        yield Finding(folder.ref, CURRENT, "damaged", (f"names {name[:40]!r}, which is no generation",))
    elif not folder.set_aside(name):
        yield Finding(folder.ref, CURRENT, "damaged", (f"names {name}, which is gone",))


def _set_aside(root: Path, folder: KeyFolder, finding: Finding) -> Finding:
    try:
        with hold_if_idle(folder.path) as holder:
            if holder is not None:
                aside = f"left: in use by {holder}"
            # Made again or removed while we read: what we saw is not what is there.
            elif _check_generation(folder, finding.name).status != "damaged":
                aside = "left: it changed meanwhile"
            else:
                moved = Store(root).quarantine(folder.path, finding.name, "; ".join(finding.faults))
                aside = f"set aside as {moved.name}"
    except OSError as error:
        aside = f"left: cannot be set aside ({error.strerror})"
    return replace(finding, aside=aside)
