"""Processes of stages that begin with everything imported: forked from a server that imports once.

`python -m smoltulu.tasks.engine.warm DESCRIPTOR` is that server. It has no Prefect, no CUDA and no threads of ours, so
that a fork of it is as a new process after its imports: a stage that runs there gives what it gives alone. A flow has
one server for each environment that stages are started with; servers and stages end with the flow.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import importlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

_MAX_MESSAGE = 1 << 16
#: Variables that a stage may have its own values of: nothing that is imported reads them.
OWN_VARIABLES = ("SMOLTULU_MESSAGES", "CUDA_VISIBLE_DEVICES")
_ASKED_TO_END = (signal.SIGINT, signal.SIGTERM)
#: Read at import, so that a fork has them: what trainings and evaluations begin with.
_IMPORTED = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "trl.trainer.sft_trainer",
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
    "smoltulu.tasks.engine.child",
    "smoltulu.tasks.stages",
)


class WarmProcess:
    """A forked stage, as `subprocess.Popen` would show it."""

    def __init__(self, server: _Server, request: int, stdout: IO[bytes]) -> None:
        self.stdout = stdout
        self.request = request
        self.pid: int | None = None
        self.returncode: int | None = None
        self._server, self._ended = server, threading.Event()

    def poll(self) -> int | None:
        """The status where it has ended: negative for a signal."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. subprocess.TimeoutExpired after `timeout` seconds."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("stage", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        # By the server, which has not reaped it yet: its number cannot be another process's.
        self._server.send({"signal": int(number), "request": self.request})

    def end(self, returncode: int) -> None:
        """Told by the server's listener."""
        self.returncode = returncode
        self._ended.set()


class _Server:
    """The flow's side of a server."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._processes: dict[int, WarmProcess] = {}  # by request
        self._requests = itertools.count()
        self._lock = threading.Lock()
        self.is_gone = False
        started: Future[subprocess.Popen[bytes]] = Future()

        def live() -> None:
            # The kernel ends the server with the thread that started it: this one stays as long as the flow.
            try:
                process = subprocess.Popen(
                    [sys.executable, "-m", "smoltulu.tasks.engine.warm", str(there.fileno())],
                    pass_fds=(there.fileno(),),
                    stdin=subprocess.DEVNULL,
                    env=environment | {"SMOLTULU_PARENT": str(os.getpid())},
                )
            except Exception as error:
                self._here.close()
                started.set_exception(error)
                return
            finally:
                there.close()
            started.set_result(process)
            self._listen(process)

        threading.Thread(target=live, name="warm-processes", daemon=True).start()
        self.process = started.result()

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self, job_file: Path, own: Mapping[str, str]) -> WarmProcess:
        reading, writing = os.pipe()
        process = WarmProcess(self, next(self._requests), os.fdopen(reading, "rb", buffering=0))
        message = json.dumps({"request": process.request, "job": str(job_file), "own": dict(own)}).encode()
        try:
            with self._lock:
                if self.is_gone:
                    raise OSError(errno.EPIPE, "the server of warm processes is gone")
                socket.send_fds(self._here, [message], [writing])
                self._processes[process.request] = process
        except OSError:
            process.end(-signal.SIGKILL)
        finally:
            os.close(writing)
        return process

    def send(self, message: dict[str, Any]) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._here.send(json.dumps(message).encode())

    def _listen(self, server: subprocess.Popen[bytes]) -> None:
        while data := self._received():
            message = json.loads(data)
            with self._lock:
                process = self._processes.get(message["request"])
                if process is not None and "status" in message:
                    del self._processes[message["request"]]
            if process is None:
                continue
            if "status" in message:
                process.end(message["status"])
            else:
                process.pid = message["pid"]
        # The server has ended, and with it its stages: the kernel sees to that.
        status = server.wait()
        with self._lock:
            self.is_gone = True
            left, self._processes = list(self._processes.values()), {}
            self._here.close()
        for process in left:
            process.end(status if status > 0 else -signal.SIGKILL)

    def _received(self) -> bytes:
        try:
            return self._here.recv(_MAX_MESSAGE)
        except OSError:
            return b""


_servers: dict[tuple[tuple[str, str], ...], _Server] = {}
_servers_lock = threading.Lock()


def shared(environment: Mapping[str, str]) -> dict[str, str]:
    """What stages of one server have in common: imports may have read it."""
    return {name: value for name, value in environment.items() if name not in OWN_VARIABLES}


def server_for(environment: Mapping[str, str]) -> _Server:
    """The server whose forks have this environment, started where there is none."""
    in_common = shared(environment)
    key = tuple(sorted(in_common.items()))
    with _servers_lock:
        if key not in _servers or _servers[key].is_gone:
            _servers[key] = _Server(in_common)
        return _servers[key]


# ------------------------------------------------------------------------------------------------------- the server


def serve(descriptor: int) -> int:
    """Import, then fork a stage for every request, until the flow closes its end."""
    from smoltulu.tasks.process import die_with_parent, leave_out

    leave_out()
    die_with_parent(int(os.environ.pop("SMOLTULU_PARENT")))
    on_interrupt = signal.getsignal(signal.SIGINT)  # ignored where the flow was begun in the background
    # Ctrl-C and a machine that goes down ask every process to end: stages write a checkpoint if their server lives on.
    for number in _ASKED_TO_END:
        signal.signal(number, signal.SIG_IGN)
    for name in _IMPORTED:
        with contextlib.suppress(Exception):  # a stage that needs it tells so in its own log
            importlib.import_module(name)
    # A stage that collects garbage need not look at what was imported: half a second each time.
    gc.collect()
    gc.freeze()
    warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork.*")
    connection = socket.socket(fileno=descriptor)
    waking, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    requests: dict[int, int] = {}  # pid -> request
    while True:
        ready = select.select([connection.fileno(), waking], [], [])[0]
        if waking in ready:
            os.read(waking, 4096)
        if connection.fileno() in ready:
            data, descriptors, _, _ = socket.recv_fds(connection, _MAX_MESSAGE, 1)
            if not data:
                for pid in requests:
                    os.kill(pid, signal.SIGKILL)
                return 0
            message = json.loads(data)
            if "signal" in message:
                for pid, request in requests.items():
                    if request == message["request"]:
                        os.kill(pid, message["signal"])
            else:
                told = {"request": message["request"]}
                signal.pthread_sigmask(signal.SIG_BLOCK, _ASKED_TO_END)
                try:
                    if (pid := os.fork()) == 0:
                        _become_stage(message, descriptors[0], (connection.fileno(), waking, woken), on_interrupt)
                    requests[pid] = message["request"]
                    told["pid"] = pid
                except OSError as error:
                    os.write(descriptors[0], f"no process for it: {error}\n".encode())
                    told["status"] = 1
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKED_TO_END)
                os.close(descriptors[0])
                connection.send(json.dumps(told).encode())
        _reap(requests, connection)


def _reap(requests: dict[int, int], connection: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid in requests:  # else a child of a library
            message = {"request": requests.pop(pid), "status": os.waitstatus_to_exitcode(status)}
            connection.send(json.dumps(message).encode())


def _become_stage(message: dict[str, Any], output: int, inherited: tuple[int, ...], on_interrupt: Any) -> None:
    """Run the job in this process, which was just forked, and end it. Never returns."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, on_interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKED_TO_END)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for descriptor in {output, *inherited} - {1, 2}:
            os.close(descriptor)
        os.environ.update(message["own"])
        for name in OWN_VARIABLES:
            if name not in message["own"]:
                os.environ.pop(name, None)
        from smoltulu.tasks.engine.child import main

        try:
            status = main(message["job"], is_warm=True)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        # As at the end of a process of its own: the libraries' writers of logs flush here.
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(serve(int(sys.argv[1])))
