"""The preflight in parts: one or several processes tokenise, cut and count some rows of the file at a time.

A part is a folder of `work`, valid only with its completion marker, so a killed preflight resumes after its finished
parts. The division into parts depends on the number of rows alone, never on the number of processes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts.checkpoints import fault, mark_complete
from smoltulu.artifacts.files import made_from_folder, remove_tree
from smoltulu.artifacts.keys import canonical_json, file_digest, text_digest
from smoltulu.schemas.common import scientific
from smoltulu.schemas.preflight import PreflightConfig, PreflightInputs
from smoltulu.tasks.data.rows import WRITE_OPTIONS, is_rich_file, num_rows, open_rows, rows_schema, stored_rows
from smoltulu.tasks.data.rows_writer import rows_table
from smoltulu.tasks.limits import num_cores
from smoltulu.tasks.models.tokens import Conversation, Pair
from smoltulu.tasks.preflight.counts import Counts, load_counts, save_counts
from smoltulu.tasks.preflight.rows import Tokenised, TokenizerProbe, tokenised
from smoltulu.tasks.process import die_with_parent

if TYPE_CHECKING:
    from pyarrow import parquet
    from transformers import PreTrainedTokenizerBase

#: Rows of a part: what a kill may cost, and what one process gets at a time. A multiple of _BATCH_ROWS, or the last
#: row group of every part would be smaller.
PART_ROWS = 2048
#: Of 235 MB each. More would wait: joining the parts takes a twenty-fifth of the time of making them.
_MAX_PROCESSES = 24
#: Rows that are tokenised at once, and a row group of the file.
_BATCH_ROWS = 512
ROWS_FILE = "rows.parquet"
COLUMNS = {
    "conversations": ("input_ids", "labels"),
    "pairs": ("prompt_ids", "prompt_mask", "chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask"),
}
#: Files of a model folder that say nothing about its tokenizer.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
#: Packages that decide about tokens, too.
_PACKAGES = ("transformers", "tokenizers", "jinja2")
#: Raise it when the files of a part, or what they count, change.
_FORMAT = 2


@dataclass(frozen=True)
class Part:
    """Consecutive rows of the rows file."""

    number: int
    first_row: int
    num_rows: int


@dataclass(frozen=True)
class Maker:
    """Makes parts. Every process gets a copy, so it holds no rows."""

    config: PreflightConfig
    tokenizer: PreTrainedTokenizerBase
    probe: TokenizerProbe
    dataset: Path
    folder: Path

    def folder_of(self, part: Part) -> Path:
        return self.folder / f"{part.number:06d}"

    def has(self, part: Part) -> bool:
        """Whether a part is finished, every byte as it was written."""
        folder = self.folder_of(part)
        return fault(folder, full=True) is None and load_counts(folder).num_source_rows == part.num_rows

    @property
    def is_rich(self) -> bool:
        """Whether the rows have more than role and content."""
        with open_rows(self.dataset) as opened:
            return is_rich_file(opened)

    def make(self, part: Part) -> None:
        folder = self.folder_of(part)
        remove_tree(folder)
        folder.mkdir()
        counts = Counts()
        with output_writer(self.config.kind, folder / ROWS_FILE, self.is_rich) as writer:
            _write_rows(self.config, self._fitted(part, counts), writer, self.is_rich)
        save_counts(counts, folder)
        mark_complete(folder)

    def _fitted(self, part: Part, counts: Counts) -> Iterator[list[tuple[Tokenised, Conversation | Pair]]]:
        """The rows that are left, batch by batch."""
        rows = enumerate(stored_rows(self.dataset, part.first_row, part.num_rows), part.first_row)
        while batch := list(islice(rows, _BATCH_ROWS)):
            made = [
                (row, counts.fit(self.config, self.probe, row))
                for row in tokenised(self.config, self.tokenizer, batch, counts.note_malformed)
            ]
            yield [(row, fitted) for row, fitted in made if fitted is not None]


def cut(dataset: Path) -> list[Part]:
    """The parts of a rows file, in order."""
    total = num_rows(dataset)
    firsts = range(0, total, PART_ROWS)
    return [Part(number, first, min(PART_ROWS, total - first)) for number, first in enumerate(firsts)]


def parts_folder(config: PreflightConfig, inputs: PreflightInputs, work: Path) -> Path:
    """The folder of the parts. Parts of other rows or of another tokenizer, template or config are removed."""
    folder = work / "parts"
    model = Path(inputs.model)
    files = sorted(file for file in model.iterdir() if file.is_file() and not file.name.endswith(_WEIGHTS))
    made_from = canonical_json(
        {
            "rows": file_digest(Path(inputs.dataset)),
            "tokenizer": {file.name: file_digest(file) for file in files},
            "template": text_digest(inputs.chat_template),
            "config": scientific(config),
            "packages": {name: metadata.version(name) for name in _PACKAGES},
            "part_rows": PART_ROWS,
            "format": _FORMAT,
        }
    )
    return made_from_folder(folder, made_from)


def make_parts(maker: Maker, parts: list[Part], num_threads: int | None, take: Callable[[Part], None]) -> None:
    """Make the missing parts. `take` gets every part in order, as soon as it and those before it are finished.

    num_threads   most processes at a time; None: one for every core
    """
    missing = [part for part in parts if not maker.has(part)]
    num_processes = min(num_threads or num_cores(), len(missing), _MAX_PROCESSES)
    if num_processes > 1:
        _make_in_processes(maker, parts, missing, num_processes, take)
        return
    wanted = {part.number for part in missing}
    with _tokenizer_threads(num_threads):
        for part in parts:
            if part.number in wanted:
                maker.make(part)
            take(part)


def _make_in_processes(
    maker: Maker, parts: list[Part], missing: list[Part], num_processes: int, take: Callable[[Part], None]
) -> None:
    # Spawned: forking a process with threads can hang. The environment must be set before the processes start.
    with _tokenizer_threads(1):
        pool = ProcessPoolExecutor(
            num_processes, multiprocessing.get_context("spawn"), initializer=_start, initargs=(maker, os.getpid())
        )
        try:
            making = {part.number: pool.submit(_make, part) for part in missing}
            for part in parts:
                if part.number in making:
                    making[part.number].result()
                take(part)
        except BrokenProcessPool:
            raise RuntimeError(
                "a process that tokenises ended before its part was finished (often: out of memory). "
                "Finished parts are kept; with compute.stages.preflight.num_threads 1 there is one process"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_maker: Maker | None = None


def _start(maker: Maker, parent_pid: int) -> None:
    global _maker
    die_with_parent(parent_pid)
    _maker = maker


def _make(part: Part) -> None:
    assert _maker is not None
    _maker.make(part)


@contextmanager
def _tokenizer_threads(num_threads: int | None) -> Iterator[None]:
    """Let the tokenizer use all cores, or `num_threads`: a stage's process starts with them off."""
    names = {"TOKENIZERS_PARALLELISM": "false" if num_threads == 1 else "true"}
    if num_threads is not None:
        names["RAYON_NUM_THREADS"] = str(num_threads)
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def output_writer(kind: str, file: Path, is_rich: bool) -> parquet.ParquetWriter:
    """A writer of tokenised rows, or of prompts. Labels are token ids or -100, masks 0 or 1."""
    import pyarrow as pa
    from pyarrow import parquet

    if kind == "prompts":
        return parquet.ParquetWriter(file, rows_schema("rlvr", is_rich), **WRITE_OPTIONS)
    types = {name: pa.list_(pa.int8() if name.endswith("_mask") else pa.int32()) for name in COLUMNS[kind]}
    return parquet.ParquetWriter(file, pa.schema({"row": pa.int64(), **types}), compression="zstd")


def _write_rows(
    config: PreflightConfig,
    batches: Iterator[list[tuple[Tokenised, Conversation | Pair]]],
    writer: parquet.ParquetWriter,
    is_rich: bool,
) -> None:
    import pyarrow as pa

    for batch in batches:
        if config.kind == "prompts":
            writer.write_table(rows_table([row.source for row, _ in batch], "rlvr", is_rich))
            continue
        columns: dict[str, list[Any]] = {"row": [row.number for row, _ in batch]}
        for name in COLUMNS[config.kind]:
            columns[name] = [getattr(fitted, name) for _, fitted in batch]
        writer.write_table(pa.table(columns, writer.schema))
