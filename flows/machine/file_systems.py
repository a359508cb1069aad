"""Which file system a folder lies on, and whether its locks reach from one machine to another. Pure, but for a read.

Artifacts are kept apart by flock. A file system that keeps such locks on each machine for itself lets two machines
write one artifact. Sources: man nfs (nolock, local_lock), mount.lustre (flock, localflock), mount.cifs (nobrl), Linux
fs/fuse (flock stays local unless the file system takes FUSE_FLOCK_LOCKS).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

#: One machine has them: other machines see them at most through another file system.
_OF_ONE_MACHINE = {
    "apfs", "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "rootfs", "tmpfs", "xfs", "zfs",
}  # fmt: skip
#: Locks of these never leave the machine; of those by FUSE these alone have locks for all machines.
_LOCAL_LOCKS = {"9p", "vboxsf", "virtiofs"}
_FUSE_WITH_LOCKS = {"fuse.ceph", "fuse.ceph-fuse", "fuse.glusterfs", "fuse.juicefs"}


@dataclass(frozen=True)
class Mount:
    """A line of /proc/mounts."""

    folder: str
    kind: str
    options: frozenset[str]


def mounts(table: str) -> list[Mount]:
    """Of the text of /proc/mounts. Blanks in names are written as octal numbers there."""
    found = []
    for line in table.splitlines():
        parts = line.split(" ")
        if len(parts) >= 4:
            folder = parts[1].encode().decode("unicode_escape").encode("latin-1", "replace").decode("utf-8", "replace")
            found.append(Mount(folder, parts[2], frozenset(parts[3].split(","))))
    return found


def mount_of(path: Path, among: Iterable[Mount]) -> Mount | None:
    """The mount that an absolute path without links lies on: the longest one above it, of equal ones the last."""
    above = {str(one) for one in (path, *path.parents)}
    best: Mount | None = None
    for mount in among:
        if mount.folder in above and (best is None or len(mount.folder) >= len(best.folder)):
            best = mount
    return best


def without_locks(mount: Mount) -> str | None:
    """Why locks on it do not hold between machines; None where nothing says so."""
    options = {option.partition("=")[0]: option.partition("=")[2] for option in mount.options}
    why = None
    if mount.kind == "lustre" and "flock" not in options:
        why = "mounted with localflock" if "localflock" in options else "mounted without flock"
    elif mount.kind in ("nfs", "nfs4") and ("nolock" in options or options.get("local_lock") in ("all", "flock")):
        why = f"mounted with {'nolock' if 'nolock' in options else 'local_lock=' + options['local_lock']}"
    elif mount.kind in ("cifs", "smb3") and "nobrl" in options:
        why = "mounted with nobrl"
    elif mount.kind in _LOCAL_LOCKS or (mount.kind.startswith("fuse.") and mount.kind not in _FUSE_WITH_LOCKS):
        why = "whose locks stay on one machine"
    return None if why is None else f"{mount.folder} is {mount.kind}, {why}"


def doubt_of_locks(mount: Mount) -> str | None:
    """Why nobody can tell from a mount whether its locks hold between machines; None where it says so."""
    if mount.kind != "beegfs":
        return None
    return (
        f"{mount.folder} is beegfs, whose locks hold between machines only with tuneUseGlobalFileLocks = true in the "
        "configuration of its clients (by default it is false up to BeeGFS 7)"
    )


def is_of_one_machine(mount: Mount) -> bool:
    """Whether no other machine sees it as it is."""
    return mount.kind in _OF_ONE_MACHINE


def mount_of_folder(folder: Path) -> Mount | None:
    """The mount of a folder, which need not exist yet; None where the system does not say."""
    there = next((one for one in (folder, *folder.parents) if os.path.lexists(one)), folder)
    try:
        return mount_of(there.resolve(), mounts(Path("/proc/mounts").read_text(errors="replace")))
    except OSError:
        return None
