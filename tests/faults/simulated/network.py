"""An object store behind a network that delays, loses, and loses answers, in fsspec's words for `RemoteObjects`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from smoltulu.artifacts.shared.objects import RemoteObjects
from tests.faults.simulated.world import Killed, ShortWrite, World, here

#: Seconds after which a client gives a request up.
_PATIENCE = 10.0


class Server:
    """Objects by name, strongly consistent, with conditional creation, as S3.

    share_lost   of the requests: never arrive, arrive late, or are answered in vain
    cut_off      machines -> from when to when they reach nothing
    """

    def __init__(self, world: World, share_lost: float) -> None:
        self.world, self.share_lost = world, share_lost
        self.objects: dict[str, bytes] = {}
        self.cut_off: dict[str, tuple[float, float]] = {}
        self._late: list[tuple[float, Callable[[], Any]]] = []

    def client(self, url: str) -> RemoteObjects:
        """What a process holds of it."""
        objects = RemoteObjects(url, "s3")
        objects.__dict__["_files"] = _Client(self)
        return objects

    def request(self, what: str, action: Callable[[], Any]) -> Any:
        world, rng = self.world, self.world.rng
        try:
            with contextlib.suppress(ShortWrite):  # planned for a write
                world.step(f"request {what}")
            world.sleep(rng.uniform(0.01, 0.3))
        except Killed:
            # What was sent may arrive though the sender is dead.
            if rng.random() < 0.5:
                self._late.append((world.now + rng.uniform(0, 30), action))
            raise
        self.deliver()
        start, end = self.cut_off.get(here().process.machine.name, (0.0, 0.0))
        is_lost = rng.random() < self.share_lost
        if start <= world.now < end or (is_lost and rng.random() < 0.3):
            world.sleep(_PATIENCE)
            raise TimeoutError("no answer")
        if is_lost and rng.random() < 0.5:
            self._late.append((world.now + rng.uniform(0, 30), action))
            world.sleep(_PATIENCE)
            raise TimeoutError("no answer")
        answer = action()
        if is_lost:
            raise ConnectionResetError("the answer was lost")
        return answer

    def deliver(self) -> None:
        """Requests that were under way."""
        due = sorted((one for one in self._late if one[0] <= self.world.now), key=lambda one: one[0])
        self._late = [one for one in self._late if one[0] > self.world.now]
        for _, action in due:
            with contextlib.suppress(OSError):
                action()


class _Client:
    def __init__(self, server: Server) -> None:
        self.server, self.objects = server, server.objects

    def invalidate_cache(self) -> None:
        pass

    def find(self, folder: str, detail: bool) -> dict[str, Any]:
        def answer() -> dict[str, Any]:
            names = [name for name in self.objects if name.startswith(f"{folder}/")]
            return {name: {"type": "file", "size": len(self.objects[name])} for name in names}

        return self.server.request("list", answer)

    def cat_file(self, path: str) -> bytes:
        def answer() -> bytes:
            if path not in self.objects:
                raise FileNotFoundError(path)
            return self.objects[path]

        return self.server.request("get", answer)

    def pipe_file(self, path: str, data: bytes, mode: str = "overwrite") -> None:
        def answer() -> None:
            if mode == "create" and path in self.objects:
                raise FileExistsError(path)
            self.objects[path] = bytes(data)

        self.server.request(f"put {path.rpartition('/')[2][-13:]}", answer)

    def rm_file(self, path: str) -> None:
        self.server.request("delete", lambda: self.objects.pop(path, None))
