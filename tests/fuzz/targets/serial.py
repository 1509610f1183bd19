"""Guests that do anything at all to the UART, while its peer, a reset or a handover does something too."""

from __future__ import annotations

from collections.abc import Iterator

from tests.fuzz.reading import Reader
from tests.fuzz.test_fuzz_serial import Guests

SIZES = (1, 2, 4, 8)
READ, WRITE, FAR_READ, FAR_WRITE, PEER, RESET, HANDOVER = range(7)


def one(data: bytes) -> None:
    """Steps: what (1 byte), and what it needs."""
    reader = Reader(data)
    machine = Guests()
    try:
        while reader:
            step(machine, reader)
            machine.indices_stay_inside()
            machine.the_line_follows_the_state()
            machine.input_is_never_forgotten()
    finally:
        machine.teardown()


def step(machine: Guests, reader: Reader) -> None:
    """One step."""
    what = reader.number() % 16
    if what in (READ, FAR_READ):
        offset = reader.number() % 8 if what == READ else reader.number(2)
        size = reader.choice(SIZES)
        assert len(machine.uart.read(offset, size)) == size
    elif what == PEER:
        machine.peer_acts(room=reader.number() % 41, data=reader.bytes(reader.number() % 41))
    elif what == RESET:
        machine.guest_is_reset()
    elif what == HANDOVER:
        machine.hand_over()
    else:  # writes are what changes most, so most steps are one
        offset = reader.number(2) if what == FAR_WRITE else reader.number() % 8
        machine.uart.write(offset, reader.number(8).to_bytes(8, "little")[: reader.choice(SIZES)])


def seeds() -> Iterator[bytes]:
    """A driver's set-up, loopback, input that fills the FIFO, a reset in the middle."""
    quiet = bytes(7)
    setup = b"".join(
        bytes((WRITE, at, value)) + quiet + b"\0" for at, value in ((2, 0xC7), (1, 0x0F), (4, 0x0B))
    )
    echo = bytes((PEER, 40, 40)) + b"x" * 40 + bytes((READ, 0, 0, READ, 2, 0, READ, 5, 0)) * 4
    yield setup + echo + bytes((HANDOVER, RESET)) + setup
    yield bytes((WRITE, 4, 0x1F)) + quiet + b"\0" + bytes((WRITE, 0, 0x41)) + quiet + bytes((0, READ, 6, 0))
    yield bytes((PEER, 0, 5)) + b"hello" + bytes((WRITE, 0, 0x31)) + quiet + bytes((3, FAR_READ, 7, 0, 3, 1))
