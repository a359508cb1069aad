"""Messages of a stage's processes: none is lost or mixed, and nothing that a library prints ends a training."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smoltulu.tasks.engine.messages import PIPE_VARIABLE, Sender, ToFlow, listen, pipe

_NUM_MESSAGES = 3_000
# Four processes that share both the pipe and the output, as ranks do, and a library that prints half of a line.
_RANKS = f"""
import os, sys
from smoltulu.tasks.engine.messages import Sender
for rank in range(4):
    if os.fork() == 0:
        sender = Sender(sys.argv[1])
        for step in range({_NUM_MESSAGES}):
            sender.progress(step, {_NUM_MESSAGES}, rank=rank, loss=float("nan"))
            os.write(1, b'{{"kind": "progress", "step": ')
        os._exit(0)
for rank in range(4):
    os.wait()
"""


def said(program: str) -> tuple[list[dict], list[bytes]]:
    """Messages and lines of output of a program that is given the path of the pipe."""
    messages: list[dict] = []
    output: list[bytes] = []

    def on_message(message: dict) -> None:
        assert message["kind"] in ("progress", "log")
        messages.append(message)

    with pipe() as (descriptor, path):
        process = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE)
        listen(process, descriptor, on_message, output.append)
        assert process.wait() == 0
    return messages, output


def test_no_message_of_several_processes_is_lost_or_mixed() -> None:
    """Two ranks that shared one pipe with the libraries lost 89 of 7,911, and one such line ended a training."""
    messages, output = said(_RANKS)
    for rank in range(4):
        steps = [message["step"] for message in messages if message["metrics"]["rank"] == rank]
        assert steps == list(range(_NUM_MESSAGES))
    assert b"".join(output) == b'{"kind": "progress", "step": ' * 4 * _NUM_MESSAGES


def test_messages_of_every_rank_of_torchrun_arrive(tmp_path: Path) -> None:
    program = tmp_path / "rank.py"
    program.write_text(
        "import os\nfrom smoltulu.tasks.engine.messages import PIPE_VARIABLE, Sender\n"
        "sender = Sender(os.environ[PIPE_VARIABLE])\n"
        "for step in range(100):\n    sender.progress(step, 100, rank=int(os.environ['RANK']))\n"
    )
    messages: list[dict] = []
    with pipe() as (descriptor, path):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        environment = os.environ | {PIPE_VARIABLE: path}
        process = subprocess.Popen([sys.executable, *launcher, program], stdout=subprocess.PIPE, env=environment)
        listen(process, descriptor, messages.append, lambda line: None)
        assert process.wait() == 0
    for rank in range(2):
        steps = [message["step"] for message in messages if message["metrics"]["rank"] == rank]
        assert steps == list(range(100))


@pytest.mark.parametrize(
    "line", [b"{", b"3", b"null", b"\xff\xfe", b'{"kind": "log"}', b"[" * 4_000, b'{"step": 1}', b"Traceback"]
)
def test_a_message_that_cannot_be_read_is_log(line: bytes) -> None:
    program = f"import os, sys; os.write(os.open(sys.argv[1], os.O_WRONLY), {line!r} + b'\\n')"
    messages: list[str] = []
    output: list[bytes] = []
    with pipe() as (descriptor, path):
        process = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE)
        listen(process, descriptor, lambda told: messages.append(told["kind"] + told["text"]), output.append)
        process.wait()
    assert (messages, output) == ([], [line])


def test_output_of_every_form_is_handed_on() -> None:
    program = r"import os; os.write(1, b'\xff\x00\n\n' + b'x' * 5_000_000 + b'\nlast')"
    messages, output = said(program)
    assert not messages
    assert output[:2] == [b"\xff\x00", b""] and output[-1] == b"last"
    assert b"".join(output[2:-1]) == b"x" * 5_000_000


def test_messages_go_on_after_a_process_closed_its_output() -> None:
    """More than a pipe holds: nobody listening would stop the process for ever."""
    program = f"""
import os, sys
from smoltulu.tasks.engine.messages import Sender
sender = Sender(sys.argv[1])
os.close(1)
for step in range({_NUM_MESSAGES}):
    sender.progress(step, {_NUM_MESSAGES})
"""
    messages, _ = said(program)
    assert [message["step"] for message in messages] == list(range(_NUM_MESSAGES))


@pytest.mark.parametrize("character", ["a", "\0", "é", "𝄞", "\ud800", '"', "\n"])
def test_a_long_record_arrives_whole_in_pieces_that_are_atomic(character: str) -> None:
    text = character * 5_000
    with pipe() as (descriptor, path):
        handler = ToFlow(Sender(path))
        handler.emit(logging.LogRecord("smoltulu", logging.WARNING, "", 0, text, None, None))
        data = os.read(descriptor, 1 << 20)
    lines = data.splitlines()
    assert len(lines) > 1 and all(len(line) < 4096 for line in lines)
    assert "".join(json.loads(line)["text"] for line in lines) == text.encode(errors="replace").decode()


def test_every_state_of_a_progress_bar_is_a_line() -> None:
    _, output = said(r"print(''.join(f'\r{n} of 3' for n in (1, 2, 3)), end='\r\n'); print('done')")
    assert [line for line in output if line] == [b"1 of 3", b"2 of 3", b"3 of 3", b"done"]


def test_progress_with_more_metrics_than_fit_is_told_with_those_that_do() -> None:
    with pipe() as (descriptor, path):
        Sender(path).progress(1, 2, loss=0.5, **{f"{'metric' * 6}_{number}": 1.0 for number in range(200)})
        (line,) = os.read(descriptor, 1 << 16).splitlines()
    assert len(line) < 4096 and json.loads(line)["metrics"]["loss"] == 0.5


@pytest.mark.parametrize("left", ["nothing", "file", "none"])
def test_a_pipe_that_is_no_more_is_not_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str], left: str) -> None:
    """A flow that was killed takes its pipe with it; its numbers may be those of another process's file by then."""
    with pipe() as (_, path):
        pass
    other = tmp_path / "file"
    other.write_text("what was there")
    Sender({"nothing": path, "file": str(other), "none": None}[left]).log("INFO", "hello")
    assert json.loads(capfd.readouterr().out)["text"] == "hello" and other.read_text() == "what was there"


def test_messages_need_no_file_and_leave_none(tmp_path: Path) -> None:
    """Some file systems have no named pipes, and nobody cleans up after a process that was killed."""
    program = """
import os, signal
from smoltulu.tasks.engine.messages import Sender, pipe
with pipe() as (_, path):
    Sender(path).log("INFO", "hello")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert killed.returncode == -9 and list(tmp_path.iterdir()) == []
