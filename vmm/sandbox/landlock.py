"""Files, by Landlock: what is not granted beneath a path cannot be opened, made or removed. (Kernel
documentation, userspace-api/landlock.rst; numbers from linux/landlock.h.)

What is open already stays open, and memfds, pipes and sockets have no path: they are not concerned.
Connecting to a UNIX socket by its path is not either: to hand a guest over, a VMM connects wherever its
monitor says.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

from vmm.sandbox import kernel

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # asm/unistd_64.h
VERSION: Final = 1  # LANDLOCK_CREATE_RULESET_VERSION
PATH_BENEATH: Final = 1  # LANDLOCK_RULE_PATH_BENEATH
NO_TCP: Final = 1 | 2  # LANDLOCK_ACCESS_NET_BIND_TCP, CONNECT_TCP
ALL_SCOPES: Final = 1 | 2  # LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET, SIGNAL


class Access(IntFlag):
    """LANDLOCK_ACCESS_FS_*, and what a VMM's parts need of them."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15

    READ = READ_FILE | READ_DIR
    DEVICE = READ_FILE | WRITE_FILE | IOCTL_DEV
    SOCKETS = MAKE_SOCK | REMOVE_FILE
    LINKS = SOCKETS | MAKE_SYM


ONLY_FILES: Final = Access.EXECUTE | Access.WRITE_FILE | Access.READ_FILE | Access.TRUNCATE | Access.IOCTL_DEV
_SINCE: Final = {2: Access.REFER, 3: Access.TRUNCATE, 5: Access.IOCTL_DEV}  # ABI -> what it brought


@dataclass(frozen=True)
class Grant:
    """What stays allowed for `path` and, where it is a directory, beneath it."""

    path: str
    access: Access


def abi() -> int:
    """The kernel's Landlock ABI. Raises Absent where there is none."""
    return kernel.syscall("landlock_create_ruleset", CREATE_RULESET, None, 0, VERSION)


def handled(version: int) -> Access:
    """Everything that a kernel of this ABI can restrict."""
    everything = Access((1 << 16) - 1)
    for since, access in _SINCE.items():
        if version < since:
            everything &= ~access
    return everything


def restrict(grants: Iterable[Grant]) -> int:
    """Restrict this thread, and those it starts, to `grants`; the ABI it was done with. Raises HostError,
    Absent.
    """
    fd = ruleset(grants)
    try:
        kernel.syscall("landlock_restrict_self", RESTRICT_SELF, fd, 0)
    finally:
        os.close(fd)
    return abi()


def ruleset(grants: Iterable[Grant]) -> int:
    """An fd that a process restricts itself with. Raises HostError, Absent.

    A granted path that does not exist, or is out of reach, is left out: it stays so.
    """
    version = abi()
    fs = handled(version)
    attributes = struct.pack("=Q", fs)
    if version >= 4:
        attributes += struct.pack("=Q", NO_TCP)
    if version >= 6:
        attributes += struct.pack("=Q", ALL_SCOPES)
    made = kernel.syscall("landlock_create_ruleset", CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for grant in grants:
            _add(made, grant, fs)
    except BaseException:
        os.close(made)
        raise
    return made


def _add(made: int, grant: Grant, fs: Access) -> None:
    try:
        fd = os.open(grant.path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    try:
        access = grant.access & fs
        if not os.path.isdir(grant.path):
            access &= ONLY_FILES
        if access:
            rule = struct.pack("=Qi", access, fd)
            kernel.syscall(f"Landlock rule for {grant.path}", ADD_RULE, made, PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)
