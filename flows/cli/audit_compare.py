"""`smoltulu audit --compare A B`: what two data sets share, or one with itself. Its imports wait until it is called."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts import readable
from smoltulu.flows.cli.output import progress_log, table

if TYPE_CHECKING:
    from rich.console import Console

    from smoltulu.flows.graphs.compare_graph import CompareGraph
    from smoltulu.schemas.artifact import ArtifactReference
    from smoltulu.schemas.audit import AuditSettings
    from smoltulu.schemas.near_duplicates import NearDuplicateRules

_EXACT_EXAMPLES, _EXAMPLES = 2, 5
_STYLE = "bold black on yellow"


def run_compare(
    data: Sequence[str], settings: AuditSettings, rules: NearDuplicateRules, out: Console
) -> dict[str, Any]:
    """Compare two data sets, print what they share, and return it as plain values. ValueError for the user's faults."""
    from smoltulu.flows.graphs.audit_graph import given_path
    from smoltulu.flows.graphs.compare_graph import CompareGraph
    from smoltulu.flows.local import run_recorded
    from smoltulu.flows.machine.places import PROJECT
    from smoltulu.tasks.engine.stores import open_store

    data = [given_path(text) for text in data]
    os.chdir(PROJECT)  # a relative store starts there
    graph = CompareGraph(data, settings, rules)
    store = open_store(settings.compute)
    for audited in graph.data:
        out.print(f"{audited.source.label}: read as {audited.detected.said}")
    made = run_recorded(graph, store, progress_log())
    result = compared(graph, made, rules)
    show(result, rules, out)
    return result


def compared(graph: CompareGraph, made: dict[str, ArtifactReference], rules: NearDuplicateRules) -> dict[str, Any]:
    """Counts for each set, and examples of pairs, those that are least alike last."""
    sets = []
    for audited, outputs, folder in graph.results(made):
        exact = sum(pair["exact"] for pair in _first_pairs(Path(folder) / outputs.pairs_file))
        sets.append(
            {
                "label": audited.source.label,
                "num_rows": outputs.num_rows_read,
                "num_exact": exact,
                "num_near": outputs.num_near_duplicates - exact,
                "num_without_text": outputs.num_without_text,
                "num_unfinished": outputs.num_unfinished,
                "num_paraphrases": outputs.num_paraphrases,
                "num_paraphrases_same_numbers": outputs.num_paraphrases_same_numbers,
                "folder": folder,
            }
        )
    return {"sets": sets, "examples": _examples(graph, made, rules)}


def _first_pairs(file: Path) -> list[dict[str, Any]]:
    """A pair of each row: the one that is most alike, in the order of rows."""
    from pyarrow import parquet

    best: dict[int, dict[str, Any]] = {}
    for pair in parquet.read_table(file).to_pylist():
        known = best.get(pair["row"])
        if known is None or (pair["exact"], pair["jaccard"]) > (known["exact"], known["jaccard"]):
            best[pair["row"]] = pair
    return list(best.values())


def _examples(
    graph: CompareGraph, made: dict[str, ArtifactReference], rules: NearDuplicateRules
) -> list[dict[str, Any]]:
    """Pairs of a row of A and one of B, or one of A before it: some with the same words, then the least alike ones."""
    from smoltulu.tasks.data.rows import rows_at
    from smoltulu.tasks.near_duplicates.shingles import compared_text

    _, outputs, folder = graph.results(made)[0]
    pairs = _first_pairs(Path(folder) / outputs.pairs_file)
    exact = [pair for pair in pairs if pair["exact"]][:_EXACT_EXAMPLES]
    near = sorted((pair for pair in pairs if not pair["exact"]), key=lambda pair: (-pair["jaccard"], pair["row"]))
    shown = [*exact, *near[-_EXAMPLES:]]
    files = []
    for audited in graph.data:
        reference = made[f"dataset-{audited.name}"]
        files.append(Path(reference.path) / reference.outputs["file"])
    texts = [
        {
            number: compared_text(row, rules.text)
            for number, row in rows_at(file, [pair[name] for pair in shown]).items()
        }
        for file, name in ((files[0], "row"), (files[-1], "other_row"))
    ]
    return [
        {
            "a_id": pair["row_id"],
            "b_id": pair["other_id"],
            "jaccard": pair["jaccard"],
            "exact": pair["exact"],
            "a": texts[0][pair["row"]],
            "b": texts[1][pair["other_row"]],
        }
        for pair in shown
    ]


def show(result: dict[str, Any], rules: NearDuplicateRules, out: Console) -> None:
    """Print the counts and the examples."""
    figures = ("rows", "same words", "of its rows", "nearly the same", "of its rows")
    alone = len(result["sets"]) == 1
    title = "Rows that are like one before them" if alone else "What the two sets share"
    made = table("set", *figures, title=title, right=figures, whole=figures)
    for name, one in zip("AB", result["sets"], strict=False):
        counts = []
        for count in (one["num_exact"], one["num_near"]):
            counts += [f"{count:,}", readable.percent(count / one["num_rows"])]
        made.add_row(f"{name}  {one['label']}", f"{one['num_rows']:,}", *counts)
    out.print(made)
    what = "user turns" if rules.text == "user" else "all turns"
    out.print(
        f"rule       Jaccard similarity of runs of {rules.shingle_size} {rules.shingle} of the {what}, from "
        f"{rules.threshold:g} on; case and punctuation make no difference"
    )
    if not alone:
        out.print("note       a row of one set is counted once, however many rows of the other it is alike to")
    for name, one in zip("AB", result["sets"], strict=False):
        if one["num_paraphrases"] is not None:
            same = f"{one['num_paraphrases_same_numbers']:,} of them with the same numbers"
            said = f"{one['num_paraphrases']:,} more of {name} may say the same in other words, {same}"
            out.print(f"rows       {said}; read them in paraphrases.parquet")
        if one["num_without_text"]:
            out.print(f"rows       {one['num_without_text']:,} of {name} have no word and were compared with nothing")
        if one["num_unfinished"]:
            out.print(
                f"rows       {one['num_unfinished']:,} of {name} have more candidates than were compared",
                style="yellow",
            )
    for example in result["examples"]:
        _show_example(example, out)
    for name, one in zip("AB", result["sets"], strict=False):
        out.print(f"pairs {name:<5}{Path(one['folder']).resolve() / 'pairs.parquet'}", soft_wrap=True)


def _show_example(example: dict[str, Any], out: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from smoltulu.tasks.near_duplicates.page import marked

    like = "the same words" if example["exact"] else f"Jaccard {example['jaccard']:.3f}"
    made = Table(title=like, title_justify="left", expand=True)
    cells = []
    for name, pieces in zip("ab", marked(example["a"], example["b"], num_words=80), strict=True):
        made.add_column(f"{name.upper()}  {example[f'{name}_id']}", ratio=1, overflow="fold")
        cells.append(Text().join(Text(text, _STYLE if differs else "") for text, differs in pieces))
    made.add_row(*cells)
    out.print(made)
