"""System calls that Python has no function for."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

from vmm.errors import HostError

PR_SET_NO_NEW_PRIVS: Final = 38  # linux/prctl.h
PR_CAPBSET_DROP: Final = 24
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

# Not there, or switched off at boot, or refused by a sandbox around this one: all mean "not here".
ABSENT: Final = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM})


class Absent(HostError):
    """The kernel does not offer what was asked for."""


def syscall(what: str, number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """The call's result. Raises Absent where the kernel does not have it, HostError for another failure."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    result: int = call(ctypes.c_long(number), *words)
    if result < 0:
        code = ctypes.get_errno()
        kind = Absent if code in ABSENT else HostError
        raise kind(f"{what}: {os.strerror(code)}")
    return result


def prctl(what: str, option: int, *arguments: int) -> None:
    """prctl(2); raises as `syscall`."""
    syscall(what, 157, option, *arguments, *[0] * (4 - len(arguments)))
