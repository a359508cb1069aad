"""AttentionInfluence on a real model and real rows: do planted lookups rank on top of their domain, and what else does?

The part `scores` of benchmarks/real_selection.py. Rows are those of six files of SMOLTULU_REAL_DATA, each a domain.
Among the rows of each domain three of each kind are planted, made in code: lookups in a JSON object, with answers shown
before as the probes have them; bare lookups, whose answer is a value alone, which a small model mostly does not know to
copy; a question that repeats itself; an answer that repeats itself. Prints figures, and no text of a row.
"""

from __future__ import annotations

import gzip
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from benchmarks.training_tools import table
from smoltulu.recipes import CHAT_TEMPLATES
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.selection import SelectionScoresConfig, SelectionScoresInputs
from smoltulu.tasks.data.rows_writer import RowsWriter
from smoltulu.tasks.models.folders import load_tokenizer
from smoltulu.tasks.models.tokens import conversations
from smoltulu.tasks.selection.figures import spearman
from smoltulu.tasks.selection.scores_file import RowScore, stored_scores
from smoltulu.tasks.selection.scores_stage import score_source
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.world.lookups import INSTRUCTION, WORD_LISTS, as_line, as_object, draw_pairs

#: Files, and the fields of question and answer.
SOURCES = {
    "gsm8k_train.jsonl.gz": (("question",), "answer"),
    "math_cot.json.gz": (("instruction", "input"), "output"),
    "oasst_octopack.jsonl.gz": (("prompt",), "completion"),
    "gpteacher_codegen.json.gz": (("instruction", "input"), "response"),
    "dolly_hhrlhf_small.jsonl.gz": (("prompt",), "response"),
    "t0_p3.jsonl.gz": (("prompt",), "completion"),
}
KINDS = ("lookup", "bare lookup", "repeated question", "repeated answer")
NUM_PLANTED = 3
#: Rank correlation of the score of real rows with these.
CORRELATED = {"ρ tokens": "num_tokens", "ρ loss": "loss", "ρ repetition": "repetition"}
FIGURES = ("median", *CORRELATED)
TEMPLATE = (CHAT_TEMPLATES / "tulu.jinja").read_text()

Pair = tuple[str, str]


def real_pairs(file: Path, asked: Sequence[str], answer: str) -> list[Pair]:
    """Question and answer of every row of a file."""
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        rows = json.load(stream) if ".json." in file.name else [json.loads(line) for line in stream]
    made = [("\n".join(row[name] for name in asked if row.get(name)).strip(), row[answer].strip()) for row in rows]
    return [(question, said) for question, said in made if question and said]


def planted_pairs(kind: str, draw: random.Random) -> Iterator[Pair]:
    """Rows of a kind."""
    while True:
        words = [draw.choice(draw.choice(WORD_LISTS)) for _ in range(24)]
        if kind.endswith("lookup"):
            pairs = draw_pairs(draw, 6, key_length=8)
            *shown, asked = draw.sample(pairs, 4)
            given = f"{INSTRUCTION}\n{as_object(pairs)}\n"
            if kind == "lookup":
                yield given + "\n".join(map(as_line, shown)) + f"\nKey: {asked.key}", as_line(asked)
            else:
                yield given + f'Question: what is the value of "{asked.key}"?', asked.value
        elif kind == "repeated question":
            yield "\n".join([" ".join(words[:12])] * 12), " ".join(words[12:])
        else:
            yield " ".join(words[:12]), "\n".join([" ".join(words[12:])] * 12)


def write_rows(data: Path, model: Path, file: Path, num_rows: int, max_tokens: int) -> dict[str, str]:
    """Rows of all domains, shuffled within each. Id of each row -> `real` or the kind that was planted."""
    tokenizer = load_tokenizer(model, TEMPLATE)
    draw, kinds = random.Random(0), {}
    with RowsWriter(file, "sft") as writer:
        for source, (name, (asked, answer)) in enumerate(SOURCES.items()):
            found = real_pairs(data / name, asked, answer)
            draw.shuffle(found)
            rows: list[tuple[str, list[dict[str, str]]]] = []
            wanted = num_rows // len(SOURCES) + (source < num_rows % len(SOURCES))
            for pair in found:
                turns = _turns(pair)
                if conversations(tokenizer, [turns])[0].length <= max_tokens:
                    rows.append(("real", turns))
                if len(rows) == wanted:
                    break
            for kind in KINDS:
                made = planted_pairs(kind, draw)
                rows += [(kind, _turns(next(made))) for _ in range(NUM_PLANTED)]
            draw.shuffle(rows)
            for number, (kind, turns) in enumerate(rows):
                kinds[f"{source}:{number}"] = kind
                writer.write({"id": f"{source}:{number}", "messages": turns})
    return kinds


def _turns(pair: Pair) -> list[dict[str, str]]:
    return [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]


def placed(lines: Sequence[RowScore], kinds: dict[str, str]) -> list[dict[str, Any]]:
    """Of each domain: rows, and for each planted kind the ranks of its rows (1: highest score) and the share of real
    rows of about its length (within a fifth) that it beats."""
    table = []
    for source, name in enumerate(SOURCES):
        own = sorted((line for line in lines if line.id.startswith(f"{source}:") and line.score is not None),
                     key=lambda line: -(line.score or 0))  # fmt: skip
        rank = {line.id: place for place, line in enumerate(own, 1)}
        found: dict[str, Any] = {"domain": name.partition(".")[0], "num_rows": len(own)}
        for kind in KINDS:
            mine = [line for line in own if kinds[line.id] == kind]
            near = [
                [other for other in own if kinds[other.id] == "real"
                 and abs(other.num_tokens - line.num_tokens) <= line.num_tokens / 5]
                for line in mine
            ]  # fmt: skip
            beaten = [sum(other.score < line.score for other in others) / len(others)
                      for line, others in zip(mine, near, strict=True) if others]  # fmt: skip
            found[kind] = {
                "ranks": [rank[line.id] for line in mine],
                "scores": [round(line.score or 0, 3) for line in mine],
                "tokens": round(fmean(line.num_tokens for line in mine)) if mine else None,
                "beaten": fmean(beaten) if beaten else None,
            }
        real = [line for line in own if kinds[line.id] == "real"]
        scores = np.array([line.score for line in real])
        found["median"] = median(scores.tolist()) if real else None
        for name, what in CORRELATED.items():
            found[name] = spearman(scores, np.array([getattr(line, what) for line in real]))
        table.append(found)
    return table


def run_scores(
    model: Path, heads: Path, data: Path, folder: Path, num_rows: int, max_tokens: int, compute: ComputeSettings
) -> None:
    """Score the rows and print where the planted ones stand. Goes on in `folder` where it was stopped.

    max_tokens  of a real row; longer ones are not taken
    """
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.parquet"
    kinds = write_rows(data, model, rows, num_rows, max_tokens)

    def report(step: int, num_steps: int, **metrics: float) -> None:
        print(f"{step} of {num_steps} rows, {metrics['tokens_per_second']:.0f} tokens/s", flush=True)

    config = SelectionScoresConfig(
        kind="sft",
        scorer="attention_influence",
        over="trained",
        by="row",
        max_length=2 * max_tokens,  # planted rows are all scored
        mask="uniform",
    )
    inputs = SelectionScoresInputs(
        model=str(model), tokenizer=str(model), dataset=str(rows), heads=str(heads), chat_template=TEMPLATE
    )
    started = time.monotonic()
    outputs, metrics = score_source(config, inputs, StageContext(folder / "out", folder / "work", compute, report))
    minutes = (time.monotonic() - started) / 60
    found = placed(list(stored_scores(folder / "out" / outputs.scores_file)), kinds)
    chosen = json.loads(heads.read_text())["chosen"]
    print(
        f"\n{outputs.num_scored_rows} rows scored, {outputs.num_unscored_rows} not, {outputs.num_tokens:,} tokens; "
        f"{len(chosen)} heads, layers {min(layer for layer, _ in chosen)} and up: {minutes:.1f} min"
    )
    cells = [
        [
            one["domain"],
            str(one["num_rows"]),
            *(" ".join(map(str, one[kind]["ranks"])) for kind in KINDS),
            *("–" if one[name] is None else f"{one[name]:.2f}" for name in FIGURES),
        ]
        for one in found
    ]
    table(["domain", "rows", *(f"{kind}: ranks" for kind in KINDS), *FIGURES], cells)
    beaten = [
        [kind, *("–" if (share := one[kind]["beaten"]) is None else f"{share:.2f}" for one in found)] for kind in KINDS
    ]
    table(["real rows of its length that it beats", *(one["domain"] for one in found)], beaten)
    print(f"RESULTS {json.dumps({'minutes': minutes, 'num_tokens': outputs.num_tokens, 'domains': found, **metrics})}")
