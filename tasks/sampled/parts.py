"""Work in parts of prompts: a killed stage goes on after its last whole part, and the file is the same, bit for bit.

Which prompts a part has depends on the prompts alone: not on batch size, number of processes or interruptions. Of N
processes each makes every N-th part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts.checkpoints import fault, mark_complete
from smoltulu.artifacts.files import made_from_folder, remove_tree
from smoltulu.tasks.models.processes import processes_of
from smoltulu.tasks.stage import StageContext

if TYPE_CHECKING:
    import pyarrow as pa

#: Prompts of a part: what a kill may cost. Not the batch size, which may differ after a resume.
PART_PROMPTS = 128
_FILE = "part.parquet"

Lines = list[dict[str, Any]]


def lines_in_parts(
    context: StageContext, made_from: str, order: Sequence[int], schema: pa.Schema, make: Callable[[int], Lines]
) -> Iterator[Lines]:
    """Make the parts that are missing, then give the lines of all parts, ascending.

    made_from  what they are made from: parts of anything else are removed
    order      the numbers 0, 1, ... of the parts, as they are to be made
    make       number of a part -> its lines
    """
    import pyarrow as pa
    from pyarrow import parquet

    processes = processes_of(context)
    with processes.main_process_first():
        folder = made_from_folder(context.work / "parts", made_from)
    for number in order[processes.process_index :: processes.num_processes]:
        place = folder / f"{number:06d}"
        if fault(place, full=True) is not None:
            table = pa.Table.from_pylist(make(number), schema)
            remove_tree(place)
            place.mkdir()
            parquet.write_table(table, place / _FILE, compression="zstd")
            mark_complete(place)
    processes.wait_for_everyone()
    for number in sorted(order):
        yield parquet.read_table(folder / f"{number:06d}" / _FILE, schema=schema).to_pylist()


def write_lines(
    context: StageContext, name: str, schema: pa.Schema, parts: Iterator[Lines], see: Callable[[Lines], None]
) -> None:
    """One file of all parts, a row group each; `see` is called with the lines of each. Holds one part.

    Every process sees all lines; the main process writes them.
    """
    import pyarrow as pa
    from pyarrow import parquet

    if not processes_of(context).is_main_process:
        for lines in parts:
            see(lines)
        return
    with parquet.ParquetWriter(context.folder / name, schema, compression="zstd") as writer:
        for lines in parts:
            see(lines)
            writer.write_table(pa.Table.from_pylist(lines, schema))
