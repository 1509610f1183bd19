"""Guests that mean harm, on a real VMM: it stays up and small, answers its monitor, hands them over."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.handover.stage import Side, Stage, wait_for
from vmm.bus import COUNTED_ADDRESSES

pytestmark = pytest.mark.kvm

MONITOR_S = 1.0  # how long any answer may take, the guest doing its worst
STATUSES = {0, 1, 8}  # powered off; debug-exit 0; crashed: what a guest may bring a VMM to
STARTED = b"\xba\xf8\x03\xb0\x2b\xee"  # mov dx, 0x3f8; mov al, '+'; out dx, al
END = b"\xba\xf4\x00\xb0\x00\xee\xf4"  # mov dx, 0xf4; mov al, 0; out dx, al; hlt


def real_mode(body: bytes, path: Path) -> list[str]:
    """A flat image of 16-bit code, and the options to run it with."""
    path.write_bytes(body)
    return [str(path), "--entry-mode=real16", "--memory=2M"]


def protected_mode(body: bytes, path: Path) -> list[str]:
    """The same of 32-bit code; RAM ends at 0x00200000."""
    path.write_bytes(body)
    return [str(path), "--entry-mode=protected32", "--memory=2M"]


def run(stage: Stage, options: list[str], serial: str = "null") -> Side:
    """A VMM with that guest, which begins once the monitor answers."""
    side = stage.start(*options, "--paused", guest=None, serial=serial)
    side.client.execute("cont")
    return side


def asks(side: Side, command: str = "query-status") -> object:
    """The answer, which may not take long."""
    before = time.monotonic()
    answer = side.client.execute(command)
    assert time.monotonic() - before < MONITOR_S
    return answer


def rss(side: Side) -> int:
    """Resident memory of the VMM in KiB."""
    status = Path(f"/proc/{side.process.pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


@pytest.fixture
def stuck(stage: Stage) -> Iterator[socket.socket]:
    """A console client that never reads, once it is connected to `stage.folder / "console"`."""
    with socket.socket(socket.AF_UNIX) as client:
        yield client


FLOODS = {
    "bytes": b"\xb0\x78\xee\xeb\xfd",  # mov al, 'x'; 1: out dx, al; jmp 1b
    # cld; 1: xor esi, esi; mov ecx, 0x0fffffff; rep outsb with 16-bit addresses; jmp 1b
    "a string": b"\xfc\x66\x31\xf6\x66\xb9\xff\xff\xff\x0f\xf3\x6e\xeb\xf3",
    # interrupts of the transmitter on and off as well
    "bytes and registers": b"\xb0\x0f\x42\xee\x4a\xb0\x78\xee\x42\x30\xc0\xee\x4a\xeb\xf1",
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
@pytest.mark.parametrize("keeper", [False, True], ids=["rebuild", "adopt"])
def test_a_flooded_console_whose_client_is_stuck_holds_up_nobody(
    stage: Stage, tmp_path: Path, stuck: socket.socket, flood: bytes, keeper: bool
) -> None:
    console = stage.folder / "console"
    options = real_mode(b"\xba\xf8\x03" + flood, tmp_path / "flood")
    old = run(stage, [*options, "--keeper" if keeper else "--no-keeper"], f"unix:{console}")
    stuck.connect(str(console))
    wait_for("a full socket", lambda: full(stuck) or None)
    for _ in range(5):
        asks(old)
    small = rss(old)
    new = stage.await_guest()
    outcome = stage.migrate(old, new)
    assert outcome["status"] == "completed", outcome
    wait_for("the guest in the new VMM", lambda: new.state == "running")
    for _ in range(5):
        asks(new)
    assert rss(old) < small + 8 * 1024
    asks(new, "stop")
    asks(new, "cont")
    stuck.settimeout(10)
    got = 0
    while got < 1 << 12:  # it reads again: what waited comes, and more
        got += len(stuck.recv(1 << 16))
    asks(new, "quit")
    assert new.process.wait() == 0


def full(client: socket.socket) -> bool:
    """Whether nothing more fits into what `client` does not read: its queue grows no more."""
    before = waiting(client)
    time.sleep(0.2)
    return 0 < before == waiting(client)


def waiting(client: socket.socket) -> int:
    """Bytes to be read."""
    try:
        return len(client.recv(1 << 22, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return 0


def test_io_at_every_width_to_more_ports_than_are_counted(stage: Stage, tmp_path: Path) -> None:
    """The table of unclaimed ports and the log stay bounded; strings too."""
    sweep = (
        b"\xba\x00\x10"  # mov dx, 0x1000
        b"\xec\xee\xed\xef\x66\xed\x66\xef"  # 1: in and out of al, ax, eax
        b"\xb9\x05\x00\xbf\x00\x20\xbe\x00\x20"  # mov cx, 5; mov di, 0x2000; mov si, 0x2000
        b"\xf3\x6c\xb9\x03\x00\xf3\x6f"  # rep insb; mov cx, 3; rep outsw
        b"\xb9\x02\x00\x66\xf3\x6d"  # mov cx, 2; rep insd
        b"\x42\x81\xfa\xff\x12\x75\xdb"  # inc dx; cmp dx, 0x12ff; jne 1b
    )
    side = run(stage, real_mode(b"\xfc" + STARTED + sweep + b"\xeb\xfe", tmp_path / "sweep"))

    def swept() -> bool:
        stats = side.client.execute("x-vmm-stats")
        return "0x12fe" in str(stats) or stats["unclaimed"]["PIO"]["elsewhere"] > 8 * 500

    wait_for("the sweep", swept)
    stats = side.client.execute("x-vmm-stats")["unclaimed"]["PIO"]
    assert len(stats) <= COUNTED_ADDRESSES + 1  # and "elsewhere"
    assert stats["elsewhere"] > 0
    assert side.process.stderr.count("no device claims") <= COUNTED_ADDRESSES
    assert stage.migrate(side, stage.await_guest())["status"] == "completed"


def test_memory_accesses_over_the_edges(stage: Stage, tmp_path: Path) -> None:
    """Every width, over the end of RAM and of nothing; reads, writes, exchanges, strings."""
    body = bytearray(b"\xfc")
    for address in (0x001FFFFE, 0x001FFFFF, 0x00200000, 0xFED10FFE, 0xFED0FFFF, 0xFEC00001, 0xFFFFFFFC):
        body += b"\xbb" + address.to_bytes(4, "little")  # mov ebx, address
        body += b"\x88\x03\x66\x89\x03\x89\x03\x8a\x03\x66\x8b\x03\x8b\x03"  # mov [ebx], al, ax, eax and back
        body += b"\x87\x03\xff\x03\x83\x03\x01"  # xchg [ebx], eax; inc dword [ebx]; add dword [ebx], 1
        body += (
            b"\x89\xde\xbf\x00\x80\x10\x00\xb9\x02\x00\x00\x00\xf3\xa5"  # mov esi, ebx; to 0x108000, 2 dwords
        )
        body += b"\x89\xdf\xbe\x00\x80\x10\x00\xb9\x03\x00\x00\x00\xf3\xa4"  # and 3 bytes the other way
    side = run(stage, [*protected_mode(bytes(body) + b"\x66" + END, tmp_path / "edges"), "--testdev"])
    assert side.process.wait() in STATUSES, side.process.output()
    assert "Traceback" not in side.process.stderr


def test_resets_without_end(stage: Stage, tmp_path: Path) -> None:
    """A guest that does nothing but reset itself can still be asked about, stopped, handed over and ended."""
    old = run(stage, real_mode(b"\xb0\xfe\xe6\x64\xeb\xfe", tmp_path / "reset"))  # mov al, 0xfe; out 0x64, al

    def resets(side: Side) -> int:
        count: int = side.client.execute("x-vmm-stats")["resets"]
        return count

    wait_for("a few resets", lambda: resets(old) > 20)
    asks(old)
    new = stage.await_guest()
    outcome = stage.migrate(old, new)
    assert outcome["status"] == "completed", outcome
    seen = resets(new)
    wait_for("more resets in the new VMM", lambda: resets(new) > seen + 5)
    asks(new, "stop")
    assert len(new.process.stderr.splitlines()) < 20
    asks(new, "quit")
    assert new.process.wait() == 0


@pytest.mark.parametrize("seed", range(6))
def test_guests_of_random_bytes(stage: Stage, tmp_path: Path, seed: int) -> None:
    """Whatever they do, the VMM ends as a VMM ends, or goes on and answers."""
    source = random.Random(seed)
    body = b"".join(
        source.choice(
            (
                source.randbytes(3),
                b"\xba"
                + source.randbytes(2)
                + source.choice((b"\xee", b"\xef", b"\x66\xef", b"\xec", b"\x6e", b"\xf3\x6c")),
                b"\xe6" + source.randbytes(1),
                b"\xa3" + source.randbytes(2),
            )
        )
        for _ in range(150)
    )
    side = run(stage, real_mode(body[:900] + END, tmp_path / "random"), serial=f"file:{stage.folder}/noise")
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline and side.process.popen.poll() is None:
        time.sleep(0.05)
    if side.process.popen.poll() is None:
        asks(side)
        asks(side, "quit")
        assert side.process.wait() == 0
    elif not side.process.popen.returncode & 1:  # an odd one is the guest's own, from debug-exit
        assert side.process.popen.returncode in STATUSES, side.process.output()
    assert "Traceback" not in side.process.stderr
