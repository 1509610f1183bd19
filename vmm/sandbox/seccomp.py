"""System calls, by seccomp: a table of rules as a classic BPF program. (Kernel documentation,
userspace-api/seccomp_filter.rst; numbers from linux/seccomp.h, linux/filter.h, linux/bpf_common.h.)

A program is tried from its start for each call. Rules that look at no argument cost nothing: the kernel finds
them out when the filter is installed, and remembers.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from vmm.errors import VmmError
from vmm.sandbox import kernel
from vmm.sandbox.syscalls import NUMBERS, SECCOMP

AUDIT_ARCH_X86_64: Final = 0xC000003E  # linux/audit.h
X32: Final = 0x40000000  # __X32_SYSCALL_BIT: another ABI's numbers
SET_MODE_FILTER, GET_ACTION_AVAIL = 1, 2
FLAG_TSYNC: Final = 1

# classic BPF: loads of struct seccomp_data's words, AND, jump if equal or not less, return
LOAD, AND, JEQ, JGE, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
NR, ARCH, ARGUMENTS = (
    0,
    4,
    16,
)  # offsets in struct seccomp_data; arguments are u64, their low half comes first
LONGEST_JUMP: Final = 255
_INSTRUCTION: Final = struct.Struct("=HBBI")
_PROGRAM: Final = struct.Struct("=H6xQ")  # struct sock_fprog


class Action(IntEnum):
    """SECCOMP_RET_*; ERRNO is or-ed with the errno."""

    KILL_PROCESS = 0x80000000
    ERRNO = 0x00050000
    LOG = 0x7FFC0000
    ALLOW = 0x7FFF0000


@dataclass(frozen=True)
class Where:
    """A condition: the low 32 bits of argument `index`, masked, are `value`.

    That is all of the argument for the ones in use: the kernel takes them as int or unsigned int, or what is
    looked at are flags in the low half.
    """

    index: int
    value: int
    mask: int = 0xFFFFFFFF


@dataclass(frozen=True)
class Rule:
    """What happens to a system call: `action` where it meets one of `conditions` or there are none, else
    `unmet` (None: what happens to calls without a rule).
    """

    call: str
    conditions: tuple[Where, ...] = ()
    action: int = Action.ALLOW
    unmet: int | None = None


def assemble(rules: Iterable[Rule], otherwise: int) -> bytes:
    """The program of `rules`, one for each call; `otherwise` is for calls and arguments without one.

    Another architecture's call numbers always end the process.
    """
    code = [
        _INSTRUCTION.pack(LOAD, 0, 0, ARCH),
        _INSTRUCTION.pack(JEQ, 1, 0, AUDIT_ARCH_X86_64),
        _INSTRUCTION.pack(RETURN, 0, 0, Action.KILL_PROCESS),
        _INSTRUCTION.pack(LOAD, 0, 0, NR),
        _INSTRUCTION.pack(JGE, 0, 1, X32),
        _INSTRUCTION.pack(RETURN, 0, 0, Action.KILL_PROCESS),
    ]
    seen: set[str] = set()
    for rule in rules:
        if rule.call in seen:
            raise VmmError(f"seccomp: {rule.call} has two rules")
        seen.add(rule.call)
        body = _body(rule, otherwise)
        if len(body) > LONGEST_JUMP:
            raise VmmError(f"seccomp: {rule.call} has more conditions than a jump reaches over")
        code += [_INSTRUCTION.pack(JEQ, 0, len(body), NUMBERS[rule.call]), *body]
    code.append(_INSTRUCTION.pack(RETURN, 0, 0, otherwise))
    return b"".join(code)


def _body(rule: Rule, otherwise: int) -> list[bytes]:
    taken = _INSTRUCTION.pack(RETURN, 0, 0, rule.action)
    if not rule.conditions:
        return [taken]
    body: list[bytes] = []
    loaded: int | None = None
    for where in rule.conditions:
        if loaded != where.index:
            body.append(_INSTRUCTION.pack(LOAD, 0, 0, ARGUMENTS + 8 * where.index))
            loaded = where.index
        if where.mask != 0xFFFFFFFF:
            body.append(_INSTRUCTION.pack(AND, 0, 0, where.mask))
            loaded = None
        body += [_INSTRUCTION.pack(JEQ, 0, 1, where.value), taken]
    return [*body, _INSTRUCTION.pack(RETURN, 0, 0, otherwise if rule.unmet is None else rule.unmet)]


def require(*actions: Action) -> None:
    """Raises Absent where the kernel does not know seccomp filters or one of `actions`."""
    for action in actions:
        word = struct.pack("=I", action)
        kernel.syscall(f"seccomp action {action.name}", SECCOMP, GET_ACTION_AVAIL, 0, word)


def install(program: bytes) -> None:
    """Filter every thread of this process with `program`, from here on and for good. Raises HostError,
    Absent.
    """
    code = ctypes.create_string_buffer(program, len(program))
    header = _PROGRAM.pack(len(program) // _INSTRUCTION.size, ctypes.addressof(code))
    failed = kernel.syscall("seccomp", SECCOMP, SET_MODE_FILTER, FLAG_TSYNC, header)
    if failed:
        raise VmmError(f"seccomp: thread {failed} has a filter of its own")
