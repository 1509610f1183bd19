"""When Ctrl-C, SIGTERM and SIGHUP take effect in a verb that has something to clean up.

For the main thread.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interruptible() -> None:
    """Have SIGTERM and SIGHUP end this process as Ctrl-C does: nothing stays behind."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup(1) has it
            signal.signal(number, signal.default_int_handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """An interrupt (Ctrl-C) takes effect at the end of this, so that it is known who has the guest; a second
    one does at once.
    """
    numbers: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if numbers:
            raise KeyboardInterrupt
        numbers.append(number)

    before = {number: signal.signal(number, note) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if numbers:
        signal.raise_signal(numbers[0])
