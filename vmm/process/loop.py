"""The main thread's event loop, as the other threads see it, and the process's end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from vmm.errors import PeerError

T = TypeVar("T")

ANSWER_S = 1.0  # for the loop's thread to begin with something
FINISH_S = 5.0  # and to be done with it


class Loop:
    """Runs until somebody says `end`."""

    def __init__(self) -> None:
        self.asyncio = asyncio.new_event_loop()
        self._status: asyncio.Future[int] = self.asyncio.create_future()

    @property
    def ending(self) -> bool:
        """Whether `end` was said."""
        return self._status.done()

    def end(self, status: int) -> None:
        """End the process with this exit status, unless it is ending already. The loop's thread."""
        if not self._status.done():
            self._status.set_result(status)

    def run(self) -> int:
        """The exit status, once there is one."""
        return self.asyncio.run_until_complete(self._status)

    def close(self) -> None:
        """Wait for what runs in the loop's executor; what is posted from here on is dropped."""
        self.asyncio.run_until_complete(self.asyncio.shutdown_default_executor())
        self.asyncio.close()

    @property
    def closed(self) -> bool:
        """Whether nothing runs on it any more."""
        return self.asyncio.is_closed()

    def post(self, call: Callable[..., None], *arguments: Any) -> None:
        """Have the loop's thread do that. Any thread."""
        if not self.closed:
            self.asyncio.call_soon_threadsafe(call, *arguments)

    def ask(self, call: Callable[[], T]) -> T:
        """What `call` returns on the loop's thread. Raises PeerError where the loop does not come to it, or
        not to its end. Any other thread.
        """
        future: Future[T] = Future()

        def answer() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except Exception as error:  # noqa: BLE001 -- raised in the thread that asked
                    future.set_exception(error)

        self.post(answer)
        try:
            return future.result(ANSWER_S)
        except TimeoutError:
            if future.cancel():
                raise PeerError("the monitor is busy") from None
        try:
            return future.result(FINISH_S)
        except TimeoutError:
            raise PeerError("the monitor does not come to an end with it") from None
