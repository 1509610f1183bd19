"""Every error that `vmm` raises on purpose, each with the process exit code it leads to.

The VMM's own exit codes are even, so that none is ever mistaken for a guest's debug-exit status, which is odd
(`(code << 1) | 1`, as QEMU's isa-debug-exit has it). A message is one sentence: what was wrong, where, what
to do.
"""

from __future__ import annotations

from typing import ClassVar


class VmmError(Exception):
    """Base of all errors a user can meet; `exit_code` is what the process ends with if nobody handles it."""

    exit_code: ClassVar[int] = 70  # EX_SOFTWARE of sysexits.h


class UsageError(VmmError):
    """The command line or a call's arguments make no sense (as argparse's own errors do: 2)."""

    exit_code: ClassVar[int] = 2


class ConfigError(VmmError):
    """A configuration value or file cannot be used."""

    exit_code: ClassVar[int] = 4


class ImageError(ConfigError):
    """A guest image is malformed or does not fit the machine."""


class HostError(VmmError):
    """The host lacks something: /dev/kvm, a permission, a capability, memory."""

    exit_code: ClassVar[int] = 6


class GuestCrash(VmmError):
    """The guest ended in a way it cannot have meant: triple fault, failed entry, KVM internal error."""

    exit_code: ClassVar[int] = 8


class GuestHarm(VmmError):
    """A guest that looks after itself found something lost or wrong."""

    exit_code: ClassVar[int] = 14


class HandoverError(VmmError):
    """A handover did not take place; the guest is where the message says it is."""

    exit_code: ClassVar[int] = 10


class StateError(HandoverError):
    """A state memfd, a fd table or a message from the other VMM cannot be trusted or understood."""


class PeerError(HandoverError):
    """The process at the other end of a socket is not who it must be, went away, or did not answer in
    time.
    """
