"""What a machine does while its vCPUs are being stopped or let go, in a reset, at the end."""

from __future__ import annotations

import threading
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest

from tests.handover.rig import rig
from tests.patience import at_most
from vmm.devices import testdev
from vmm.devices.reset import ResetState
from vmm.errors import VmmError
from vmm.machine.machine import COM1_PORT, RESET_CONTROL_PORT, TESTDEV_PORT, Machine
from vmm.machine.vcpu_thread import VcpuThread

pytestmark = pytest.mark.kvm

AT_ONCE = 40  # bytes: more than the UART's FIFO holds


def printing(call: Any) -> Any:
    """`call`, and before it what a vCPU prints that has not stopped yet, or runs already."""

    def print_and_call(machine: Machine, *arguments: Any) -> Any:
        for _ in range(AT_ONCE):
            machine.pio.write(COM1_PORT, b"#")
        return call(machine, *arguments)

    return print_and_call


@pytest.mark.parametrize("step", ["_save", "_go"])
def test_a_guest_that_looks_at_no_status_bit_is_heard(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for room in the UART, and there was always room so far."""
    out = tmp_path / "out"
    with rig(kernel="ticker", append="rate=1", serial=f"file:{out}") as one:
        monkeypatch.setattr(Machine, step, printing(getattr(Machine, step)))
        for count in range(1, 4):
            one.hand_over()
            assert out.read_bytes().count(b"#") == count * AT_ONCE


def test_devices_are_new_after_a_reset() -> None:
    with rig(kernel="sentinel", append="checks=counter pattern=1M", testdev=True) as one:
        first = one.wait_for(lambda results: True).start_tsc
        machine = one.machine
        machine.stop()
        machine.pio.write(TESTDEV_PORT + testdev.STREAM[0], b"U")
        machine.pio.write(RESET_CONTROL_PORT + 1, b"\x02")
        states = (
            machine.arena.place("testdev", 0, testdev.TestState),
            machine.arena.place("reset", 0, ResetState),
        )
        assert all(any(bytes(state)) for state in states)
        machine.reset()
        assert not any(any(bytes(state)) for state in states)
        machine.cont()
        one.wait_for(lambda results: results.start_tsc > first)


def test_all_else_is_given_back_where_a_vcpu_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(kernel="ticker", append="rate=1") as one:
        machine, over = one.machine, threading.Event()
        machine.threads[0].submit(lambda: over.wait(at_most(20)) and None)
        with monkeypatch.context() as patched:
            patched.setattr(VcpuThread, "finish", partialmethod(VcpuThread.finish, 0.1))
            with pytest.raises(VmmError, match="vCPU 0: its thread did not end"):
                machine.close(for_good=True)
        with pytest.raises(VmmError, match="thaw while closed"):
            machine.chardev.thaw()
        over.set()
