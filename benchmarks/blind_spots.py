"""Where each mode of the contamination check is blind: real items in common wrappings, and the share that is found.

    python benchmarks/blind_spots.py [--items 1000] [--clean 40000] [--short 40000]

Input: benchmarks and training rows of SMOLTULU_REAL_DATA (default ../shared/data), and Chinese items that are made up
here. Prints Markdown: the share of items found per wrapping and benchmark, full / n-gram before and normalised after.
`--clean N` scans N real training rows and lists every hit of `normalised` that `full` has not, to be read. `--short N`
shows the rule for short items: full leaks of TruthfulQA and PIQA, and accidental hits in those rows. Some minutes.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import tempfile
import textwrap
import time
import unicodedata
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from urllib.parse import quote

from contamination_work import load_benchmarks, real_rows, user_text

MODES = ("full", "ngram", "normalised")
SHOWN = ("gsm8k", "math", "mmlu", "humaneval")


def curly(text: str) -> str:
    """Quotes, dashes and dots as a word processor sets them."""
    text = re.sub(r'"([^"]*)"', "\u201c\\1\u201d", text).replace('"', "\u201d")
    return text.replace("'", "\u2019").replace("--", "\u2014").replace("...", "\u2026")


def bold_words(text: str) -> str:
    """Every third word in bold."""
    return " ".join(f"**{word}**" if k % 3 == 0 else word for k, word in enumerate(text.split(" ")))


def narrow(text: str) -> list[str]:
    """Lines of up to 40 characters."""
    return [part for line in text.splitlines() for part in textwrap.wrap(line, 40) or [""]]


def numbered(text: str) -> str:
    """Such lines, numbered."""
    return "\n".join(f"{k:4}  {line}" for k, line in enumerate(narrow(text), 1))


def hyphenated(text: str) -> str:
    """Every fifth long word broken at the end of a line."""
    words = text.split(" ")
    for k in range(0, len(words), 5):
        if words[k].isalpha() and len(words[k]) > 6:
            words[k] = f"{words[k][:4]}-\n{words[k][4:]}"
    return " ".join(words)


def sentences_reversed(text: str) -> str:
    """The last sentence first."""
    return " ".join(reversed(re.split(r"(?<=[.?!]) ", text)))


WRAPPINGS: dict[str, Callable[[str], str]] = {
    "verbatim": lambda text: text,
    "bold": lambda text: f"**{text}**",
    "bold words": bold_words,
    "backticks": lambda text: f"```\n{text}\n```" if "\n" in text else f"`{text}`",
    "[INST]": lambda text: f"[INST]{text}[/INST]",
    "\u95ee\u9898\uff1a": lambda text: f"\u95ee\u9898\uff1a{text}\u3002",
    "curly quotes, dashes, dots": curly,
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "tabs for spaces": lambda text: text.replace(" ", "\t"),
    "HTML-escaped": html.escape,
    "HTML-escaped twice": lambda text: html.escape(html.escape(text)),
    "HTML with tags": lambda text: f"<p><b>{html.escape(text)}</b>".replace("\n", "<br>").replace(". ", ".</b> <i>"),
    "JSON-escaped": lambda text: json.dumps(text),
    "JSON-escaped, not ASCII": lambda text: json.dumps(text, ensure_ascii=False),
    "JSON in JSON": lambda text: json.dumps(json.dumps({"question": text})),
    "Python repr": lambda text: repr(text.encode()),
    "URL-encoded": quote,
    "NBSP": lambda text: text.replace(" ", "\u00a0"),
    "ideographic spaces": lambda text: text.replace(" ", "\u3000"),
    "zero-width for spaces": lambda text: text.replace(" ", "\u200b"),
    "zero-width in words": lambda text: "\u200b".join(text),
    "soft hyphens": lambda text: re.sub(r"(\w\w)(?=\w\w)", "\\1\u00ad", text),
    "full-width": lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
    "ligatures": lambda text: text.replace("ffi", "\ufb03").replace("fi", "\ufb01").replace("fl", "\ufb02"),
    "combining (NFD)": lambda text: unicodedata.normalize("NFD", text),
    "upper case": str.upper,
    "quoted lines": lambda text: "\n".join(f"> {part}" for part in narrow(text)),
    "list of sentences": lambda text: "\n".join(f"- {part}" for part in re.split(r"(?<=[.?!]) ", text)),
    "table cell": lambda text: f"| {text.replace(chr(10), '<br>')} |",
    "numbered lines": numbered,
    "hyphens at line ends": hyphenated,
    "code comment": lambda text: "\n".join(f"# {line}" for line in text.splitlines()),
    "block comment": lambda text: "/*\n" + "\n".join(f" * {line}" for line in text.splitlines()) + "\n */",
    "LaTeX text": lambda text: r"\textbf{" + text + r"}\\",
    "links": lambda text: re.sub(r"\b([A-Z][a-z]+)\b", r"[\1](https://example.org/wiki/\1)", text),
    "sentences reversed": sentences_reversed,
}  # fmt: skip
NOT_A_GOAL = "sentences reversed"
GOAL = 0.95


def chinese_items(count: int) -> list[str]:
    """Made-up word problems in Chinese: no two are the same."""
    names = ["小明", "小红", "李华", "王芳", "张强", "赵敏"]
    things = ["苹果", "铅笔", "书", "糖果", "邮票", "气球", "椒子"]
    forms = (
        "{n}\u6709{a}\u4e2a{t}\uff0c\u4ed6\u7ed9\u4e86{m}{b}\u4e2a\u3002\u8bf7\u95ee{n}\u8fd8\u5269\u4e0b\u591a\u5c11\u4e2a{t}\uff1f",
        "\u5546\u5e97\u91cc\u6709{a}\u7bb1{t}\uff0c\u6bcf\u7bb1\u201c{b}\u201d\u4e2a\u3002{n}\u4e70\u4e86\u5176\u4e2d\u7684\u4e00\u534a\uff0c\u4e00\u5171\u662f\u591a\u5c11\u4e2a\uff1f",
        "{n}\u6bcf\u5929\u8bfb{a}\u9875\u4e66\uff0c{m}\u6bcf\u5929\u8bfb{b}\u9875\u3002\u4e00\u5468\u4ee5\u540e\uff0c\u4e24\u4eba\u4e00\u5171\u8bfb\u4e86\u591a\u5c11\u9875\uff1f",
    )
    return [
        forms[k % 3].format(n=names[k % 6], m=names[(k + 1) % 6], t=things[k % 7], a=12 + k, b=3 + k % 9)
        for k in range(count)
    ]


def indexes(
    folder: Path, benchmarks: list[object], modes: tuple[str, ...] = MODES, **rest: object
) -> dict[str, object]:
    """An index of the benchmarks per mode, mapped into memory."""
    from smoltulu.tasks.contamination.build import build_index
    from smoltulu.tasks.contamination.scan import load_index

    made = {}
    for mode in modes:
        where = Path(tempfile.mkdtemp(dir=folder))
        build_index(where, benchmarks, mode, **rest)  # type: ignore[arg-type]
        made[mode] = load_index(where)
    return made


def wrappings_table(folder: Path, num_items: int) -> bool:
    """Print the share of items found per wrapping, benchmark and mode; whether the goal is met everywhere."""
    from smoltulu.tasks.contamination.queries import LoadedBenchmark
    from smoltulu.tasks.contamination.scan import scan_texts

    items = {}
    for benchmark in load_benchmarks():
        if benchmark.name in SHOWN:
            whole = [query[0] for query in benchmark.queries if query is not None and query[0].strip()]
            items[benchmark.name] = whole[:: max(1, len(whole) // num_items)][:num_items]
    items["chinese"] = chinese_items(num_items // 2)
    missed: dict[str, list[str]] = {}
    shares: dict[tuple[str, str, str], float] = {}
    for name, texts in items.items():
        found_by = indexes(folder, [LoadedBenchmark(name, [(text,) for text in texts])])
        for wrapping, wrap in WRAPPINGS.items():
            wrapped = [f"Here is a question.\n{wrap(text)}\nAnswer it." for text in texts]
            for mode, index in found_by.items():
                hits, _ = scan_texts(index, wrapped)  # type: ignore[arg-type]
                rows, instances = (hits.column(column).to_pylist() for column in ("row", "instance"))
                found = {row for row, instance in zip(rows, instances, strict=True) if texts[row] == texts[instance]}
                shares[name, wrapping, mode] = len(found) / len(texts)
                if mode == "normalised":
                    lost = [texts[k] for k in range(len(texts)) if k not in found]
                    missed[f"{name}, {wrapping}"] = lost
    print(f"Found, %: full / n-gram -> normalised. Items: {', '.join(f'{n} {len(t):,}' for n, t in items.items())}\n")
    print(f"| wrapping | {' | '.join(items)} |\n|---|{'---:|' * len(items)}")
    for wrapping in WRAPPINGS:
        cells = [[100 * shares[name, wrapping, mode] for mode in MODES] for name in items]
        line = " | ".join(f"{full:.3g} / {ngram:.3g} -> {normal:.3g}" for full, ngram, normal in cells)
        print(f"| {wrapping} | {line} |")
    below = [
        f"{name}, {wrapping}: {shares[name, wrapping, 'normalised']:.1%}"
        for wrapping in WRAPPINGS
        for name in items
        if wrapping != NOT_A_GOAL and shares[name, wrapping, "normalised"] < GOAL
    ]
    outcome = "NOT met: " + "; ".join(below) if below else "met"
    print(f"\nGoal, at least {GOAL:.0%} of every wrapping but one: {outcome}")
    for case, lost in missed.items():
        if lost and not case.endswith(NOT_A_GOAL):
            print(f"  not found, {case}: {len(lost)}, e.g. {lost[0][:100]!r}")
    return not below


def clean_rows(folder: Path, num_rows: int) -> None:
    """Scan real rows with every benchmark: speed of both modes, and each hit that only `normalised` has."""
    from smoltulu.tasks.contamination.scan import scan_texts

    texts = [user_text(row) for row in islice(real_rows(), num_rows)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    benchmarks = load_benchmarks()
    found: dict[str, dict[tuple[str, int, int], str]] = {}
    seconds: dict[str, float] = {}
    for mode, index in indexes(folder, benchmarks, ("full", "normalised")).items():
        scan_texts(index, texts[:100])  # type: ignore[arg-type]
        times = []
        for _ in range(5):
            started = time.process_time()
            hits, _ = scan_texts(index, texts)  # type: ignore[arg-type]
            times.append(time.process_time() - started)
        seconds[mode] = min(times)
        found[mode] = {(hit["benchmark"], hit["benchmark_row"], hit["row"]): hit["text"] for hit in hits.to_pylist()}
    print(f"\n{len(texts):,} clean rows, {megabytes:.1f} MB of user text, in memory, one core:")
    for mode, each in found.items():
        rows = len({row for _, _, row in each})
        print(f"  {mode}: {megabytes / seconds[mode]:.0f} MB/s, {len(each):,} hits in {rows:,} rows")
    print(f"  normalised has {seconds['full'] / seconds['normalised']:.2f} of full's speed (goal 0.6)")
    more = sorted(found["normalised"].keys() - found["full"].keys())
    fewer = sorted(found["full"].keys() - found["normalised"].keys())
    rows = len({row for _, _, row in more})
    print(f"  hits of normalised alone: {len(more):,} in {rows:,} rows; of full alone: {len(fewer):,}")
    fields = {(b.name, row): query for b in benchmarks for row, query in enumerate(b.queries)}
    for title, keys, mode in (("normalised", more, "normalised"), ("full", fewer, "full")):
        for key in keys:
            print(
                f"  only {title}: {key[0]} {key[1]}, row {key[2]}: {fields[key[:2]]!r:.200} | {found[mode][key]!r:.200}"
            )


#: How a short question may stand in a training row.
PLACES: dict[str, Callable[[str], str]] = {
    "the whole turn": lambda text: text,
    "Q: and A:": lambda text: f"Q: {text}\nA:",
    "in a list of others": lambda text: f"Please answer these questions.\n- {text}\n- What else do you know about it?",
    "behind an instruction": lambda text: f"Answer truthfully in one sentence, please.\n\n{text}",
    "in a sentence": lambda text: f"My little brother asked me at dinner yesterday: {text} What shall I tell him?",
}


def short_items(folder: Path, num_rows: int, min_terms: int = 8) -> None:
    """Print what each rule for short items finds of full leaks, and how many clean rows it would remove."""
    from smoltulu.tasks.contamination.merge import counting
    from smoltulu.tasks.contamination.queries import LoadedBenchmark
    from smoltulu.tasks.contamination.scan import ShortRule, scan_texts

    clean = [user_text(row) for row in islice(real_rows(), num_rows)]
    by_name = {benchmark.name: benchmark for benchmark in load_benchmarks()}
    print(f"\nShort items, min_terms {min_terms}, {len(clean):,} real rows:\n")
    head = [f"leaked {place}: found" for place in PLACES]
    print(f"| benchmark, mode, short_items | items | short | {' | '.join(head)} | clean rows removed | by items |")
    print(f"|---|{'---:|' * (len(PLACES) + 4)}")
    for name in ("truthfulqa", "piqa"):
        texts = [query[0] for query in by_name[name].queries if query is not None]
        loaded = [LoadedBenchmark(name, [(text,) for text in texts])]
        for mode in MODES:
            for rule in ("never", "alone", "always"):
                short = ShortRule(rule, min_terms)  # type: ignore[arg-type]
                has_short = mode == "ngram" and rule != "never"
                index = indexes(folder, loaded, (mode,), short_items=has_short)[mode]
                found = []
                for place in PLACES.values():
                    hits, _ = scan_texts(index, [place(text) for text in texts], short=short)  # type: ignore[arg-type]
                    counted = hits.filter(counting(hits, short))
                    pairs = zip(counted["row"].to_pylist(), counted["instance"].to_pylist(), strict=True)
                    found.append(len({row for row, instance in pairs if texts[row] == texts[instance]}))
                hits, _ = scan_texts(index, clean, short=short)  # type: ignore[arg-type]
                counted = hits.filter(counting(hits, short))
                rows, items = (len(set(counted[column].to_pylist())) for column in ("row", "instance"))
                num_short = int((index.num_terms < min_terms).sum())  # type: ignore[attr-defined]
                cells = [f"{number:,}" for number in (len(texts), num_short, *found, rows, items)]
                print(f"| {name}, {mode}, {rule} | {' | '.join(cells)} |")


def main() -> None:
    """The tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1000, help="at most so many items of a benchmark; 0: no table")
    parser.add_argument("--clean", type=int, default=0, help="scan so many real rows")
    parser.add_argument("--short", type=int, default=0, help="the rule for short items, with so many real rows")
    parser.add_argument("--strict", action="store_true", help="exit code 1 where the goal is not met")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        is_met = wrappings_table(Path(name), arguments.items) if arguments.items else True
        if arguments.clean:
            clean_rows(Path(name), arguments.clean)
        if arguments.short:
            short_items(Path(name), arguments.short)
    if arguments.strict and not is_met:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
