"""A VMM in memory for the monitor's tests: it answers, records its calls, and refuses when told to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from vmm.qmp.schema import MigrationMode, UnixSocket
from vmm.qmp.server import QmpServer

_T = TypeVar("_T")


class RecordingBackend:
    """A Backend. `calls` holds what was asked for; `raises` is what such a call raises, if anything."""

    def __init__(self, mode: str = "cpr-transfer") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.raises: Exception | None = None
        self.mode = mode
        self.running = True
        self.guest_name: str | None = "guest"
        self.ram = bytes(range(256)) * 4096
        self.emit: Callable[..., None] = lambda *_: None

    def _record(self, *call: Any) -> None:
        self.calls.append(call)
        if self.raises is not None:
            raise self.raises

    def status(self) -> tuple[str, bool]:
        return ("running" if self.running else "paused"), self.running

    def name(self) -> str | None:
        return self.guest_name

    def cpus(self) -> list[tuple[int, int]]:
        return [(0, 937), (1, 938)]

    def memory_size(self) -> int:
        return len(self.ram)

    def stop(self) -> None:
        self._record("stop")
        self.running = False
        self.emit("STOP")

    def cont(self) -> None:
        self._record("cont")
        self.running = True
        self.emit("RESUME")

    def quit(self) -> None:
        self._record("quit")
        self.emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})

    def reset(self) -> None:
        self._record("reset")

    def inject_nmi(self) -> None:
        self._record("inject_nmi")

    def migration_parameters(self) -> dict[str, Any]:
        return {"mode": self.mode, "x-vmm-setup-timeout": 5000}

    def set_migration_parameters(self, values: dict[str, Any]) -> None:
        self._record("set_migration_parameters", values)
        self.mode = values.get("mode", self.mode)

    def migration_capabilities(self) -> dict[str, bool]:
        return {"events": False}

    def set_migration_capabilities(self, values: dict[str, bool]) -> None:
        self._record("set_migration_capabilities", values)

    def migrate(self, mode: MigrationMode, main: UnixSocket, cpr: UnixSocket) -> None:
        self._record("migrate", mode, main, cpr)

    def migrate_cancel(self) -> None:
        self._record("migrate_cancel")

    def migrate_incoming(self, main: UnixSocket) -> None:
        self._record("migrate_incoming", main)

    def query_migrate(self) -> dict[str, Any]:
        return {"status": "completed", "downtime": 2}

    def report(self) -> dict[str, Any]:
        return {"mode": "rebuild"}

    def read_memory(self, gpa: int, size: int) -> bytes:
        self._record("read_memory", gpa, size)
        return self.ram[gpa : gpa + size]

    def guest_clock(self) -> dict[str, Any]:
        return {"tsc": 1 << 63}

    def fds(self) -> list[dict[str, Any]]:
        return [{"name": "ram", "id": 0, "fd": 7}]

    def stats(self) -> dict[str, Any]:
        return {"exits": 3}


class ServerThread:
    """A QmpServer on a loop in a thread of its own, for the length of a `with`."""

    def __init__(self, backend: RecordingBackend, path: str | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="monitor")
        self.backend = backend
        self.server = QmpServer(self._loop, backend)
        backend.emit = self.server.emit
        self._path = path

    def __enter__(self) -> ServerThread:
        self._thread.start()
        if self._path is not None:
            path = self._path
            self.call(lambda: self.server.listen_unix(path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.call(self.server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, function: Callable[[], _T], timeout: float = 10.0) -> _T:
        """`function()` on the loop's thread."""

        async def run() -> _T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(timeout)
