"""What a machine is made of: the configuration that a TOML file, the command line and the cpr channel carry.

One frozen record; every value in it is checked here, so that nobody further down checks it again. It names no
fd, path to a socket or pid: what belongs to a VMM process and not to the machine stays out, because the
record travels to the next process.
"""

from __future__ import annotations

import ctypes
import os
import tomllib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import msgspec

from vmm.boot.image import EntryMode
from vmm.devices.chardev import parse_serial
from vmm.errors import ConfigError, StateError
from vmm.machine.names import check_name
from vmm.memory import layout
from vmm.memory.guest import GUEST_MEMFD, HUGE_PAGES
from vmm.state import Arena
from vmm.units import MIB, parse_size

MOST_CPUS = 255  # xAPIC ids; 0xff is broadcast
KEPT_BYTES = 16384  # the longest record as JSON
LONGEST_APPEND = 0xDFF  # bytes of the guest's command line, without its NUL (boot contract: 0x6100..0x6EFF)


class MachineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One machine. `memory` is bytes; `kernel` is a path or a prebuilt guest's name."""

    name: str | None = None
    kernel: str | None = None
    entry_mode: Literal["real16", "protected32", "long64"] | None = None
    load_address: int | None = None
    append: str = ""
    memory: int = 128 * MIB
    memory_backend: Literal["memfd", "guest-memfd"] = "memfd"
    hugepages: str | None = None
    cpus: int = 1
    serial: str = "stdio"
    irqchip: Literal["kernel", "split", "none"] = "kernel"
    testdev: bool = False

    def check(self) -> MachineConfig:
        """This record, every value checked. Raises ConfigError that names the value, where it is wrong and
        what is right.
        """
        if self.name is not None:
            check_name(self.name)
        layout(self.memory)
        if self.hugepages is not None and self.hugepages not in HUGE_PAGES:
            raise ConfigError(
                f"hugepages: {self.hugepages!r} is not a page size; use {' or '.join(HUGE_PAGES)}"
            )
        if self.hugepages is not None and self.memory_backend == GUEST_MEMFD:
            raise ConfigError("hugepages: a guest-memfd has none; leave hugepages out or use memfd")
        if not 1 <= self.cpus <= MOST_CPUS:
            raise ConfigError(f"cpus: {self.cpus} is outside 1..{MOST_CPUS}")
        if self.irqchip == "none" and self.cpus > 1:
            raise ConfigError(
                "irqchip: 'none' has no LAPIC to start more vCPUs with; use cpus = 1 or irqchip = \"kernel\""
            )
        if len(self.append.encode()) > LONGEST_APPEND or "\0" in self.append:
            raise ConfigError(f"append: longer than {LONGEST_APPEND} bytes or with a NUL in it")
        parse_serial(self.serial)
        return self

    def boot_mode(self) -> EntryMode | None:
        """The entry mode asked for, None for the image's own."""
        return None if self.entry_mode is None else EntryMode[self.entry_mode.upper()]


def from_mapping(values: Mapping[str, Any], where: str) -> MachineConfig:
    """A checked MachineConfig from plain values; sizes may be text such as `256M`. Raises ConfigError that
    names `where`.
    """
    plain = dict(values)
    if isinstance(plain.get("memory"), str):
        plain["memory"] = parse_size(plain["memory"], f"{where}: memory")
    try:
        return msgspec.convert(plain, MachineConfig).check()
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_lower_first(str(error))}") from error
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error


def read_toml(path: str) -> dict[str, Any]:
    """The plain values of a configuration file. Raises ConfigError with the file's name and the line."""
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {_lower_first(str(error))}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: arrays or tables nested too deeply; a configuration has none") from error
    kernel = values.get("kernel")
    if isinstance(kernel, str) and os.sep in kernel and not os.path.isabs(kernel):
        values["kernel"] = os.path.join(os.path.dirname(os.path.abspath(path)), kernel)
    return values


def encode(config: MachineConfig) -> bytes:
    """The record as JSON, as it travels on the cpr channel."""
    return msgspec.json.encode(config)


def differences(given: Mapping[str, Any], travelling: MachineConfig) -> list[str]:
    """One sentence for each value that the operator gave on the new side and that the old VMM's machine has
    otherwise.
    """
    theirs = msgspec.structs.asdict(travelling)
    return [
        f"{key}: {value!r} was given here, the running machine has {theirs[key]!r}"
        for key, value in given.items()
        if theirs[key] != value
    ]


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


class KeptConfig(ctypes.LittleEndianStructure):
    """The record as JSON in the state memfd, for a VMM that comes after a crash and has nothing else."""

    VERSION: ClassVar[int] = 1
    _fields_ = (("length", ctypes.c_uint32), ("text", ctypes.c_char * KEPT_BYTES))


def keep_config(arena: Arena, config: MachineConfig) -> None:
    """Write the record into the state memfd where it is not there already."""
    kept = arena.place("config", 0, KeptConfig)
    if not kept.length:
        text = encode(config)
        if len(text) > KEPT_BYTES:
            raise ConfigError(
                f"configuration: {len(text)} bytes as JSON, more than the {KEPT_BYTES} there is room for"
            )
        kept.text = text
        kept.length = len(text)


def kept_config(arena: Arena) -> MachineConfig:
    """The record in the state memfd. Raises StateError where there is none, ConfigError where it is no
    good.
    """
    kept = arena.peek("config", 0, KeptConfig)
    text = kept.text
    if not 0 < kept.length <= KEPT_BYTES or len(text) != kept.length:
        raise StateError("state memfd: no machine configuration in it")
    return decode(text, "the kept machine")


def decode(text: bytes, where: str) -> MachineConfig:
    """A checked record from the JSON that `encode` made; ConfigError naming `where` for anything else."""
    try:
        values = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: its configuration cannot be read: {error}") from error
    return from_mapping(values, where)
