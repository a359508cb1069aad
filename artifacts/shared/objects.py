"""Named bytes under a URL: the five operations that a shared store is built on, for object stores and folders.

Everything that must be atomic rests on one primitive, `create`: exclusive, whole, and true for exactly one caller.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import time
import uuid
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from stat import S_ISREG
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from smoltulu.artifacts.files import make_folder, open_plain, sync, write_synced
from smoltulu.artifacts.secrets import without_secrets

#: Protocols whose fsspec implementation creates exclusively on the server, each with its package: S3 by `If-None-Match:
#: *`, Google Cloud Storage by `ifGenerationMatch=0`, Azure by its own `overwrite=False`. fsspec's default (look, then
#: write) does not.
EXCLUSIVE_PROTOCOLS = {
    **dict.fromkeys(("s3", "s3a"), "'smoltulu[s3]'"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
}
#: What fsspec speaks encrypted only. S3's own server is the environment's to name (AWS_ENDPOINT_URL).
_ENCRYPTED = ("https", "sftp", "ssh", "hf", *EXCLUSIVE_PROTOCOLS)
_TEMPORARY = ".tmp-"
_PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
Result = TypeVar("Result")


class RemoteError(ValueError):
    """A shared store that cannot be used as asked; the text says what to do and holds no credentials."""


class Objects(Protocol):
    """Errors: FileNotFoundError for a name that is not there, OSError for the rest, after bounded retries.

    `patience` is how long transient errors are retried, in seconds.
    """

    #: URL without anything secret, for messages
    url: str
    #: whether `create` is exclusive
    writable: bool

    def list(self, prefix: str, patience: float = 60.0) -> dict[str, int]:
        """Name -> size in bytes of every object below the folder `prefix`; never from a cache."""

    def get(self, name: str, patience: float = 60.0) -> bytes:
        """All bytes of an object."""

    def put(self, name: str, data: bytes, patience: float = 60.0) -> None:
        """Write or overwrite an object; readers see the old bytes or the new ones."""

    def create(self, name: str, data: bytes, patience: float = 60.0) -> bool:
        """Write an object if there is none: true for exactly one caller. No two callers may bring the same `data`."""

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; what cannot be removed stays, for it only costs space."""

    def settle(self, prefix: str) -> None:
        """Have what `list` names from here on last, and remove what killed writers left half-written below `prefix`."""
        return None

    def prepare(self) -> None:
        """Make the root where that is ours to do; making buckets is for people."""
        return None


def open_objects(url: str, allow_http: bool = False) -> Objects:
    """The objects under a URL or a folder. Raises RemoteError for a URL that cannot be used; makes no request.

    allow_http  also a URL whose answers anyone on the way can read and replace
    """
    if "://" not in url and "::" not in url:
        return FolderObjects(Path(url).expanduser().absolute())
    if "::" in url:
        raise RemoteError(f"{without_secrets(url)} chains file systems; give one URL (the local store is the cache)")
    parts = urlsplit(url)
    protocol = parts.scheme.lower()
    if protocol in ("file", "local"):
        if parts.netloc not in ("", "localhost"):
            raise RemoteError(f"{parts.netloc!r} is a host, a file URL has none; write file:///folder or /folder")
        return FolderObjects(Path(parts.path))
    # Azure writes container@account; everywhere else what stands before an @ is a credential.
    user = parts.netloc.rpartition("@")[0]
    if parts.query or parts.fragment or ":" in user or (user and protocol not in ("abfs", "abfss")):
        raise RemoteError(
            f"the URL of the shared store ({protocol}://...) holds credentials or options; give only bucket and path, "
            "and credentials by the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, "
            "AWS_ENDPOINT_URL; GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_CONNECTION_STRING). "
            "If this one was committed or logged anywhere, replace the credentials"
        )
    if not parts.netloc:
        raise RemoteError(f"{url} names no bucket; write {protocol}://bucket/path")
    if protocol not in _ENCRYPTED and not allow_http and not _is_this_machine(parts.hostname or ""):
        raise RemoteError(
            f"{without_secrets(url)} is not encrypted, as far as we know: whoever is on the way can read and replace "
            "what comes from it. Use https://, s3:// or a folder, or set compute.allow_http: true where you trust the "
            "network"
        )
    return RemoteObjects(url.rstrip("/"), protocol)


class FolderObjects:
    """Objects as files below a folder that several machines may share (NFS, a mounted disk)."""

    writable = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)
        #: folders whose names are on disk, as far as this process knows
        self._there: set[Path] = set()

    def list(self, prefix: str, patience: float = 60.0) -> dict[str, int]:
        sizes = {}
        for folder, _, names in os.walk(self.root / prefix, onerror=_unless_gone):
            for name in names:
                path = Path(folder, name)
                if not name.startswith(_TEMPORARY):
                    # Another one may remove it between the two calls.
                    with contextlib.suppress(FileNotFoundError):
                        if S_ISREG((found := path.stat()).st_mode):
                            sizes[path.relative_to(self.root).as_posix()] = found.st_size
        return sizes

    def get(self, name: str, patience: float = 60.0) -> bytes:
        with open(open_plain(self.root / name), "rb") as file:
            return file.read()

    def put(self, name: str, data: bytes, patience: float = 60.0) -> None:
        self._temporary(name, data).replace(self.root / name)
        self._keep(self.root / name)

    def create(self, name: str, data: bytes, patience: float = 60.0) -> bool:
        temporary = self._temporary(name, data)
        try:
            # A link appears whole and never replaces: O_EXCL would show an empty file first. Both hold on NFS.
            os.link(temporary, self.root / name)
        except FileExistsError:
            # On NFS the answer to a link that worked can be lost and the link tried again.
            if self.get(name) != data:
                return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            raise RemoteError(
                f"the file system of {self.root} has no hard links, so that nothing can be created there exclusively; "
                "use a folder on a local disk or NFS, or s3://, gs:// or az:// directly instead of a mounted bucket"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)
        self._keep(self.root / name)
        return True

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                (self.root / name).unlink()

    def settle(self, prefix: str) -> None:
        for folder, _, names in os.walk(self.root / prefix, onerror=_unless_gone):
            for name in names:
                if name.startswith(_TEMPORARY):
                    Path(folder, name).unlink(missing_ok=True)
            # Who made a name may have been killed before it was on disk, and nobody would upload it again.
            with contextlib.suppress(FileNotFoundError):
                sync(Path(folder))

    def prepare(self) -> None:
        # Only the last folder: where a disk is not mounted, the folders above are missing, and must stay so.
        self.root.mkdir(exist_ok=True, mode=0o770)
        sync(self.root.parent)

    @staticmethod
    def _keep(path: Path) -> None:
        """Have a new name last, and see that it is there: a server that lost power before the sync has lost it."""
        sync(path.parent)
        try:
            os.close(open_plain(path))  # `stat` may be answered from the client's cache
        except FileNotFoundError:
            raise OSError(errno.ESTALE, f"{path} is gone, just written: its server was restarted") from None

    def _temporary(self, name: str, data: bytes) -> Path:
        folder = (self.root / name).parent
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} is gone")
        if folder not in self._there or not folder.is_dir():
            try:
                make_folder(folder, self.root)
            except ValueError as error:
                raise NotADirectoryError(errno.ENOTDIR, str(error)) from None
            self._there.add(folder)
        temporary = folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
        write_synced(temporary, data)
        return temporary


class RemoteObjects(Objects):
    """Objects behind fsspec. Credentials come from the environment, as each file system reads them."""

    def __init__(self, url: str, protocol: str) -> None:
        self.url = url
        self.writable = protocol in EXCLUSIVE_PROTOCOLS
        self._protocol = protocol

    def list(self, prefix: str, patience: float = 60.0) -> dict[str, int]:
        def found() -> dict[str, Any]:
            self._files.invalidate_cache()
            try:
                return self._files.find(prefix, detail=True)
            except FileNotFoundError:
                return {}

        listed = _persist(found, patience)
        return {name: int(info["size"] or 0) for name, info in listed.items() if info["type"] == "file"}

    def get(self, name: str, patience: float = 60.0) -> bytes:
        return bytes(_persist(lambda: self._files.cat_file(name), patience))

    def put(self, name: str, data: bytes, patience: float = 60.0) -> None:
        _persist(lambda: self._files.pipe_file(name, data), patience)

    def create(self, name: str, data: bytes, patience: float = 60.0) -> bool:

        def attempt() -> bool:
            try:
                self._files.pipe_file(name, data, mode="create")
                return True
            except (FileNotFoundError, PermissionError):
                raise
            except OSError:
                # "There is one", said in as many ways as there are servers, or an answer that was lost on its way
                # after the write was done: what is there now tells.
                with contextlib.suppress(FileNotFoundError):
                    return bytes(self._files.cat_file(name)) == data
                raise

        return _persist(attempt, patience)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                self._files.rm_file(name)

    @cached_property
    def _files(self) -> Any:
        return _file_system(self.url, self._protocol)


def _is_this_machine(host: str) -> bool:
    """Whether a host is a loopback address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _unless_gone(error: OSError) -> None:
    """For os.walk, which else takes a folder that may not be read for an empty one."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _file_system(url: str, protocol: str) -> Any:
    """fsspec's file system below a URL, without its caches."""
    import fsspec
    from fsspec.implementations.dirfs import DirFileSystem

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in ("s3", "s3a"):
        # Short timeouts and no retries below ours: a lost packet must not hold up a heartbeat for minutes.
        options["config_kwargs"] = {"connect_timeout": 10, "read_timeout": 30, "retries": {"max_attempts": 1}}
        # Parts are transferred side by side by us; with its own concurrency every read asks for the size first.
        options["max_concurrency"] = 1
    try:
        file_system, root = fsspec.core.url_to_fs(url, **options)
    except ImportError:
        package = EXCLUSIVE_PROTOCOLS.get(protocol)
        how = f"pip install {package}" if package else "install the package that fsspec names for it"
        raise RemoteError(f"{protocol}:// needs a package that is not installed; {how}") from None
    except ValueError:
        raise RemoteError(f"{protocol}:// is no protocol that fsspec knows; use s3, gs, az or a folder") from None
    if protocol in ("s3", "s3a"):
        file_system.retries = 1
    return DirFileSystem(root.rstrip("/"), file_system, skip_instance_cache=True)


def _persist(action: Callable[[], Result], patience: float) -> Result:
    """Try again while it fails with what may pass (5xx, timeouts, no connection), for `patience` seconds at most."""
    deadline = time.monotonic() + patience
    pause = 0.2
    while True:
        try:
            return action()
        except _PERMANENT:
            raise
        except Exception as error:
            # Backends leak their own errors (botocore, aiohttp) where fsspec does not translate them.
            if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError"):
                raise PermissionError(str(error)) from None
            if time.monotonic() + pause > deadline:
                if isinstance(error, OSError):
                    raise
                raise OSError(f"{type(error).__name__}: {error}") from error
        time.sleep(pause)
        pause = min(pause * 2, 5.0)


def explained(error: OSError, url: str) -> RemoteError:
    """A failure of the backend as a text for people, without credentials."""
    if isinstance(error, PermissionError):
        advice = "access was refused; check the credentials in the environment and that they may list, read and write"
    elif isinstance(error, FileNotFoundError):
        advice = "there is no such bucket or folder; make it, or correct compute.remote"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "it is full; free some space there and run again, the upload goes on where it stopped"
    elif isinstance(error, (IsADirectoryError, NotADirectoryError)) or error.errno == errno.EINVAL:
        advice = "something that is no file of ours lies in it; move it away"
    else:
        advice = "it cannot be reached; check the network and AWS_ENDPOINT_URL, or run without compute.remote"
    return RemoteError(f"shared store {url}: {advice} ({type(error).__name__}: {without_secrets(str(error))})")
