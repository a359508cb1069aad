"""A headless Chromium that shows a page as a phone does, where one is on the PATH: by the DevTools protocol."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
_SECONDS = 60.0
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "about:blank")


class Shown:
    """A page in a browser's window."""

    def __init__(self, connection: Any) -> None:
        self._connection, self._last, self._session = connection, 0, None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command of the protocol."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        self._connection.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while True:
            answer = json.loads(self._connection.recv(timeout=30))
            if answer.get("id") == self._last:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def open(self, file: Path, width: int) -> None:
        """Show a file in a window of so many pixels."""
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self.ask("Page.navigate", url=file.as_uri())
        deadline = time.monotonic() + 30
        while self.value("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < deadline, file
            time.sleep(0.05)

    def value(self, script: str) -> Any:
        """What an expression is in the page."""
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")


@contextmanager
def browser(folder: Path, flags: str = "") -> Iterator[Shown]:
    """A browser with its profile in `folder`. `flags`: further ones."""
    from websockets.sync.client import connect

    assert BROWSER is not None
    command = [BROWSER, f"--user-data-dir={folder}", *shlex.split(flags), *_FLAGS]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            # A browser that does not start must not hold the tests.
            watch = threading.Timer(_SECONDS, process.kill)
            watch.start()
            assert process.stderr is not None
            found = next(filter(None, (re.search(r"listening on (ws://\S+)", line) for line in process.stderr)))
            with connect(found[1], max_size=None, close_timeout=1) as connection:
                yield Shown(connection)
        finally:
            watch.cancel()
            process.kill()
