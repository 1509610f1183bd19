"""kvmclock in a handover: the guest's clock is a line over the host's TSC, and a new VM is put on the line.

KVM_SET_CLOCK takes effect at a moment that only the kernel knows, so each use misses by some nanoseconds, and
with one use a handover the misses would add up. So the line itself is kept in the state memfd, as it was when
first asked for, and every new VM is set against that line, again until it is near, before the guest is
stopped. A handover is then off by what its own setting missed by and no more, however many there were.

Without a stable TSC in the host KVM does not give the TSC with the clock. Then the line is over the clock
that KVM itself uses, CLOCK_MONOTONIC_RAW with the time of suspends added, as read from here: the miss is
about a microsecond instead of a few nanoseconds, and adds up no more either.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from vmm.kvm import Vm, abi
from vmm.state import Arena

log = logging.getLogger(__name__)

TSC_FLAGS: Final = abi.KVM_CLOCK_TSC_STABLE | abi.KVM_CLOCK_HOST_TSC
SECOND_NS: Final = 1_000_000_000
OVER_NOTHING, OVER_TSC, OVER_BASE = 0, 1, 2  # what the line is over; nothing: the clock was never asked for
NEAR_NS: Final = {OVER_TSC: 8, OVER_BASE: 1_000}  # as near as is tried for at first
SAME_NS: Final = {OVER_TSC: 1_000, OVER_BASE: 10_000}  # a clock nearer than this has not left its line
TRIES: Final = 160
TRIES_BEFORE_LESS: Final = 16  # then twice as far is near enough
BRACKETS: Final = 5


class ClockLine(ctypes.LittleEndianStructure):
    """kvmclock was `clock_ns` when the host's TSC was `host_tsc` and its base clock `base_ns`."""

    VERSION: ClassVar[int] = 1
    _fields_ = (
        ("clock_ns", ctypes.c_uint64),
        ("host_tsc", ctypes.c_uint64),
        ("base_ns", ctypes.c_uint64),
        ("host_khz", ctypes.c_uint32),
        ("over", ctypes.c_uint32),
    )


@dataclass(frozen=True, slots=True)
class Reading:
    """One reading of kvmclock. `host_tsc` and `realtime_ns` are 0 where KVM does not give them."""

    clock_ns: int
    base_ns: int
    host_tsc: int
    realtime_ns: int

    @property
    def over(self) -> int:
        """What a line through it can be over."""
        return OVER_TSC if self.host_tsc else OVER_BASE


@dataclass(frozen=True, slots=True)
class TimeScale:
    """How KVM turns TSC cycles into nanoseconds: kvm_get_time_scale() and pvclock_scale_delta() of Linux."""

    shift: int
    multiplier: int

    @classmethod
    def of(cls, khz: int) -> TimeScale:
        """The scale of a TSC of `khz` kHz."""
        scaled, base, shift = SECOND_NS, khz * 1000, 0
        while base > scaled * 2 or base >> 32:
            base >>= 1
            shift -= 1
        while base <= scaled or scaled >> 32:
            if scaled >> 32 or base >> 31:
                scaled >>= 1
            else:
                base <<= 1
            shift += 1
        return cls(shift, (scaled << 32) // base)

    def nanoseconds(self, cycles: int) -> int:
        """The time of so many cycles, negative for negative ones."""
        if cycles < 0:
            return -self.nanoseconds(-cycles)
        cycles = cycles >> -self.shift if self.shift < 0 else cycles << self.shift
        return cycles * self.multiplier >> 32


class GuestClock:
    """The kvmclock of one VM, and its line in the state memfd."""

    def __init__(self, arena: Arena, vm: Vm, host_khz: int) -> None:
        """`host_khz` is the host's TSC frequency, KVM_GET_TSC_KHZ of a new vCPU; 0: unknown."""
        self.line = arena.place("vm/kvmclock", 0, ClockLine)
        self._vm = vm
        self._host_khz = host_khz
        self._scale = TimeScale.of(host_khz or 1)
        self._missed_ns = 0

    def keep_line(self) -> None:
        """Make sure that the line is the guest's own clock. Before a handover, while the guest runs.

        The kernel takes a clock to another line by itself when it re-reads its own (a host that was
        suspended, a TSC found unstable): that line is the guest's from then on. What the clock's own setting
        missed by is no other line, however much it was: it would add up.
        """
        now, line = self._read(), self.line
        comparable = line.over == now.over and line.host_khz == self._host_khz
        if comparable and abs(self.error_ns(now) - self._missed_ns) <= SAME_NS[line.over]:
            return
        line.over = OVER_NOTHING
        line.clock_ns, line.base_ns, line.host_tsc = now.clock_ns, now.base_ns, now.host_tsc
        line.host_khz = self._host_khz
        line.over = now.over
        self._missed_ns = 0

    def align(self) -> int:
        """Put a new VM's clock on the line, its vCPUs having their TSC offsets; what it misses by, in ns.

        A VM whose clock KVM does not derive from the TSC is put on the line as well as its base clock allows,
        and the log says so.
        """
        if self.line.over == OVER_NOTHING:
            return 0
        now, advance_ns, error_ns = self._read(), 0, 0
        for attempt in range(TRIES):
            now = self._set(now, advance_ns)
            error_ns = self.error_ns(now)
            near_ns = NEAR_NS[max(now.over, self.line.over)]
            if abs(error_ns) <= near_ns << attempt // TRIES_BEFORE_LESS:
                break
            advance_ns -= error_ns
        self._missed_ns = error_ns
        if now.over != self.line.over:
            log.warning(
                "kvmclock: no longer derived from the TSC on this host (KVM_GET_CLOCK gives no host TSC); "
                "it is set to within %d ns instead",
                abs(error_ns),
            )
        return error_ns

    def error_ns(self, reading: Reading | None = None) -> int:
        """How far the clock is ahead of the line, in ns, now or as in `reading`."""
        reading = self._read() if reading is None else reading
        return reading.clock_ns - self._on_line(reading)

    def _on_line(self, reading: Reading) -> int:
        line = self.line
        if line.over == OVER_TSC and reading.host_tsc:
            return int(line.clock_ns) + self._scale.nanoseconds(reading.host_tsc - line.host_tsc)
        return int(line.clock_ns) + reading.base_ns - int(line.base_ns)

    def _set(self, seen: Reading, advance_ns: int) -> Reading:
        """Set the clock to where the line is now, and read it back. `seen` is the latest reading."""
        if seen.realtime_ns:  # the kernel adds what passes until it sets, and knows it better than we could
            data = abi.kvm_clock_data(
                clock=self._on_line(seen) + advance_ns,
                flags=abi.KVM_CLOCK_REALTIME,
                realtime=seen.realtime_ns,
            )
        else:
            data = abi.kvm_clock_data(clock=self._on_line(seen) + _base_ns() - seen.base_ns + advance_ns)
        self._vm.set_clock(data)
        return self._read()

    def _read(self) -> Reading:
        """One reading; where KVM gives no TSC with it, the one of several whose base clock is known best."""
        best: tuple[int, Reading] | None = None
        for width_ns, reading in self._readings():
            if reading.host_tsc:
                return reading
            if best is None or width_ns < best[0]:
                best = width_ns, reading
        assert best is not None
        return best[1]

    def _readings(self) -> Iterator[tuple[int, Reading]]:
        data = abi.kvm_clock_data()
        for _ in range(BRACKETS):
            before_ns = _base_ns()
            self._vm.get_clock(data)
            after_ns = _base_ns()
            stable = self._host_khz and data.flags & TSC_FLAGS == TSC_FLAGS
            yield (
                after_ns - before_ns,
                Reading(
                    clock_ns=data.clock,
                    base_ns=(before_ns + after_ns) // 2,
                    host_tsc=data.host_tsc if stable else 0,
                    realtime_ns=data.realtime if stable and data.flags & abi.KVM_CLOCK_REALTIME else 0,
                ),
            )


def _base_ns() -> int:
    """get_kvmclock_base_ns() of Linux: CLOCK_MONOTONIC_RAW and what the host was suspended."""
    suspended_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW) + suspended_ns
