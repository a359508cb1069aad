"""Messages of a stage's processes to the flow that started them: a pipe, one atomic write each.

Standard output belongs to the libraries, and several processes write into it at once. Launchers pass no descriptors
on: every rank opens the flow's own by its name in /proc. So no file system needs to have named pipes, and a flow that
is killed leaves nothing behind. A write of at most PIPE_BUF bytes is never mixed with another one (POSIX, `write`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import selectors
import stat
import sys
from collections.abc import Callable, Iterator
from typing import IO, Protocol

#: Variable of a stage's environment: where to open the pipe.
PIPE_VARIABLE = "SMOLTULU_MESSAGES"
_ATOMIC_BYTES = select.PIPE_BUF
#: Characters that fit into one write however they are encoded: a control character takes six bytes.
_SAFE_CHARACTERS = (_ATOMIC_BYTES - 200) // 6
#: A line of output longer than this is taken in pieces.
_LINE_BYTES = 1 << 20
_READ_BYTES = 1 << 16
_LINE_END = re.compile(rb"\r?\n|\r(?!$)")
_POLL_SECONDS = 0.2


class Sender:
    """The end of a stage's process. Where nobody listens (a job that is run by hand), messages are printed."""

    def __init__(self, path: str | None) -> None:
        self._descriptor = sys.stdout.fileno()
        with contextlib.suppress(OSError):  # the flow was killed, or a system does not let its pipe be opened
            # No file, and nothing to wait for: another process may have got the number of one that was killed.
            if path is not None and stat.S_ISFIFO(os.stat(path).st_mode):
                self._descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
                os.set_blocking(self._descriptor, True)

    def progress(self, step: int, num_steps: int, **metrics: float) -> None:
        """Say that `step` of `num_steps` is done, with as many of the metrics as fit into one write."""
        while (
            len(message := _encoded(kind="progress", step=step, num_steps=num_steps, metrics=metrics)) > _ATOMIC_BYTES
        ):
            metrics.popitem()
        self._write(message)

    def log(self, level: str, text: str) -> None:
        """Say something to the user; a text that does not fit into one write becomes several."""
        whole = _encoded(kind="log", level=level, text=text)
        if len(whole) <= _ATOMIC_BYTES:
            self._write(whole)
            return
        for start in range(0, len(text), _SAFE_CHARACTERS):
            self._write(_encoded(kind="log", level=level, text=text[start : start + _SAFE_CHARACTERS]))

    def _write(self, message: bytes) -> None:
        assert len(message) <= _ATOMIC_BYTES, f"a message of {len(message)} bytes is not written atomically"
        os.write(self._descriptor, message)


class ToFlow(logging.Handler):
    """Our own log records go to the flow as messages, so that they reach Prefect and not only the log file."""

    def __init__(self, sender: Sender) -> None:
        super().__init__()
        self.sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        self.sender.log(record.levelname, self.format(record))


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, str]]:
    """A new pipe: the descriptor that its messages are read from, and the path that other processes open."""
    # Both ends stay open here, so that it never ends: processes open and close it as they come and go.
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    try:
        yield reading, f"/proc/{os.getpid()}/fd/{writing}"
    finally:
        os.close(reading)
        os.close(writing)


class _Speaking(Protocol):
    """A process with its output."""

    @property
    def stdout(self) -> IO[bytes] | None: ...

    def poll(self) -> int | None: ...


def listen(
    process: _Speaking,
    messages: int,
    on_message: Callable[[dict], None],
    on_output: Callable[[bytes], None],
) -> None:
    """Hand on what a process says, line by line, until it has ended and every writer of its output has closed it.

    on_output is handed a line of output, and a message that `on_message` cannot read: that is log, never an exception.
    """
    assert process.stdout is not None
    output = process.stdout.fileno()

    def told(line: bytes) -> None:
        try:
            on_message(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            on_output(line)

    lines = {output: _Lines(on_output), messages: _Lines(told)}
    with selectors.DefaultSelector() as selector:
        for descriptor in lines:
            selector.register(descriptor, selectors.EVENT_READ)
        # A process that closed its output may still send messages.
        while output in selector.get_map() or process.poll() is None:
            for key, _ in selector.select(None if output in selector.get_map() else _POLL_SECONDS):
                if data := os.read(key.fd, _READ_BYTES):
                    lines[key.fd].add(data)
                else:
                    selector.unregister(key.fd)
    with contextlib.suppress(BlockingIOError):
        while data := os.read(messages, _READ_BYTES):
            lines[messages].add(data)
    for rest in lines.values():
        rest.end()


class _Lines:
    """Bytes as they come, handed on line by line."""

    def __init__(self, handed: Callable[[bytes], None]) -> None:
        self.handed, self.rest = handed, b""

    def add(self, data: bytes) -> None:
        # A progress bar is a line for every state that it was in; JSON writes no bare carriage return.
        *whole, self.rest = _LINE_END.split(self.rest + data)
        for line in whole:
            self.handed(line)
        if len(self.rest) > _LINE_BYTES:
            self.end()

    def end(self) -> None:
        if self.rest:
            self.handed(self.rest)
        self.rest = b""


def _encoded(**values: object) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode(errors="replace") + b"\n"
