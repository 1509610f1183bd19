"""QEMU's own cpr-transfer, measured as ours is: the same guest image, the same kind of pause, the same
control window.

The guest is booted by a small ROM and QEMU's generic loader, without QEMU knowing of it. Its results area is
read out of the RAM memfd, and its clock is told from the TSC that it writes there in every turn.
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vmm.boot.image import find_image, load_image
from vmm.boot.x86 import BootFlags, prepare_memory
from vmm.cli.handover import unix_channel
from vmm.cli.series import CONTROL_AFTER_S, SETTLE_S, Step
from vmm.errors import HostError, PeerError
from vmm.memory import layout
from vmm.qmp.client import QmpClient
from vmm.report.pause import ClockPoint, Window, largest_gap_us
from vmm.report.results import (
    CPU_SIZE,
    HEADER_SIZE,
    CpuLayout,
    GuestState,
    Results,
    ResultsError,
    parse_results,
)

QEMU = "qemu-system-x86_64"
OLDEST = (10, 0)
START_S = 20.0
CPU_MODEL = "host,-arch-capabilities"  # the MSR that this names is what QEMU cannot set on some hosts
ROM_BYTES = 1 << 16
CLOCK_READINGS = 200
LAST_TSC = HEADER_SIZE + CpuLayout.last_tsc.offset


def qemu_version() -> tuple[int, int]:
    """QEMU's version. Raises HostError where there is none that has cpr-transfer."""
    program = shutil.which(QEMU)
    if program is None:
        raise HostError(f"there is no {QEMU}; install QEMU 10 or later (Debian 12: from bookworm-backports)")
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", said)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version < OLDEST:
        raise HostError(f"{program} is version {version[0]}.{version[1]}; cpr-transfer needs 10.0 or later")
    return version


def build_rom(folder: Path, entry: int) -> Path:
    """Assemble the boot ROM. Raises HostError where there is no gcc."""
    if shutil.which("gcc") is None:
        raise HostError("there is no gcc to assemble QEMU's boot ROM with; install gcc")
    source = Path(__file__).with_name("qemu_boot.S")
    linked, rom = folder / "boot.elf", folder / "boot.rom"
    flags = ["-nostdlib", "-static", "-Wl,-Ttext=0,--build-id=none,-no-pie", f"-DENTRY={entry:#x}"]
    subprocess.run(["gcc", *flags, "-o", linked, source], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", linked, rom], check=True)
    if rom.stat().st_size != ROM_BYTES:
        raise HostError(
            f"the boot ROM has {rom.stat().st_size} bytes, not {ROM_BYTES}: another assembler is needed"
        )
    return rom


class QemuSeries:
    """A context like `vmm.cli.series.Series`: `hand_over` moves the guest to a new QEMU process and
    measures.
    """

    def __init__(self, *, memory: int, append: str, tsc_khz: int) -> None:
        """`tsc_khz` is the guest's, as KVM has it for any guest here."""
        self._memory = memory
        self._append = append
        self._tsc_khz = tsc_khz
        self._numbers = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="vmm-bench-"))
        try:
            self._prepare()
            self._process, monitor = self._start([])
            self._client = self._connect(self._process, monitor)
            self._map_ram(self._process.pid)
            self._wait_running()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()
        self._ram.close()
        self._close()

    def _close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder)

    def _prepare(self) -> None:
        """The ROM, and a file for each stretch of memory that the boot contract wants filled."""
        regions = layout(self._memory)
        image = load_image(find_image("sentinel"), ram=regions)
        assert image.results is not None
        self._results_gpa = image.results[0]
        writes: list[tuple[int, bytes]] = []
        prepare_memory(
            lambda gpa, data: writes.append((gpa, bytes(data))),
            image,
            ram_below_4g=regions[0][1],
            ram_above_4g=regions[1][1] if len(regions) > 1 else 0,
            cpus=1,
            tsc_khz=self._tsc_khz,
            flags=BootFlags.IRQCHIP | BootFlags.PIT,
            cmdline=self._append,
        )
        self._machine = ["-bios", str(build_rom(self.folder, image.entry))]
        for number, (gpa, data) in enumerate(writes):
            blob = self.folder / f"blob{number}"
            blob.write_bytes(data)
            self._machine += ["-device", f"loader,file={blob},addr={gpa:#x},force-raw=on"]

    def _start(self, incoming: list[str]) -> tuple[subprocess.Popen[bytes], Path]:
        monitor = self.folder / f"qmp{next(self._numbers)}"
        megabytes = self._memory >> 20
        command = [
            QEMU,
            *("-accel", "kvm", "-cpu", CPU_MODEL, "-nodefaults", "-display", "none", "-serial", "null"),
            *("-machine", "pc,memory-backend=ram0,aux-ram-share=on", "-m", f"{megabytes}M"),
            *("-object", f"memory-backend-memfd,id=ram0,size={megabytes}M,share=on"),
            *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
            *("-qmp", f"unix:{monitor},server=on,wait=off"),
            *self._machine,
            *incoming,
        ]
        log = self.folder / "log"
        with log.open("ab") as output:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output), monitor

    def _connect(self, process: subprocess.Popen[bytes], monitor: Path) -> QmpClient:
        deadline = time.monotonic() + START_S
        while True:
            try:
                client = QmpClient.connect(monitor, START_S)
            except PeerError:
                if process.poll() is not None or time.monotonic() > deadline:
                    said = (self.folder / "log").read_text(errors="replace").strip()
                    raise HostError(f"{QEMU} does not come up: {said}") from None
                time.sleep(0.01)
                continue
            events = {"capabilities": [{"capability": "events", "state": True}]}
            client.execute("migrate-set-capabilities", events)
            return client

    def _map_ram(self, pid: int) -> None:
        """Map the guest's RAM from its first byte: the memfd outlives the QEMU that made it."""
        for name in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{name}"
            if os.readlink(path).startswith("/memfd:memory-backend-memfd"):
                fd = os.open(path, os.O_RDONLY)
                try:
                    size = self._results_gpa + HEADER_SIZE + CPU_SIZE
                    self._ram = mmap.mmap(fd, size, prot=mmap.PROT_READ)
                finally:
                    os.close(fd)
                return
        raise HostError(f"{QEMU} (pid {pid}) has no memfd for its RAM")

    def _wait_running(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                if self.results().state is GuestState.RUNNING:
                    return
            except ResultsError as error:
                if time.monotonic() > deadline:
                    raise HostError(f"the guest does not start in {QEMU}: {error}") from error
            time.sleep(0.02)

    # --- what the guest says ---

    def results(self) -> Results:
        """The guest's results area as it is now."""
        end = self._results_gpa + HEADER_SIZE + CPU_SIZE
        return parse_results(self._ram[self._results_gpa : end])

    def _last_tsc(self) -> int:
        at = self._results_gpa + LAST_TSC
        return int.from_bytes(self._ram[at : at + 8], "little")

    def clock(self) -> ClockPoint:
        """The guest's clock: the reading of its TSC that came soonest after the one before was seen."""
        best: ClockPoint | None = None
        for _ in range(CLOCK_READINGS):
            seen = self._last_tsc()
            while True:
                before = time.monotonic_ns()
                if (tsc := self._last_tsc()) != seen:
                    break
            now = time.monotonic_ns()
            if best is None or now - before < best.uncertainty_ns:
                best = ClockPoint(now, now - before, tsc, self._tsc_khz)
        assert best is not None
        return best

    def largest_gap_us(self, window: Window) -> float:
        """The largest gap that the guest noted in `window`."""
        return largest_gap_us(self.results(), self.clock(), window)

    # --- the series ---

    def hand_over(self) -> Step:
        """Hand the guest over to a new QEMU and measure. QEMU's window is from its STOP to its RESUME."""
        assert self._process is not None
        number = next(self._numbers)
        main, cpr = self.folder / f"main{number}", self.folder / f"cpr{number}"
        channel = '{{"channel-type":"{}","addr":{{"transport":"socket","type":"unix","path":"{}"}}}}'
        incoming = ["-incoming", channel.format("main", main), "-incoming", channel.format("cpr", cpr)]
        new, monitor = self._start(incoming)
        try:
            self._wait_listening(new, cpr)
            old = self._client
            old.execute("migrate-set-parameters", {"mode": "cpr-transfer"})
            old.execute("migrate", {"channels": [unix_channel("main", main), unix_channel("cpr", cpr)]})
            client = self._connect(new, monitor)
            while old.wait_event("MIGRATION", START_S).data["status"] != "completed":
                pass
            stopped = old.wait_event("STOP", START_S).at_us
            resumed = client.wait_event("RESUME", START_S).at_us
            old.execute("quit")
            old.close()
            self._process.wait(START_S)
        except BaseException:
            new.kill()
            new.wait()
            raise
        self._process, self._client = new, client
        to_monotonic = time.monotonic_ns() - time.time_ns()
        window = Window(stopped * 1000 + to_monotonic, resumed * 1000 + to_monotonic)
        time.sleep(SETTLE_S)
        guest_us = self.largest_gap_us(window)
        report: dict[str, Any] = {"phases-us": {}}
        return Step(report, window, guest_us, self.control_us(window.length_ns))

    def _wait_listening(self, process: subprocess.Popen[bytes], path: Path) -> None:
        """Wait for a listener at `path`, without taking its one connection."""
        deadline = time.monotonic() + START_S
        listening = re.compile(rf"00010000 \d+ +\d+ +\d* ?{re.escape(str(path))}$", re.MULTILINE)
        while not listening.search(Path("/proc/net/unix").read_text()):
            if process.poll() is not None or time.monotonic() > deadline:
                said = (self.folder / "log").read_text(errors="replace").strip()
                raise HostError(f"{QEMU} does not listen at {path}: {said}")
            time.sleep(0.01)

    def control_us(self, length_ns: int) -> float:
        """The largest gap in a window of the same length at a random moment without a handover."""
        time.sleep(random.uniform(*CONTROL_AFTER_S))
        start = time.monotonic_ns()
        time.sleep(length_ns / 1e9 + SETTLE_S)
        return self.largest_gap_us(Window(start, start + length_ns))
