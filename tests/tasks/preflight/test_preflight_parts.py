"""The preflight in parts: what one pass gives, whatever the parts, the processes and the interruptions."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from smoltulu.artifacts.checkpoints import mark_complete
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.data import DatasetKind
from smoltulu.schemas.preflight import PreflightConfig, PreflightInputs, PreflightOutputs, PreflightSettings
from smoltulu.tasks.models.folders import load_tokenizer
from smoltulu.tasks.models.tokens import conversations, fit_conversation, fit_pair, pairs, prompt_ids
from smoltulu.tasks.preflight import parts as preflight_parts
from smoltulu.tasks.preflight.rows import TokenizerProbe, findings, last_trained
from smoltulu.tasks.preflight.stage import length_report, run_preflight
from smoltulu.tasks.stage import Report, StageContext
from tests import ROOT, small_runs
from tests.rows_file import read_rows, write_rows
from tests.small_runs import turn
from tests.tiny_model import EOS, PICKY_TEMPLATE, REFUSED, TULU_TEMPLATE, build_tiny_model

Rows = list[Any]
KINDS: dict[str, DatasetKind] = {"conversations": "sft", "pairs": "preference", "prompts": "rlvr"}
FREE = PreflightSettings(dry_run=False, max_overlong_share=1, max_unstable_share=1, max_faulty_share=1)


def quiet(*args: Any, **metrics: Any) -> None:
    pass


@dataclass(frozen=True)
class Made:
    """What a preflight left, whether the rows passed or not."""

    rows: bytes
    outputs: PreflightOutputs
    report: tuple[str, str]
    work: Path

    @property
    def content(self) -> tuple[bytes, str, tuple[str, str]]:
        """Everything that must not tell how it was made; as text, for the order counts too."""
        return self.rows, self.outputs.model_dump_json(), self.report

    @property
    def parts(self) -> list[Path]:
        return sorted(path for path in (self.work / "parts").iterdir() if path.is_dir() and path.name.isdigit())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


def config_of(kind: str = "conversations", **values: Any) -> PreflightConfig:
    return PreflightConfig(**{"kind": kind, "max_length": 60, "overlong": "truncate", "settings": FREE} | values)


def make(
    folder: Path, model: Path, rows: Rows, kind: str = "conversations", *, part_rows: int = 4, num_threads: int = 1,
    report: Report = quiet, template: str = PICKY_TEMPLATE, **config: Any,
) -> Made:  # fmt: skip
    """Run the stage's function, going on from what lies in `folder`."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    source = write_rows(folder / "source.parquet", rows, KINDS[kind])
    machine = ComputeSettings(device="cpu", num_threads=num_threads)
    context = StageContext(folder / "out", folder / "work", machine, report)
    inputs = PreflightInputs(model=str(model), dataset=str(source), chat_template=template)
    logs = folder / "out" / "logs"
    with mock.patch.object(preflight_parts, "PART_ROWS", part_rows):
        try:
            run_preflight(config_of(kind, **config), inputs, context)
        except ValueError as error:
            if "The whole report" not in str(error):
                raise
            logs = folder / "work" / "logs"
    page, values = ((logs / name).read_text("utf-8") for name in ("report.html", "report.json"))
    outputs = PreflightOutputs.model_validate(json.loads(values)["outputs"])
    return Made((folder / "out" / outputs.file).read_bytes(), outputs, (page, values), folder / "work")


# --- What one pass gives ------------------------------------------------------------------------------------------


def one_pass(config: PreflightConfig, model: Path, rows: Rows) -> tuple[dict[str, list[int]], list[int], list[Any]]:
    """Rows by finding, lengths, and (number, what is left) of the rows that are kept: one row after the other."""
    tokenizer = load_tokenizer(model, PICKY_TEMPLATE)
    probe = TokenizerProbe.of(tokenizer, model)
    found: dict[str, list[int]] = defaultdict(list)
    lengths, kept, seen = [], [], set()
    for number, row in enumerate(rows):
        one: Any
        try:
            if config.kind == "conversations":
                (one,) = conversations(tokenizer, [row["messages"]])
                fitted: Any = fit_conversation(one, config.max_length, config.overlong)
                length, tokens = len(one.input_ids), fitted and tuple(fitted.input_ids)
            elif config.kind == "pairs":
                (one,) = pairs(tokenizer, [row], config.trained_turns)
                fitted, length = fit_pair(one, config.max_length, config.overlong), one.length
                tokens = fitted and (
                    (*fitted.prompt_ids, *fitted.chosen_ids), (*fitted.prompt_ids, *fitted.rejected_ids)
                )  # fmt: skip
            else:
                (ids,) = prompt_ids(tokenizer, [row["prompt"]])
                one, length, tokens = mock.Mock(stable=True), len(ids), tuple(ids)
                fitted = ids if length <= config.max_length else None
        except Exception:
            found["num_malformed"].append(number)
            continue
        lengths.append(length)
        looked_at = preflight_parts.Tokenised(number, row, one)
        if config.kind != "prompts":
            for finding in findings(config, probe, looked_at):
                found[finding].append(number)
        if length > config.max_length:
            found["num_overlong"].append(number)
        if fitted is None:
            dropped = length > config.max_length and (config.overlong == "drop" or config.kind == "prompts")
            found["num_dropped" if dropped else "num_empty"].append(number)
            continue
        if length > config.max_length:
            found["num_truncated"].append(number)
            if any(last_trained(mask) > config.max_length for _, mask in looked_at.whole.sides):
                found["num_eos_lost"].append(number)
        if tokens in seen:
            found["num_duplicates"].append(number)
        seen.add(tokens)
        if config.kind == "pairs" and fitted.chosen_ids == fitted.rejected_ids:
            found["num_equal"].append(number)
        kept.append((number, fitted))
    return found, lengths, kept


ASKED, SAID = turn("user", "Good morning"), turn("assistant", "3")
LONG, SPECIAL, NOT_RENDERED = "word " * 40, f"a{EOS}b", turn("assistant", REFUSED)
PAIRS = small_runs.pairs(4)
#: Of each kind: usual rows, and rows with which something is the matter.
POOL: dict[str, Rows] = {
    "conversations": [
        *small_runs.conversations(4),
        {"messages": [ASKED, turn("assistant", LONG)]},
        {"messages": [turn("user", LONG), SAID]},
        {"messages": [turn("user", SPECIAL), turn("assistant", SPECIAL)]},
        {"messages": [turn("user", "<|user|>"), turn("assistant", " 3")]},
        {"messages": [ASKED, NOT_RENDERED]}, {"messages": []}, {"messages": [NOT_RENDERED]},
    ],
    "pairs": [
        *PAIRS,
        {**PAIRS[1], "chosen": [turn("assistant", LONG + "a")], "rejected": [turn("assistant", LONG + "b")]},
        {**PAIRS[2], "prompt": [turn("user", LONG)]},
        {**PAIRS[3], "chosen": [SAID], "rejected": [SAID]},
        {**PAIRS[3], "chosen": [turn("assistant", SPECIAL)]}, {**PAIRS[3], "rejected": [NOT_RENDERED]},
        {**PAIRS[0], "prompt": [NOT_RENDERED]},
    ],
    "prompts": [
        {"prompt": [ASKED], "ground_truth": "ä \u2028 "}, {"prompt": [turn("user", "Which one?")], "verifier": "gsm8k"},
        {"prompt": [turn("user", LONG)]}, {"prompt": [NOT_RENDERED]}, {"prompt": [ASKED, SAID, ASKED]},
    ],
}  # fmt: skip


@settings(max_examples=40)
@given(st.data())
def test_parts_give_what_one_pass_gives(model: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    kind = data.draw(st.sampled_from(sorted(POOL)))
    rows = data.draw(st.lists(st.sampled_from(POOL[kind]), max_size=14))
    part_rows, batch_rows = data.draw(st.integers(1, 15)), data.draw(st.sampled_from([1, 3, 512]))
    overlong = data.draw(st.sampled_from(["truncate", "drop"]))
    folder = tmp_path_factory.mktemp("parts")
    with mock.patch.object(preflight_parts, "_BATCH_ROWS", batch_rows):
        made = make(folder, model, rows, kind, part_rows=part_rows, overlong=overlong)
    assert len(made.parts) == -(-len(rows) // part_rows)

    found, lengths, kept = one_pass(config_of(kind, overlong=overlong), model, rows)
    outputs = made.outputs
    assert outputs.first_rows == {finding: tuple(numbers[:3]) for finding, numbers in found.items()}
    counted = {name for name in PreflightOutputs.model_fields if name.startswith("num_")}
    counted -= {"num_rows", "num_source_rows", "num_tokens", "num_trained_tokens"}
    assert {name: getattr(outputs, name) for name in counted} == {name: len(found[name]) for name in counted}
    assert (outputs.num_rows, outputs.num_source_rows) == (len(kept), len(rows))
    assert outputs.lengths == length_report(lengths)
    file = folder / "out" / outputs.file
    if kind == "prompts":
        source = read_rows(folder / "source.parquet")
        assert read_rows(file) == [source[number] for number, _ in kept]
        return
    names = preflight_parts.COLUMNS[kind]
    expected = [{"row": number, **{name: getattr(fitted, name) for name in names}} for number, fitted in kept]
    assert parquet.read_table(file).to_pylist() == expected

    # Texts and shown rows are in the page: that of one part, where rows go by in one pass.
    whole = make(tmp_path_factory.mktemp("whole"), model, rows, kind, part_rows=100, overlong=overlong)
    assert whole.outputs.model_dump_json() == outputs.model_dump_json()
    assert whole.report == made.report
    for number in (number for numbers in outputs.first_rows.values() for number in numbers):
        assert f"<summary>Row {number}: " in made.report[0]


def test_duplicates_lie_in_different_parts(model: Path, tmp_path: Path) -> None:
    first, second, third = small_runs.conversations(3)
    rows = [first, second, third, first, {"messages": [NOT_RENDERED]}, second, first, third, second]
    made = make(tmp_path, model, rows, part_rows=2)
    assert made.outputs.num_duplicates == 5 and made.outputs.first_rows["num_duplicates"] == (3, 5, 6)
    assert "<summary>Row 5: duplicates</summary>" in made.report[0]
    text = made.report[0].partition("<summary>Row 5: ")[2].partition("</details>")[0]
    assert second["messages"][0]["content"] in text


# --- Processes ----------------------------------------------------------------------------------------------------


def odd_rows(count: int) -> Rows:
    return [POOL["conversations"][(7 * i + i // 11) % 11] for i in range(count)]


def test_processes_change_nothing(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows, before = odd_rows(60), dict(os.environ)
    alone = make(tmp_path / "1", model, rows)
    steps: list[tuple[int, int]] = []
    caplog.clear()
    made = make(tmp_path / "3", model, rows, num_threads=3,
                report=lambda step, num_steps, **_: steps.append((step, num_steps)))  # fmt: skip
    assert made.content == alone.content and steps == [(4 * part, 60) for part in range(1, 16)]
    # Once, though every process meets such rows.
    first = next(i for i, row in enumerate(rows) if row in POOL["conversations"][-3:])
    messages = [record.getMessage() for record in caplog.records if record.name == "smoltulu"]
    assert [text.partition(":")[0] for text in messages] == [f"row {first} is not rendered by the chat template"]
    assert not multiprocessing.active_children() and dict(os.environ) == before


@pytest.mark.parametrize(
    ("num_threads", "num_cores", "num_parts", "num_processes"),
    [(1, 8, 5, 0), (3, 8, 5, 3), (None, 8, 5, 5), (None, 2, 5, 2), (None, 1, 5, 0), (None, 8, 1, 0), (8, 8, 0, 0)],
)
def test_as_many_processes_as_are_allowed_and_have_something_to_do(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    num_threads: int | None, num_cores: int, num_parts: int, num_processes: int,
) -> None:  # fmt: skip
    """0: none is started."""
    started: list[int] = []

    def count(maker: Any, parts: Any, missing: Any, number: int, take: Callable[[Any], None]) -> None:
        started.append(number)
        for part in parts:
            maker.make(part)
            take(part)

    monkeypatch.setattr(preflight_parts, "_make_in_processes", count)
    monkeypatch.setattr(preflight_parts, "num_cores", lambda: num_cores)
    make(tmp_path, model, small_runs.conversations(4 * num_parts), num_threads=num_threads)  # type: ignore[arg-type]
    assert started == ([num_processes] if num_processes else [])


def test_what_goes_wrong_in_a_process_is_said(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(file: Path, *given: Any, write: Callable[..., Path] = write_rows) -> Path:
        write(file, *given)
        content = file.read_bytes()
        file.write_bytes(content[:4] + bytes(40) + content[44:])  # its first page, not its footer
        return file

    monkeypatch.setitem(globals(), "write_rows", torn)
    errors = []
    for num_threads in (1, 2):
        with pytest.raises(OSError, match="deserialize") as raised:
            make(tmp_path / str(num_threads), model, odd_rows(20), num_threads=num_threads)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


def test_a_process_that_is_killed_ends_the_preflight_and_costs_its_part(model: Path, tmp_path: Path) -> None:
    rows = odd_rows(200)

    def kill(step: int, *_: Any, **metrics: float) -> None:
        for process in multiprocessing.active_children():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"ended before its part was finished .* Finished parts are kept"):
        make(tmp_path / "killed", model, rows, num_threads=2, report=kill)
    finished = stamps(tmp_path / "killed" / "work")
    assert finished
    again = make(tmp_path / "killed", model, rows)
    assert again.content == make(tmp_path / "alone", model, rows).content
    assert finished.items() <= stamps(again.work).items()


# --- Interruptions ------------------------------------------------------------------------------------------------


def stamps(work: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file of every finished part."""
    return {
        file.relative_to(work).as_posix(): (file.stat().st_ino, file.stat().st_mtime_ns)
        for marker in (work / "parts").glob("*/.complete")
        for file in marker.parent.iterdir()
    }


#: Stands in for `python -m smoltulu.tasks.child`, with small parts.
CHILD = """
import sys
import smoltulu.tasks.preflight.parts

if __name__ == "__main__":
    smoltulu.tasks.preflight.parts.PART_ROWS = 32
    from smoltulu.tasks.engine.child import main

    sys.exit(main(sys.argv[1]))
"""


def begin(folder: Path, model: Path, rows: Rows, num_threads: int) -> subprocess.Popen:
    """A preflight in a stage's process, as it is run."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    source = write_rows(folder / "source.parquet", rows)
    inputs = {"model": str(model), "dataset": str(source), "chat_template": PICKY_TEMPLATE}
    job = {
        "stage": "preflight",
        "config": config_of().model_dump(mode="json"),
        "inputs": inputs,
        "externals": {},
        "compute": ComputeSettings(device="cpu", num_threads=num_threads).model_dump(mode="json"),
        "folder": str(folder / "out"),
        "work": str(folder / "work"),
        "parent_pid": os.getpid(),
        "num_ranks": 1,
    }
    (folder / "work" / "job.json").write_text(json.dumps(job))
    (folder / "child.py").write_text(CHILD)
    return subprocess.Popen(
        [sys.executable, str(folder / "child.py"), str(folder / "work" / "job.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=(folder / "log.txt").open("a"),
        stderr=subprocess.STDOUT,
    )


def children_of(parent: int) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = file.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(ppid) == parent and state != "Z":
            found.append(int(file.parent.name))
    return found


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_killed_preflight_goes_on_and_gives_the_same_bytes(model: Path, tmp_path: Path, num_threads: int) -> None:
    rows = odd_rows(1500)
    process = begin(tmp_path / "killed", model, rows, num_threads)
    work = tmp_path / "killed" / "work"
    try:
        wait_for(lambda: process.poll() is not None or any((work / "parts").glob("*/.complete")))
        workers = children_of(process.pid)
        environments = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in workers]
        # Parts are made without torch: a process has a few hundred MB of memory less to find.
        with_torch = [pid for pid in workers if "libtorch" in Path(f"/proc/{pid}/maps").read_text()]
    finally:
        process.kill()
        process.wait()
    assert len(workers) >= 2 if num_threads == 2 else not workers
    assert not with_torch
    assert all({b"TOKENIZERS_PARALLELISM=false", b"RAYON_NUM_THREADS=1"} <= {*names} for names in environments)
    wait_for(lambda: not any(map(lives, workers)), 10)
    finished = stamps(work)
    num_finished = len({name.rpartition("/")[0] for name in finished})
    assert 1 <= num_finished < 47, (tmp_path / "killed" / "log.txt").read_text()[-2000:]

    assert begin(tmp_path / "killed", model, rows, num_threads).wait(120) == 0
    assert finished.items() <= stamps(work).items()
    unbroken = make(tmp_path / "unbroken", model, rows, part_rows=32)
    assert len(unbroken.parts) == 47
    out = tmp_path / "killed" / "out"
    assert (out / "rows.parquet").read_bytes() == unbroken.rows
    assert json.loads((work / "result.json").read_text())["outputs"] == unbroken.outputs.model_dump(mode="json")
    assert (out / "logs" / "report.html").read_text("utf-8") == unbroken.report[0]


def torn(part: Path) -> None:
    file = part / "rows.parquet"
    file.write_bytes(file.read_bytes()[:-5])


def flipped(part: Path) -> None:
    """Of the same size, with another byte."""
    file = part / "rows.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def without_numbers(part: Path) -> None:
    (part / "numbers.npz").unlink()


def unfinished(part: Path) -> None:
    (part / ".complete").unlink()


def of_other_rows(part: Path) -> None:
    """Whole, but not of as many rows."""
    file = part / "counts.json"
    file.write_text(file.read_text().replace('"num_source_rows": 4', '"num_source_rows": 5'))
    mark_complete(part)


@pytest.mark.parametrize("damage", [torn, flipped, without_numbers, unfinished, of_other_rows])
def test_a_damaged_part_is_made_again(model: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    rows = odd_rows(18)
    made = make(tmp_path, model, rows)
    before = stamps(made.work)
    damage(made.parts[2])
    again = make(tmp_path, model, rows)
    assert again.content == made.content
    same = {name.split("/")[1] for name, stamp in stamps(again.work).items() if before.get(name) == stamp}
    assert same == {"000000", "000001", "000003", "000004"}


@pytest.mark.parametrize("other", ["rows", "template", "tokenizer", "max_length", "part_rows"])
def test_parts_of_something_else_are_not_taken(model: Path, tmp_path: Path, other: str) -> None:
    """A stage's key holds all of it, but for the size of a part; an input of the same key may be made again."""
    rows, mine = odd_rows(18), tmp_path / "model"
    shutil.copytree(model, mine)
    first = make(tmp_path / "run", mine, rows)
    before = stamps(first.work)
    arguments: dict[str, Any] = {}
    if other == "rows":
        rows[1] = rows[0]
    elif other == "template":
        arguments["template"] = TULU_TEMPLATE.replace("<|user|>", "<|person|>")
    elif other == "tokenizer":
        # A pair of letters less that are merged: other tokens.
        file = mine / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        del tokenizer["model"]["merges"][0]
        file.write_text(json.dumps(tokenizer))
    elif other == "max_length":
        arguments["max_length"] = 40
    else:
        arguments["part_rows"] = 5
    again = make(tmp_path / "run", mine, rows, **arguments)
    assert before and not before.items() & stamps(again.work).items() and again.rows != first.rows
    assert again.content == make(tmp_path / "new", mine, rows, **arguments).content


def test_machinery_keeps_the_parts(model: Path, tmp_path: Path) -> None:
    """Thresholds and threads: whoever changes a threshold does not wait again."""
    rows = odd_rows(18)
    strict = FREE.model_copy(update={"max_faulty_share": 0.0})
    before = stamps(make(tmp_path, model, rows, settings=strict).work)
    assert before == stamps(make(tmp_path, model, rows, num_threads=2).work) and before
