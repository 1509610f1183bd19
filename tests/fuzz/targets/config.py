"""Configurations, as TOML files and as an offer's JSON: checked whole, or refused in one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from tests.fuzz.reading import Reader
from vmm.devices.chardev import parse_serial
from vmm.errors import ConfigError
from vmm.machine.config import MOST_CPUS, MachineConfig, decode, differences, encode, from_mapping, read_toml
from vmm.memory import layout
from vmm.units import format_size, parse_size

TOML = b"""name = "a-guest"
kernel = "ticker"
memory = "256M"
cpus = 2
serial = "unix:/run/console"
append = "rate=20"
irqchip = "kernel"
hugepages = "2M"
entry_mode = "long64"
load_address = 0x100000
testdev = false
"""


def one(data: bytes) -> None:
    """Byte 0: TOML, JSON, or a size or serial text; then that."""
    reader = Reader(data)
    read = reader.choice((_toml, _json, _texts))
    content = reader.rest()
    try:
        config = read(content)
    except ConfigError as error:
        sentence = str(error)
        assert sentence
        assert len(sentence) < 1000 + 4 * len(content)
        return
    if config is not None:
        holds(config)


def _toml(content: bytes) -> MachineConfig:
    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, content)
        values: dict[str, Any] = read_toml(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return from_mapping(values, "configuration")


def _json(content: bytes) -> MachineConfig:
    return decode(content, "the old VMM's machine")


def _texts(content: bytes) -> None:
    text = content.decode(errors="surrogateescape")
    try:
        size = parse_size(text)
    except ConfigError:
        assert str(parse_serial(text))
    else:
        assert parse_size(format_size(size)) == size


def holds(config: MachineConfig) -> None:
    """Fails unless what is promised of a checked record holds for `config`."""
    assert decode(encode(config), "again") == config
    assert not differences({}, config)
    assert 1 <= config.cpus <= MOST_CPUS
    assert sum(size for _, size in layout(config.memory)) == config.memory
    config.boot_mode()


def seeds() -> Iterator[bytes]:
    """A full file, a full record, and texts."""
    yield b"\x00" + TOML
    full = MachineConfig(name="a", kernel="/k", memory=1 << 28, cpus=4, serial="file:/x", append="a=b")
    yield b"\x01" + encode(full)
    yield b"\x01" + encode(MachineConfig(hugepages="1G", memory=1 << 33, irqchip="none", load_address=4096))
    yield from (b"\x02" + text for text in (b"64GiB", b"stdio,signal=off", b"unix:/run/a", b"4096"))
