"""The exits that end a guest: what is reported of each, once, and that the vCPU is not entered again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest

from vmm.bus import Bus
from vmm.errors import GuestCrash
from vmm.kvm import Exit, InternalError, SystemEvent, abi
from vmm.machine.vcpu_thread import VcpuThread

INDEX = 3


class FakeVcpu:
    """Comes out of KVM_RUN once, with what stands in its run page, and then only where it is told to."""

    def __init__(self, run_page: abi.kvm_run) -> None:
        self.index = INDEX
        self.run_page = run_page
        self.immediate_exit = False
        self.entered = 0

    def bind_thread(self) -> None:
        """It is nobody's."""

    def kick(self) -> None:
        """It does not stay in KVM_RUN."""

    def run(self) -> bool:
        self.entered += not self.immediate_exit
        return not self.immediate_exit


class Reports:
    """vmm.machine.vcpu_thread.ExitSink."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self.something = threading.Event()

    def _hear(self, *what: Any) -> None:
        self.heard.append(what)
        self.something.set()

    def guest_reset(self) -> None:
        self._hear("reset")

    def guest_shutdown(self, reason: str) -> None:
        self._hear("shutdown", reason)

    def guest_crashed(self, index: int, error: GuestCrash) -> None:
        self._hear("crash", index, str(error))

    def thread_failed(self, index: int, error: BaseException) -> None:
        self._hear("failed", index, error)


def crash(words: str) -> tuple[Any, ...]:
    return "crash", INDEX, f"vCPU {INDEX}: {words}"


def page(reason: int, **parts: dict[str, Any]) -> abi.kvm_run:
    """A run page with that exit: `page(Exit.FAIL_ENTRY, fail_entry={"cpu": 1})`."""
    run = abi.kvm_run(exit_reason=reason)
    for part, fields in parts.items():
        for name, value in fields.items():
            if isinstance(value, tuple):
                getattr(getattr(run, part), name)[: len(value)] = value
            else:
                setattr(getattr(run, part), name, value)
    return run


def system_event(number: int) -> abi.kvm_run:
    return page(Exit.SYSTEM_EVENT, system_event={"type": number})


def internal(suberror: int, *data: int, ndata: int | None = None) -> abi.kvm_run:
    count = len(data) if ndata is None else ndata
    return page(Exit.INTERNAL_ERROR, internal={"suberror": suberror, "ndata": count, "data": data})


EXITS = {
    "halt": (page(Exit.HLT), ("shutdown", "guest-halt")),
    "triple fault": (page(Exit.SHUTDOWN), crash("triple fault (KVM_EXIT_SHUTDOWN)")),
    "system event: shutdown": (system_event(SystemEvent.SHUTDOWN), ("shutdown", "guest-shutdown")),
    "system event: reset": (system_event(SystemEvent.RESET), ("reset",)),
    "system event: crash": (
        system_event(SystemEvent.CRASH),
        crash("system event 3 (KVM_EXIT_SYSTEM_EVENT)"),
    ),
    "system event: unknown": (system_event(77), crash("system event 77 (KVM_EXIT_SYSTEM_EVENT)")),
    "failed entry": (
        page(Exit.FAIL_ENTRY, fail_entry={"hardware_entry_failure_reason": 0x80000021}),
        crash("the CPU refused to enter the guest, hardware reason 0x80000021 (KVM_EXIT_FAIL_ENTRY)"),
    ),
    "internal error": (
        internal(InternalError.EMULATION),
        crash("KVM internal error: emulation (KVM_EXIT_INTERNAL_ERROR; data: none)"),
    ),
    "internal error with data": (
        internal(InternalError.DELIVERY_EV, 0x80000B0E, 0x31, 0),
        crash("KVM internal error: delivery ev (KVM_EXIT_INTERNAL_ERROR; data: 0x80000b0e 0x31 0x0)"),
    ),
    "internal error with data beyond its room": (
        internal(99, *range(16), ndata=1 << 31),
        crash(
            "KVM internal error: 99 (KVM_EXIT_INTERNAL_ERROR; data: "
            "0x0 0x1 0x2 0x3 0x4 0x5 0x6 0x7 0x8 0x9 0xa 0xb 0xc 0xd 0xe 0xf)"
        ),
    ),
    "one that is not served": (
        page(Exit.HYPERCALL),
        crash("exit reason 3 (hypercall) that this VMM does not serve"),
    ),
    "one that has no name": (page(4711), crash("exit reason 4711 (4711) that this VMM does not serve")),
}


@pytest.fixture
def reports() -> Reports:
    return Reports()


@pytest.fixture
def thread(request: pytest.FixtureRequest, reports: Reports) -> Iterator[VcpuThread]:
    vcpu: Any = FakeVcpu(request.param)
    thread = VcpuThread(
        vcpu, Bus("PIO", 1 << 16), Bus("MMIO", 1 << 52), reports, lambda: True, None, nullcontext()
    )
    thread.start()
    yield thread
    thread.finish()


@pytest.mark.parametrize(("thread", "report"), EXITS.values(), ids=EXITS, indirect=["thread"])
def test_an_exit_that_ends_the_guest(thread: VcpuThread, reports: Reports, report: tuple[Any, ...]) -> None:
    job_ended = threading.Event()
    thread.resume()
    assert reports.something.wait(10.0)
    thread.submit(job_ended.set)
    assert job_ended.wait(10.0)
    assert reports.heard == [report]
    assert thread.vcpu.entered == 1
