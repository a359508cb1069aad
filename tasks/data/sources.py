"""Reads tables of rows, and computes what identifies their content.

Sources are local files, files of the `world` stage, rows that a model wrote, and Hub datasets. Fast to import: `plan`
only needs digests, so torch, datasets, pyarrow and huggingface_hub are imported where they are used.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts.secrets import find_secret, is_secret_name, without_secrets
from smoltulu.schemas.data import DataSource
from smoltulu.tasks.data.files import is_json_of_rows, read_file, read_json_of_rows, read_separated
from smoltulu.tasks.data.files import read_blocks as file_blocks
from smoltulu.tasks.data.folders import ALL_SUBSETS, DataFiles, data_files, parts_of, shown
from smoltulu.tasks.data.hub import SourceUnavailable, resolve_commit
from smoltulu.tasks.data.json_rows import Lines, OnBadLine
from smoltulu.tasks.data.rows import stored_rows

if TYPE_CHECKING:
    from datasets import DatasetBuilder

logger = logging.getLogger("smoltulu")

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_MAX_NAME_BYTES = 255
#: What `datasets` says of a configuration or a split that there is not, or that it cannot read.
_NO_SUCH_ROWS = re.compile(r"BuilderConfig|Unknown split|Bad split|Unrecognized instruction|Split name should match")


def expand_path(text: str) -> Path:
    """A path with its variables and `~` expanded. ValueError as `expand_text`, or for a name that is too long."""
    path = Path(expand_text(text)).expanduser()
    for part in path.parts:
        if (num_bytes := len(os.fsencode(part))) > _MAX_NAME_BYTES:
            raise ValueError(
                f"path {str(path)[:80]!r}...: a name in it has {num_bytes:,} bytes, file systems take {_MAX_NAME_BYTES}"
            )
    return path


def expand_text(text: str) -> str:
    """`text` with `${VARIABLE}`, `${VARIABLE:-default}` (used where it is unset or empty, as in a shell).

    What comes of it is opened, sent as part of a URL, printed and recorded: it never holds a secret.

    Raises:
        ValueError: a variable without a default is unset, a `${` is not of these forms, or a secret would be in it.
    """

    shown = repr(without_secrets(text))

    def value(match: re.Match[str]) -> str:
        name, default = match.groups()
        if is_secret_name(name):
            raise ValueError(
                f"path {shown}: {name} is the name of a secret, which is never put into a path or URL; credentials "
                "are read from the environment where they are needed. Where it is none, give the variable another name"
            )
        found = os.environ.get(name)
        if found:
            return found
        if default is None:
            raise ValueError(
                f"path {shown}: the environment variable {name} is not set; set it or write ${{{name}:-default}}"
            )
        return default

    expanded = _VARIABLE.sub(value, text)
    if "${" in expanded:
        raise ValueError(f"path {shown}: write variables as ${{NAME}} or ${{NAME:-default}}")
    if (secret := find_secret(expanded)) is not None:
        raise ValueError(
            f"path {shown}: {secret} would be in it; a path or URL holds no secrets, credentials are "
            "read from the environment where they are needed"
        )
    return expanded


def read_rows(
    source: DataSource,
    world: Path | None = None,
    digest: str | None = None,
    sampled: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Any]:
    """The first `limit` rows of `source`, in order and unchanged.

    A row that is not an object (a line `[1]`) is yielded too: the caller decides whether to drop it. A file that cannot
    be parsed is an error, because nothing after the fault can be trusted.

    Args:
        source: `format` and `fields` are not used here.
        world: folder of the world artifact, for `generated` sources.
        digest: what `source_digest` of a `path` source must be while it is read; None: not compared.
        sampled: name of a `sampled` source -> its rows file.

    Raises:
        SourceUnavailable: a Hub dataset that cannot be reached or accessed.
        ValueError: a file is missing, of an unknown kind, truncated or not parseable, or a folder has no files; after
            the last row: the content is not the one that `digest` names.
    """
    if source.repository is not None:
        return _read_hub(source)
    if source.sampled is not None:
        if source.sampled not in sampled:
            raise ValueError(f"data source {source.sampled!r} is sampled, and its rows were not given")
        return islice(stored_rows(Path(sampled[source.sampled])), source.limit)
    # Looking for the files is done now, so that a missing one is reported before the first row is asked for.
    found = local_files(source, world)
    rows = islice(_rows_of_files(source, found), source.limit)
    return rows if digest is None else _unchanged(rows, source, found, digest)


def read_blocks(
    source: DataSource,
    world: Path | None = None,
    digest: str | None = None,
    sampled: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Lines | Iterable[Any]]:
    """The same rows in blocks: lines of JSON that are not parsed yet, or rows. Arguments and errors as `read_rows`."""
    is_part = source.limit is not None or source.split not in (None, "all")
    if source.path is None or is_part:
        return iter([read_rows(source, world, digest, sampled)])
    found = local_files(source, world)
    blocks = (block for path in found.paths for block in file_blocks(path, source.on_bad_line))
    return blocks if digest is None else _unchanged(blocks, source, found, digest)


def _rows_of_files(source: DataSource, found: DataFiles) -> Iterator[Any]:
    def of(names: Iterable[str]) -> Iterator[Any]:
        return (row for name in names for row in read_file(found.root / name, source.on_bad_line))

    split = source.split
    if split is None or split == "all" or split in found.splits:
        return of(found.names)
    return iter(_parts(split, {name: of(names) for name, names in found.splits.items()}, source.label))


def local_files(source: DataSource, world: Path | None = None) -> DataFiles:
    """The files of a `path` or `generated` source. Raises ValueError if there is none, or for what cannot be read."""
    if source.generated is not None:
        if world is None:
            raise ValueError(f"data source {source.generated!r} is generated, but the recipe has no world stage")
        path, given = Path(world) / source.generated, repr(source.generated)
    else:
        assert source.path is not None, source
        path = expand_path(source.path)
        given = repr(source.path) if str(path) == source.path else f"{source.path!r} (expanded: {str(path)!r})"
    try:
        is_there = path.exists()
    except OSError as error:  # a loop of links
        raise ValueError(f"data source {given}: cannot be read ({error.strerror or error})") from error
    if not is_there:
        raise ValueError(
            f"data source {given}: {str(path.absolute())!r} does not exist; relative paths start at the recipe file's "
            "folder, and at the working folder where they begin with a variable or there is no file"
        )
    try:
        found = data_files(path, source.split, source.subset)
    except ValueError as error:
        raise ValueError(f"data source {given}: {error}") from None
    if path.is_dir():
        _notice_links(found, given)
    return found


def _notice_links(found: DataFiles, given: str) -> None:
    """Say once that files of a folder lie elsewhere: whoever made the links chose what is read."""
    root = found.root.resolve()
    outside = [name for name in found.names if not (found.root / name).resolve().is_relative_to(root)]
    if outside and (given, tuple(outside)) not in _noticed:
        _noticed.add((given, tuple(outside)))
        first = shown(str((found.root / outside[0]).resolve()))
        logger.warning(
            "data source %s: %d of its files are links to places outside of the folder, e.g. %s -> %s",
            given, len(outside), shown(outside[0]), first,
        )  # fmt: skip


_noticed: set[tuple[str, tuple[str, ...]]] = set()


def _unchanged(rows: Iterator[Any], source: DataSource, found: DataFiles, digest: str) -> Iterator[Any]:
    """`rows`, read from `found`. ValueError where those are not what `digest` names from the first to the last row."""
    before = _states(found.paths)
    if source_digest(source) == digest:
        yield from rows
        # The system's time of change cannot be set back, as a file's content can.
        if local_files(source) == found and _states(found.paths) == before:
            return
    names = ", ".join(found.names[:3]) + (" …" if len(found.names) > 3 else "")
    raise ValueError(
        f"data source {source.label}: {names} changed while the run went on (a new name, link or mode counts too), so "
        "its rows may not be those that the key stands for; leave it alone while a run reads it, and run again"
    )


def _states(files: list[Path]) -> list[tuple[int, ...]]:
    """What changes whenever a file does: device, inode, size, times of change in ns."""
    stats = [file.stat() for file in files]
    return [(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats]


def source_digest(source: DataSource, world: Path | None = None, endpoint: str | None = None) -> str:
    """What identifies the content: `sha256:<hex>` over names and bytes of the files, or the Hub commit.

    Errors: as `local_files` and `resolve_revision`.
    """
    if source.repository is not None:
        return resolve_revision(source, endpoint)
    digest = hashlib.sha256()
    found = local_files(source, world)
    for name in found.names:
        try:
            with (found.root / name).open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256")
        except OSError as error:
            raise ValueError(
                f"data source {source.label}: {shown(name)} cannot be read ({error.strerror or error})"
            ) from error
        # NUL cannot be part of a file name, so names and digests cannot run into each other.
        digest.update(f"{name}\0{content.hexdigest()}\n".encode("utf-8", "surrogateescape"))
    return f"sha256:{digest.hexdigest()}"


def resolve_revision(source: DataSource, endpoint: str | None = None) -> str:
    """The commit that the revision of a Hub source stands for; see `resolve_commit`."""
    assert source.repository is not None, source
    return resolve_commit("dataset", source.repository, source.revision, endpoint)


def _read_hub(source: DataSource) -> Iterator[Any]:
    # Resolved first: it fails at once without a network, where load_dataset retries for long, and it pins the rows.
    revision, repository = resolve_revision(source), source.repository
    assert repository is not None, source
    import datasets

    try:
        if source.subset == ALL_SUBSETS:
            subsets: list[str | None] = sorted(datasets.get_dataset_config_names(repository, revision=revision))
        else:
            subsets = [source.subset]
        tables = [_hub_table(repository, subset, source, revision) for subset in subsets]
    except Exception as error:
        split = source.split or "train"
        asked = f"Hub dataset {source.repository!r} (subset {source.subset!r}, split {split!r}, {revision[:12]})"
        text = f"{asked}: {type(error).__name__}: {str(error)[:300]}"
        if isinstance(error, ValueError) and _NO_SUCH_ROWS.search(str(error)):
            raise ValueError(f"{text}. Give a `subset` and a `split` that the dataset has") from error
        raise SourceUnavailable(
            f"{text}. Check the network, HF_TOKEN and that the repository holds data files"
        ) from error
    return (row for table in tables for row in islice(table, source.limit))


def _hub_table(repository: str, subset: str | None, source: DataSource, revision: str) -> Iterable[Any]:
    """Rows of one configuration. `datasets` guesses the types of JSON and CSV, so these are read as local files are.

    `split` may be what `datasets` takes: `train`, `train[:100]`, `train[10%:]+test`, `all`.
    """
    import datasets

    split = "train" if source.split is None else source.split
    builder = _builder(repository, subset, revision)
    urls = builder.config.data_files or {}
    if split == str(datasets.Split.ALL) and urls and split not in urls:
        split = "+".join(map(str, urls))
    names = parts_of(split, urls)
    texts = {name: _rows_of_text(builder, urls[name], source.on_bad_line) for name in names if name in urls}
    tables = {name: rows for name, rows in texts.items() if rows is not None}
    if len(tables) < len(names):
        rows: Iterable[Any] = datasets.load_dataset(repository, subset, split=split, revision=revision)
        return rows
    return tables[split] if split in tables else _parts(split, tables, repository)


def _rows_of_text(builder: DatasetBuilder, urls: Iterable[str], on_bad_line: OnBadLine) -> Iterable[Any] | None:
    """Rows of the JSON or CSV files of a split, as text. None where they are of another kind, which has types."""
    kind = type(builder).__module__.rpartition(".")[2]
    if kind == "json" and builder.config.field is None:
        files = _fetched(urls)
        if all(map(is_json_of_rows, files)):
            return (row for file in files for row in read_json_of_rows(file, on_bad_line))
    elif kind == "csv" and (delimiter := _only_delimiter(builder)) is not None:
        files = _fetched(urls)
        return (row for file in files for row in read_separated(file, delimiter, on_bad_line))
    return None


def _parts(split: str, tables: Mapping[str, Iterable[Any]], label: str) -> list[Any]:
    """The rows that `split` asks for, as `datasets` reads it. ValueError for one that it does not understand."""
    import datasets

    rows = {name: list(table) for name, table in tables.items()}
    try:
        read = datasets.ReadInstruction.from_spec(split)
        parts = read.to_absolute({name: len(table) for name, table in rows.items()})
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"data source {label}: split {split!r} is none (Bad split: {error}); write e.g. train, train[:1000], "
            "train[10%:20%] or train+test"
        ) from error
    return [row for part in parts for row in rows[part.splitname][part.from_ : part.to]]


def _builder(repository: str, subset: str | None, revision: str) -> DatasetBuilder:
    """What `datasets` knows of a configuration; without a network, of the files that were fetched before."""
    import datasets
    import huggingface_hub

    try:
        return datasets.load_dataset_builder(repository, subset, revision=revision)
    except ConnectionError as error:
        try:
            folder = huggingface_hub.snapshot_download(
                repository, repo_type="dataset", revision=revision, local_files_only=True
            )
        except huggingface_hub.errors.LocalEntryNotFoundError:
            raise error from None
        return datasets.load_dataset_builder(folder, subset)


def _fetched(urls: Iterable[str]) -> list[Path]:
    """Local copies of the files of a Hub data set, unpacked."""
    import datasets

    return [Path(file) for file in datasets.DownloadManager().download_and_extract(list(urls))]


def _only_delimiter(builder: DatasetBuilder) -> str | None:
    """The delimiter of a CSV configuration; None where it sets something else, as names of columns."""
    config = builder.config
    own = {"name", "version", "data_dir", "data_files", "description", "sep", "delimiter", "features"}
    usual = type(config)()
    if any(
        getattr(config, field.name) != getattr(usual, field.name) for field in fields(config) if field.name not in own
    ):
        return None
    return str(config.delimiter or config.sep)
