"""The data files of a path: one file, the files of a split of a folder, or a data set that `datasets` saved.

Splits are those that `datasets` finds: what the folder's card (README.md, `configs`) says, else the words train,
validation and test in names of folders and files. Nothing is left out in silence: files of several splits without a
`split`, and files that nobody can read, are refused. A split that is named leaves the files of the others alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from smoltulu.schemas.common import plain_path, printable
from smoltulu.tasks.data.files import ALLOWED, suffix_of

#: `subset` that reads every configuration.
ALL_SUBSETS = "*"

#: Words that name a split, as in datasets.data_files.SPLIT_KEYWORDS; a test compares the two.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATOR = "[-._ 0-9]"
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
#: Files that lie beside data: notes, marks of a finished job, checksums, and descriptions by other tools.
_BESIDE = re.compile(
    r"(_.*|.*\.(md|crc|md5|sha1|sha256|sha512|cff)|(md5|sha\d+)sums?(\.txt)?|checksums?(\..*)?"
    r"|(readme|license|licence|notice|changelog|citation)(\..*)?)",
    re.IGNORECASE,
)
#: What beside data may be called as data is: descriptions by other tools, and marks.
_BESIDE_JSON = re.compile(
    r"_.*\.json|dataset_infos?\.json|dataset_dict\.json|state\.json|croissant\.json|checksums?\.json", re.IGNORECASE
)
#: Folders that Spark and Databricks keep beside data: unfinished files, and logs.
_BESIDE_FOLDERS = ("_temporary", "_spark_metadata", "_symlink_format_manifest")
#: Words of files that nobody means to train on, beside those of `datasets`.
_HELD_OUT = re.compile(r"(.*[-._ ])?(held[-_ ]?out|hold[-_ ]?out)([-._ ].*)?", re.IGNORECASE)
#: Parameters of a configuration in a card that change no row of the kinds that are read here.
_HARMLESS = {"data_files", "data_dir", "default", "description", "version", "drop_labels", "features"}
_MAX_DEPTH = 12


@dataclass(frozen=True)
class DataFiles:
    """Files in the order in which they are read, by their names relative to `root`, and the splits that they are of."""

    root: Path
    splits: Mapping[str, tuple[str, ...]]
    loose: tuple[str, ...] = ()  # of no split, where others are of one

    @property
    def paths(self) -> list[Path]:
        """All of them."""
        return [self.root / name for name in self.names]

    @property
    def names(self) -> list[str]:
        """Their names."""
        return sorted({name for names in self.splits.values() for name in names} | set(self.loose))


def data_files(path: Path, split: str | None, subset: str | None) -> DataFiles:
    """The files that a source reads: all those of a path, or those of the splits that `split` names.

    `split` may be what `datasets` takes: `train`, `train[:100]`, `train+test`, `all`.

    Raises:
        ValueError: nothing there to read, or not as it is asked for; the message does not name the source.
    """
    if path.is_file():
        if suffix_of(path) is None:
            raise ValueError(f"unsupported file {shown(path.name)}; allowed are {ALLOWED}")
        if subset is not None:
            raise ValueError(f"it is one file, which has no configurations; remove subset: {subset}")
        found = _split_of_name(path.name.lower()) or "train"
        return _chosen(DataFiles(path.parent, {found: (path.name,)}), split)
    saved = _saved_by_datasets(path)
    if saved is not None:
        if subset is not None:
            raise ValueError(f"it was written by save_to_disk, without configurations; remove subset: {subset}")
        return _chosen(saved, split)
    configurations = _card(path)
    if configurations:
        return _chosen(_of_card(path, configurations, subset), split)
    if subset not in (None, ALL_SUBSETS, "default"):
        raise ValueError(f"its folder has no card (README.md) with configurations, so there is no subset {subset!r}")
    names = _walk(path)
    for name in names:
        if suffix_of(Path(name)) is None:
            raise ValueError(
                f"unsupported file {shown(name)}; a folder holds {ALLOWED}, and notes, checksums or hidden files "
                "beside them. Name the wanted file, or give each folder as a source of its own"
            )
    if not names:
        raise ValueError(f"the folder is empty; expected {ALLOWED}")
    splits = _splits_of_folder(names)
    in_one = {name for members in splits.values() for name in members}
    return _chosen(DataFiles(path, splits, tuple(name for name in names if name not in in_one)), split)


def shown(name: str) -> str:
    """A file's name for a message, whatever characters it has."""
    return repr(printable(name[:200]))


def _chosen(found: DataFiles, split: str | None) -> DataFiles:
    """The files of the splits that are asked for. Without a split: all of them, where they are of one."""
    there = ", ".join(f"{name} ({len(files)} file{'s'[: len(files) > 1]})" for name, files in found.splits.items())
    loose = f", and {len(found.loose)} of no split, e.g. {shown(found.loose[0])}" if found.loose else ""
    if split is None:
        if len(found.splits) > 1 or (found.loose and "train" not in found.splits):
            raise ValueError(
                f"it holds files of several splits: {there}{loose}; say which with `split`, e.g. split: "
                f"{next(iter(found.splits))}, or name the wanted files"
            )
        return found
    if split == "all" and "all" not in found.splits:
        return found
    wanted = parts_of(split, found.splits)
    missing = [name for name in wanted if name not in found.splits]
    if missing:
        raise ValueError(f"there is no split {missing[0]!r}; there is: {there}{loose}")
    return DataFiles(found.root, {name: found.splits[name] for name in wanted})


def parts_of(split: str, splits: Mapping[str, Any]) -> list[str]:
    """Names of the splits in what `datasets` takes as one, each once."""
    if split in splits:
        return [split]
    return list(dict.fromkeys(re.split(r"[\[(]", part)[0].strip() for part in split.split("+")))


def _walk(root: Path) -> list[str]:
    """Names of the files below a folder that may be data, in the order of `datasets`: as text, `/` included."""
    found: list[str] = []

    def look(folder: Path, prefix: str, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError(f"folders in folders, more than {_MAX_DEPTH} deep; name the one with the files")
        if _is_saved(folder):  # `datasets` keeps results of its own beside the rows
            found.extend(_saved_files(root, prefix.rstrip("/")))
            return
        for entry in os.scandir(folder):
            if entry.name.startswith((".", "__")):
                continue
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                if entry.name in ("_delta_log", "metadata") and _is_table_format(folder, entry.name):
                    raise ValueError(
                        f"a table of Delta Lake or Iceberg ({shown(name)}): its log says which files count; export its "
                        "rows as Parquet"
                    )
                if entry.name not in _BESIDE_FOLDERS:
                    look(Path(entry.path), f"{name}/", depth + 1)
            elif entry.is_dir():
                raise ValueError(
                    f"{shown(name)} is a link to another folder ({shown(os.path.realpath(entry.path))}); give that as "
                    "a source of its own"
                )
            elif entry.is_file():
                is_data = suffix_of(Path(entry.name)) is not None
                if not (_BESIDE_JSON if is_data else _BESIDE).fullmatch(entry.name):
                    found.append(name)
            elif entry.is_symlink():
                raise ValueError(f"{shown(name)} is a link to a file that does not exist")
            else:
                raise ValueError(f"{shown(name)} is neither a file nor a folder (a socket, a pipe or a device)")

    try:
        look(root, "", 0)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error}: {shown(str(error.filename))})") from error
    return sorted(found)


def _is_table_format(folder: Path, name: str) -> bool:
    return name == "_delta_log" or any((folder / name).glob("*.metadata.json"))


def _splits_of_folder(names: list[str]) -> dict[str, tuple[str, ...]]:
    """As `splits_of`, in large letters too; and files that are called held-out are of a split `held_out`."""
    lowered = {name.lower(): name for name in names}
    if len(lowered) < len(names):
        lowered = {name: name for name in names}
    splits = {split: tuple(lowered[name] for name in files) for split, files in splits_of(sorted(lowered)).items()}
    in_another = {name for split, files in splits.items() if split != "train" for name in files}
    held = tuple(n for n in names if n not in in_another and any(map(_HELD_OUT.fullmatch, PurePosixPath(n).parts)))
    if held:
        splits["train"] = tuple(name for name in splits.get("train", ()) if name not in held)
        splits["held_out"] = held
    return {split: tuple(sorted(files)) for split, files in splits.items() if files}


def splits_of(names: list[str]) -> dict[str, tuple[str, ...]]:
    """Split -> its files, as `datasets` finds them by their names; files that it would leave out are in none.

    In `data/` a shard's name begins with its split: `data/train_sft-00000-of-00003.parquet`. Elsewhere too, where that
    is how every file is called.
    """
    shards = {name: match["split"] for name in names if (match := _SHARD.fullmatch(PurePosixPath(name).name))}
    in_data = {name: split for name, split in shards.items() if PurePosixPath(name).parent.as_posix() == "data"}
    if not in_data and len(shards) == len(names) and any(map(_split_of_name, names)):
        in_data = shards
    if in_data:
        return {
            split: tuple(name for name in in_data if in_data[name] == split)
            for split in sorted(set(in_data.values()), key=lambda split: (split not in _WORDS, _rank(split), split))
        }
    for part_of in (lambda name: PurePosixPath(name).parts[:-1], lambda name: PurePosixPath(name).parts[-1:]):
        is_file = part_of("a/b") == ("b",)
        found = {
            split: tuple(name for name in names if any(_names_split(part, split, is_file) for part in part_of(name)))
            for split in _WORDS
        }
        if any(found.values()):
            return {split: files for split, files in found.items() if files}
    return {"train": tuple(names)}


def _rank(split: str) -> int:
    return list(_WORDS).index(split) if split in _WORDS else 0


def _names_split(part: str, split: str, is_file: bool) -> bool:
    words = "|".join(_WORDS[split])
    end = f"{_SEPARATOR}.*" if is_file else f"(?:{_SEPARATOR}.*)?"
    return re.fullmatch(f"(?:.*{_SEPARATOR})?(?:{words}){end}", part, re.DOTALL) is not None


def _split_of_name(name: str) -> str | None:
    """The split that a file's own name says."""
    return next((split for split in _WORDS if _names_split(PurePosixPath(name).name, split, is_file=True)), None)


# A folder that `datasets` saved


def _saved_by_datasets(folder: Path) -> DataFiles | None:
    """What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote; None for any other folder."""
    if (folder / "dataset_dict.json").is_file():
        names = _json(folder / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError("its dataset_dict.json names no splits; save the data set again")
        return DataFiles(folder, {name: _saved_files(folder, _inside(name)) for name in names})
    if _is_saved(folder):
        return DataFiles(folder, {_json(folder / "state.json").get("_split") or "train": _saved_files(folder, "")})
    return None


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _saved_files(folder: Path, split: str) -> tuple[str, ...]:
    state = _json(folder / split / "state.json")
    files = state.get("_data_files")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ValueError("an old version of datasets saved it with an index of rows; save the data set again")
    try:
        names = [_inside(one["filename"]) for one in files or ()]
        if not names:
            raise KeyError("_data_files")
    except (TypeError, KeyError) as error:
        raise ValueError(f"state.json in {shown(split or '.')} names no files; save the data set again") from error
    names = [f"{split}/{name}" if split else name for name in names]
    for name in names:
        if not (folder / name).is_file() or suffix_of(Path(name)) != ".arrow":
            raise ValueError(f"its state.json names {shown(name)}, which is no Arrow file there; copy the whole folder")
    return tuple(names)


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{shown(file.name)} cannot be read ({str(error)[:120]}); copy the whole folder") from error
    if not isinstance(found, dict):
        raise ValueError(f"{shown(file.name)} holds no object; save the data set again")
    return found


def _inside(name: Any) -> str:
    """A path that stays in the folder. ValueError for any other."""
    try:
        return plain_path(str(name))
    except ValueError as error:
        raise ValueError(f"its description names {shown(str(name))}, which is outside of the folder") from error


# A folder with a card


def _card(folder: Path) -> dict[str, dict[str, Any]]:
    """Configuration -> its parameters, of the YAML block of README.md; empty where the card has none."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    try:
        text = card.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise ValueError(f"README.md cannot be read ({error.strerror or error})") from error
    if not re.match(r"---\s*\n(?:.*\n)*?configs\s*:", text):
        return {}
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        return dict(MetadataConfigs.from_dataset_card_data(DatasetCard(text, ignore_metadata_errors=False).data))
    except Exception as error:  # of YAML, of huggingface_hub and of datasets
        raise ValueError(
            f"the configurations in its README.md cannot be read ({type(error).__name__}: {str(error).strip()[:300]})"
        ) from error


def _of_card(folder: Path, configurations: dict[str, dict[str, Any]], subset: str | None) -> DataFiles:
    names = ", ".join(configurations)
    if subset == ALL_SUBSETS:
        wanted = sorted(configurations)
    elif subset is not None:
        if subset not in configurations:
            raise ValueError(f"its card has no configuration {subset!r}; subset may be {names}, or * for all of them")
        wanted = [subset]
    else:
        wanted = [name for name, given in configurations.items() if given.get("default") or name == "default"]
        wanted = wanted or list(configurations)
        if len(wanted) > 1:
            raise ValueError(f"its card has several configurations; say which with `subset`: {names}, or * for all")
    splits: dict[str, list[str]] = {}
    for name in wanted:
        for split, files in _configured(folder, name, configurations[name]).items():
            splits.setdefault(split, []).extend(file for file in files if file not in splits.get(split, ()))
    return DataFiles(folder, {split: tuple(files) for split, files in splits.items()})


def _configured(folder: Path, name: str, given: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    from datasets.data_files import resolve_pattern, sanitize_patterns

    if unknown := sorted(set(given) - _HARMLESS):
        raise ValueError(
            f"configuration {name!r} of its card sets {', '.join(unknown)}, which is not read here; write the rows as "
            "JSON lines or Parquet"
        )
    inner = _inside(str(given["data_dir"]).rstrip("/")) if given.get("data_dir") not in (None, "", ".") else ""
    root = folder / inner
    if not root.is_dir():
        raise ValueError(f"configuration {name!r} of its card names the folder {shown(inner)}, which does not exist")
    there = _walk(root)  # refuses links that lead elsewhere, which `resolve_pattern` would follow
    if "data_files" not in given:
        splits = splits_of(there)
    else:
        splits = {}
        for split, patterns in sanitize_patterns(given["data_files"]).items():
            files: list[str] = []
            for pattern in patterns:
                _inside(re.sub(r"[*?\[\]]", "x", pattern))
                try:
                    matched = resolve_pattern(pattern, str(root))
                except FileNotFoundError as error:
                    raise ValueError(
                        f"configuration {name!r} of its card names {shown(pattern)}, and no file is called so; fetch "
                        "all files of the data set"
                    ) from error
                files += [Path(file).relative_to(root.resolve() if not str(file).startswith(str(root)) else root)
                          .as_posix() for file in matched]  # fmt: skip
            splits[split] = tuple(dict.fromkeys(files))
    for file in (file for files in splits.values() for file in files):
        if suffix_of(Path(file)) is None:
            raise ValueError(f"unsupported file {shown(file)} in configuration {name!r}; allowed are {ALLOWED}")
    return {split: tuple(f"{inner}/{file}" if inner else file for file in files) for split, files in splits.items()}
