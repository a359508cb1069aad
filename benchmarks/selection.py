"""Scoring and selecting rows: what it costs, as ratios of times that are measured side by side.

    python benchmarks/selection.py [--parts cost sorted overlap memory choice] [--model FOLDER] [--threads 1]

cost     scoring (two losses of each row) against one plain forward of the same model over the same batches, with the
         lowest masked layer at 0, in the middle and at the top: layers below it are computed once
sorted   length-sorted batches against the order of arrival, on the length distribution of the SFT mix
overlap  a source scored while the next rows are tokenised, against one after the other
memory   peak memory over the length of rows, as many tokens in all
choice   100,000 rows selected from stored scores

Arms of a comparison take turns, and the median counts: of CPU seconds, but for overlap. Random weights and tokens;
--model: a real model instead, for cost. Prints Markdown and a line RESULTS.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.training_rows import MIX_MEAN, MIX_MEDIAN, SHAPES, Shape, conversation_rows, mixed_lengths
from smoltulu.recipes import CHAT_TEMPLATES
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.selection import (
    KeepSettings,
    SelectionConfig,
    SelectionInputs,
    SelectionScoresConfig,
    SelectionScoresInputs,
)
from smoltulu.tasks.data.rows import stored_rows
from smoltulu.tasks.data.rows_writer import RowsWriter
from smoltulu.tasks.selection import scoring
from smoltulu.tasks.selection.rendering import Rendered
from smoltulu.tasks.selection.scores_file import RowScore, ScoresWriter, row_digest
from smoltulu.tasks.selection.scores_stage import score_source
from smoltulu.tasks.selection.selection_stage import select
from smoltulu.tasks.stage import StageContext

#: Twelve layers, so that it shows which of them are computed twice.
DEEP = Shape("deep", 384, 1024, 12, 6, 2, 16_384)
LONGEST = 2048
GOALS = {"cost": 2.1, "sorted": 1.5, "choice_s": 2.0}


def random_selector(shape: Shape, packs: bool, max_tokens: int = 4096) -> scoring.Selector:
    """A model of random weights, in float32 on the CPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from smoltulu.tasks.trainer.packed_attention import pack

    torch.manual_seed(0)
    fields = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings",
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **{name: getattr(shape, name) for name in fields}))
    model.eval()
    if packs:
        pack(model)
    return scoring.Selector(model, max_tokens, packs, pad_id=1)


def rendered_rows(lengths: list[int], shape: Shape) -> list[Rendered]:
    """Rows of random tokens: 15 of 100 are a prompt, the others trained."""
    return [
        Rendered(
            row["row"], f"0:{row['row']}", "", row["input_ids"], [int(label >= 0) for label in row["labels"]], 0, 0.0
        )
        for row in conversation_rows(lengths, shape)
    ]


def side_by_side(
    arms: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Median seconds of each arm; they take turns, so that what else the machine does hits all.

    clock  of the CPU where one thread does all: what else runs then hardly counts
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(repeats + 1):
        for name, run in arms.items():
            started = clock()
            run()
            if number:  # the first round warms up
                seconds[name].append(clock() - started)
    return {name: median(times) for name, times in seconds.items()}


def measure_cost(model: str | None, repeats: int) -> dict[str, float]:
    """Seconds of a plain forward, and of scoring over it."""
    import torch

    if model is None:
        selector = random_selector(DEEP, packs=True)
        vocabulary = DEEP
    else:
        from smoltulu.tasks.models.folders import load_tokenizer

        tokenizer = load_tokenizer(Path(model), (CHAT_TEMPLATES / "tulu.jinja").read_text())
        selector = scoring.load_selector(Path(model), tokenizer, "float32", ComputeSettings(device="cpu"), "cpu")
        vocabulary = replace(DEEP, vocab_size=selector.model.config.vocab_size)
    rows = rendered_rows(mixed_lengths(10, MIX_MEAN, MIX_MEDIAN, LONGEST, seed=0), vocabulary)
    num_tokens = sum(len(row.ids) for row in rows)
    top = selector.model.config.num_hidden_layers - 1

    def forward() -> None:
        """The model as it is, logits of all tokens, nothing done with them."""
        with torch.no_grad():
            for batch in selector.batches(rows):
                selector.model(**batch.arguments, use_cache=False)

    def influence(layer: int, whole: bool) -> Callable[[], Any]:
        measure = scoring.influence([(layer, 0), (top, 1)], "uniform", whole)
        return lambda: scoring.score_rows(selector, rows, measure)

    arms = {
        "plain forward": forward,
        "perplexity": lambda: scoring.score_rows(selector, rows, scoring.perplexity(whole=True)),
        "influence, lowest layer 0": influence(0, whole=True),
        "influence, lowest layer 0, trained tokens": influence(0, whole=False),
        f"influence, lowest layer {top // 2 + 1}": influence(top // 2 + 1, whole=True),
        f"influence, lowest layer {top}": influence(top, whole=True),
    }
    seconds = side_by_side(arms, repeats)
    print(f"\n## cost ({num_tokens:,} tokens, {model or DEEP.name})\n")
    print("| | CPU s | tokens/s | of a plain forward |\n|---|---:|---:|---:|")
    for name, spent in seconds.items():
        print(f"| {name} | {spent:.2f} | {num_tokens / spent:,.0f} | {spent / seconds['plain forward']:.2f} |")
    return {name: spent / seconds["plain forward"] for name, spent in seconds.items()}


def measure_sorted(repeats: int) -> dict[str, float]:
    """Seconds of a plain loss of all tokens, by order and layout."""
    shape = SHAPES["small"]
    rows = rendered_rows(mixed_lengths(128, MIX_MEAN, MIX_MEDIAN, LONGEST, seed=1), shape)
    padded, packed = random_selector(shape, packs=False), random_selector(shape, packs=True)
    measure = scoring.perplexity(whole=True)

    def eight_at_a_time() -> None:
        for start in range(0, len(rows), 8):
            selector = replace(padded, is_sorted=False, max_tokens=1 << 30)
            scoring.score_rows(selector, rows[start : start + 8], measure)

    arms = {
        "as they arrive, 8 rows a batch": eight_at_a_time,
        "as they arrive, 4,096 places a batch": lambda: scoring.score_rows(
            replace(padded, is_sorted=False), rows, measure
        ),
        "sorted by length, padded": lambda: scoring.score_rows(padded, rows, measure),
        "sorted by length, packed": lambda: scoring.score_rows(packed, rows, measure),
    }
    seconds = side_by_side(arms, repeats)
    num_tokens, first = sum(len(row.ids) for row in rows), next(iter(seconds.values()))
    print(f"\n## sorted ({len(rows)} rows, {num_tokens:,} tokens, {shape.name})\n")
    print("| | tokens/s | of the first |\n|---|---:|---:|")
    for name, spent in seconds.items():
        print(f"| {name} | {num_tokens / spent:,.0f} | {first / spent:.2f} |")
    return {name: first / spent for name, spent in seconds.items()}


class _AtOnce(ThreadPoolExecutor):
    """Does what is submitted when it is submitted: nothing overlaps."""

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        future = super().submit(function, *args, **kwargs)
        future.result()
        return future


def measure_overlap(folder: Path, repeats: int) -> dict[str, float]:
    """Seconds of the stage with and without overlap, and of tokenising alone."""
    from tests.tiny_model import build_tiny_model

    model = build_tiny_model(folder / "model", hidden_size=64, num_hidden_layers=4, max_position_embeddings=2048)
    draw = random.Random(0)
    words = ["apples", "cat", "dog", "answer", "better", "which", "one", "three", "plus", "good"]
    with RowsWriter(folder / "rows.parquet", "sft") as writer:
        for number, length in enumerate(mixed_lengths(1024, 200, 160, 900, seed=2)):
            text = " ".join(draw.choices(words, k=length // 2))
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
            writer.write({"id": f"0:{number}", "messages": turns})

    def stage(scorer: str, pool: Any) -> Callable[[], None]:
        def run() -> None:
            with (
                tempfile.TemporaryDirectory(dir=folder) as made,
                mock.patch("smoltulu.tasks.selection.scores_stage.ThreadPoolExecutor", pool),
            ):
                context = _context(Path(made))
                config = SelectionScoresConfig(
                    kind="sft", scorer=scorer, over="whole", by="row", max_length=2048, mask=None
                )
                inputs = SelectionScoresInputs(
                    model=None if scorer == "counts" else str(model), tokenizer=str(model),
                    dataset=str(folder / "rows.parquet"), chat_template=(CHAT_TEMPLATES / "tulu.jinja").read_text(),
                )  # fmt: skip
                score_source(config, inputs, context)

        return run

    arms = {
        "tokenising alone": stage("counts", _AtOnce),
        "scored, then the next part tokenised": stage("perplexity", _AtOnce),
        "scored while the next part is tokenised": stage("perplexity", ThreadPoolExecutor),
    }
    seconds = side_by_side(arms, repeats, time.perf_counter)
    print("\n## overlap (1,024 rows)\n\n| | s |\n|---|---:|")
    for name, spent in seconds.items():
        print(f"| {name} | {spent:.2f} |")
    tokenising, apart, together = seconds.values()
    print(f"\nOf the time of tokenising, {(apart - together) / tokenising:.0%} is hidden.")
    return {"hidden_share": (apart - together) / tokenising, "speedup": apart / together}


def _context(folder: Path) -> StageContext:
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True)
    compute = ComputeSettings(device="cpu", num_threads=1)
    return StageContext(folder / "out", folder / "work", compute, lambda *args, **kwargs: None)


def peak_memory(length: int, layout: str) -> float:
    """MB that scoring rows of one length takes at most, above the model. Run in a process of its own."""
    shape = replace(SHAPES["small"], vocab_size=49_152)
    selector = random_selector(shape, packs=layout == "packed")
    measure = scoring.influence([(0, 0)], "uniform", whole=True)
    scoring.score_rows(selector, rendered_rows([64], shape), measure)  # what is loaded once is loaded
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scoring.score_rows(selector, rendered_rows([length] * (8192 // length), shape), measure)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def measure_memory() -> dict[str, dict[int, float]]:
    """Peak memory by layout and length of rows."""
    found: dict[str, dict[int, float]] = {}
    for layout in ("packed", "padded"):
        found[layout] = {}
        for length in (128, 512, 2048, 4096):
            command = [sys.executable, __file__, "--memory-of", str(length), "--layout", layout]
            found[layout][length] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    lengths = list(found["packed"])
    print("\n## memory (8,192 tokens in batches of 4,096; MB above the model)\n")
    print(f"| tokens a row | {' | '.join(f'{length:,}' for length in lengths)} |\n|---|{'---:|' * len(lengths)}")
    for layout, peaks in found.items():
        print(f"| {layout} | {' | '.join(f'{peaks[length]:.0f}' for length in lengths)} |")
    return found


def measure_choice(folder: Path, repeats: int) -> dict[str, float]:
    """Seconds of the stage `selection` over 100,000 rows of five sources, and of its choice alone."""
    num_rows, num_sources = 100_000, 5
    draw = random.Random(0)
    files = {str(source): folder / f"scores-{source}.parquet" for source in range(num_sources)}
    writers = [ScoresWriter(file, "attention_influence") for file in files.values()]
    with RowsWriter(folder / "rows.parquet", "sft") as rows:
        for number in range(num_rows):
            source, place = number % num_sources, number // num_sources
            turns = [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "yes " * 20}]
            row = {"id": f"{source}:{place}", "messages": turns}
            rows.write(row)
            tokens, score = draw.randint(20, 2000), draw.gauss(0.1, 0.1)
            writers[source].write(
                RowScore(place, f"0:{place}", row_digest(row), tokens, tokens // 2, 90, 0.1, 2.0, 2.0 + score, score)
            )
    for writer in writers:
        writer.__exit__(None)
    config = SelectionConfig(
        kind="sft", method="attention_influence", keep=KeepSettings(token_share=0.2), use="filter", min_weight=0.5,
        max_weight=1.5, by="row", min_tokens=1, max_tokens=None, seed=0,
    )  # fmt: skip
    inputs = SelectionInputs(
        dataset=str(folder / "rows.parquet"), scores={number: str(file) for number, file in files.items()}
    )

    def stage() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as made:
            select(config, inputs, _context(Path(made)))

    def chosen() -> None:
        """Scores read and checked, rows joined with them by content, the choice made."""
        import numpy as np

        from smoltulu.tasks.selection.choice import Ranked, choose
        from smoltulu.tasks.selection.joining import join

        scored = join(Path(inputs.dataset), inputs.scores, config.method, config.seed, config.labels)
        able = np.flatnonzero(scored.problems < 0)
        choose(config.keep, Ranked(*(column[able] for column in (
            scored.sources, scored.num_tokens, scored.scores, scored.ties))), config.labels)  # fmt: skip

    seconds = side_by_side(
        {
            "rows read": lambda: sum(1 for _ in stored_rows(folder / "rows.parquet")),
            "rows read, joined with scores, chosen": chosen,
            "the whole stage (kept rows, fates, page)": stage,
        },
        repeats,
    )
    print(f"\n## choice ({num_rows:,} rows of {num_sources} sources, a fifth of their tokens)\n\n| | s |\n|---|---:|")
    for name, spent in seconds.items():
        print(f"| {name} | {spent:.2f} |")
    return dict(zip(("read_s", "chosen_s", "stage_s"), seconds.values(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("cost", "sorted", "overlap", "memory", "choice")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--model", help="folder of a real model, for the part cost")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--layout", default="packed", help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    if options.memory_of:
        print(peak_memory(options.memory_of, options.layout))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        for part in options.parts:
            folder = Path(made) / part
            folder.mkdir()
            results[part] = {
                "cost": lambda: measure_cost(options.model, options.repeats),
                "sorted": lambda: measure_sorted(options.repeats),
                "overlap": lambda folder=folder: measure_overlap(folder, options.repeats),
                "memory": measure_memory,
                "choice": lambda folder=folder: measure_choice(folder, options.repeats),
            }[part]()
    print(f"\nRESULTS {json.dumps({'threads': options.threads, 'goals': GOALS, **results})}")


if __name__ == "__main__":
    main()
