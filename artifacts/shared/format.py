"""How an artifact lies in a shared store, and what of it is believed.

Objects below `<url>/<stage>/<key>/`:
  files/<blake3>                        bytes of a file, named by their digest
  files/<blake3>.<part bytes>.<number>  the same in parts, so that a transfer goes on where it stopped
  manifests/<blake3>.json               the artifact's manifest, byte for byte, written after all files
  turns/<token>.{lease,beat,end}        who makes it; the newest end that says `published` names the current manifest
  damaged/<object>                      a reader found other bytes there than the name promises

Objects are named by content and never change their meaning: two uploads cannot mix, a file that a generation shares
with the one before is uploaded once, no file name reaches the server, and what is missing or damaged is written again
in place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from smoltulu.artifacts.keys import artifact_key, records_digest
from smoltulu.artifacts.layout import MANIFEST
from smoltulu.artifacts.store import ManifestVersionError, parse_manifest
from smoltulu.schemas.artifact import FileRecord, Manifest

#: Folder in the target of a pull: what is not finished yet.
PULL_STATE = ".pull"
_MAX_NAME_BYTES = 1024


@dataclass(frozen=True)
class RemoteArtifact:
    """A published artifact whose manifest was checked; its files are checked when they are pulled."""

    token: int
    manifest: Manifest
    manifest_bytes: bytes = field(repr=False)
    part_bytes: int


@dataclass(frozen=True)
class Part:
    """A piece of a file as one object."""

    name: str
    offset: int
    size: int


def parts_of(record: FileRecord, part_bytes: int) -> list[Part]:
    """The objects that hold a file: none for an empty one, one named by the digest alone up to `part_bytes`."""
    if record.size <= part_bytes:
        return [Part(record.blake3, 0, record.size)] if record.size else []
    return [
        Part(f"{record.blake3}.{part_bytes}.{offset // part_bytes:05d}", offset, min(part_bytes, record.size - offset))
        for offset in range(0, record.size, part_bytes)
    ]


def unfit_file_names(names: list[str]) -> list[str]:
    """Names in a manifest that must not be written to: outside of the folder, ambiguous or ours."""
    folders = {name[:index] for name in names for index, letter in enumerate(name) if letter == "/"}
    return [name for name in names if name in folders or not _is_plain(name)]


def _is_plain(name: str) -> bool:
    parts = name.split("/")
    return (
        name.isprintable()
        and "\\" not in name
        and not any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
        and len(name.encode()) <= _MAX_NAME_BYTES
        and parts[0] not in (PULL_STATE, MANIFEST)
    )


def checked_manifest(data: bytes, stage: str, key: str) -> Manifest:
    """The manifest of an artifact from bytes that anyone may have written. Raises ValueError with the reason."""
    try:
        manifest = parse_manifest(data)
        own_key = artifact_key(manifest.spec)
    except ManifestVersionError:
        raise
    except ValueError as error:
        raise ValueError(f"its manifest is refused: {error}") from None
    if (manifest.key, manifest.spec.stage, own_key) != (key, stage, key):
        raise ValueError("its manifest is that of another artifact")
    if records_digest(manifest.files) != manifest.digest:
        raise ValueError("its manifest contradicts itself: the digest is not that of its files")
    if unfit := unfit_file_names(list(manifest.files)):
        raise ValueError(f"its manifest is refused: file name {unfit[0]!r} is no plain relative path")
    sizes = {(record.blake3, record.size) for record in manifest.files.values()}
    if len(sizes) != len({digest for digest, _ in sizes}):
        raise ValueError("its manifest contradicts itself: two sizes for the same bytes")
    return manifest
