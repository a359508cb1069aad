"""Names for artifacts that gc keeps: `<store root>/tags/<name>.json`."""

from __future__ import annotations

import contextlib
import os
import re
from datetime import UTC, datetime

from smoltulu.artifacts.files import make_folder, write_atomically
from smoltulu.artifacts.layout import CURRENT, TAGS, record_path
from smoltulu.artifacts.manifests import Ref, inputs_of
from smoltulu.artifacts.upkeep.catalogue import Catalogue
from smoltulu.schemas.run import TagRecord

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LIKE_A_KEY = re.compile(r"[0-9a-f]{4,64}")


def set_tag(catalogue: Catalogue, name: str, ref: Ref, *, move: bool = False) -> TagRecord | None:
    """Name a finished artifact; returns what the tag named before. ValueError where the name cannot be given."""
    if not _NAME.fullmatch(name) or _LIKE_A_KEY.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot be a tag: letters, digits, '.', '_' and '-', at most 100, beginning with a letter or "
            "digit, and not of the form of a key (only 0-9 and a-f)"
        )
    before = catalogue.tags().get(name)
    if before is not None and (before.stage, before.key) != ref and not move:
        raise ValueError(f"tag {name!r} names {before.stage}/{before.key[:12]} already; give --move to let it go")
    if catalogue.folder(ref).newest is None:
        raise ValueError(f"{ref.stage}/{ref.key[:12]} is not finished; only a finished artifact can be tagged")
    record = TagRecord(stage=ref.stage, key=ref.key, tagged_at=datetime.now(UTC).isoformat(timespec="seconds"))
    file = record_path(catalogue.root, TAGS, name)
    make_folder(file.parent, catalogue.root)
    if file.is_dir():
        raise ValueError(f"{file} is a folder; move it away, then give the tag")
    write_atomically(file, record.model_dump_json(indent=1))
    _touch_lineage(catalogue, ref)
    return before


def remove_tag(catalogue: Catalogue, name: str) -> TagRecord | None:
    """Take a tag away; returns what it named, None where it could not be read. ValueError where there is none."""
    before = catalogue.tags().get(name)
    file = record_path(catalogue.root, TAGS, name)
    if "/" in name or not file.is_file():
        raise ValueError(f"no tag {name!r}; there: {', '.join(catalogue.tags()) or 'none'}")
    file.unlink(missing_ok=True)
    return before


def _touch_lineage(catalogue: Catalogue, ref: Ref) -> None:
    """Mark an artifact and its inputs as used now: a gc that planned a moment ago then leaves them."""
    pending, seen = [ref], set()
    while pending:
        ref = pending.pop()
        if ref in seen:
            continue
        seen.add(ref)
        with contextlib.suppress(OSError):
            os.utime(catalogue.path(ref) / CURRENT)
        with contextlib.suppress(ValueError):
            pending += [given.ref for given in inputs_of(catalogue.manifest(ref))]
