"""Messages of a stage's processes to the flow that started them: a named pipe, one atomic write each.

Standard output belongs to the libraries, and several processes write into it at once. The pipe has a name, because
torchrun does not pass descriptors on: every rank opens it by itself. A write of at most PIPE_BUF bytes is never mixed
with another one (POSIX, `write`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import select
import selectors
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

#: Name of the pipe in `work`.
PIPE_FILE = "messages"
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

    def __init__(self, work: Path) -> None:
        try:
            # Without waiting for a listener: the pipe of a flow that was killed has none.
            self._descriptor = os.open(work / PIPE_FILE, os.O_WRONLY | os.O_NONBLOCK)
            os.set_blocking(self._descriptor, True)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENXIO):
                raise
            self._descriptor = sys.stdout.fileno()

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
def pipe(work: Path) -> Iterator[int]:
    """A new pipe in `work`; the descriptor that its messages are read from."""
    path = work / PIPE_FILE
    path.unlink(missing_ok=True)
    os.mkfifo(path, 0o600)
    # Open for both directions, it never ends: processes open and close it as they come and go.
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def listen(
    process: subprocess.Popen[bytes],
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
