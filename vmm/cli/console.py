"""`vmm console`: this terminal as the guest's serial line, until Ctrl-] is pressed or the VM ends.

The connection belongs to the VM, not to a VMM process: it goes on, unbroken, when the VM is handed over.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

from vmm.errors import HostError, PeerError, UsageError
from vmm.sockets import check_server

LEAVE = b"\x1d"  # Ctrl-]
CHUNK = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vmm console`."""
    parser.add_argument("name", metavar="NAME", help="the VM's name (see 'vmm list')")


def run(arguments: argparse.Namespace) -> int:
    """Connect stdin and stdout to the console."""
    from vmm.cli.rundir import RunDir

    directory = RunDir(arguments.name)
    directory.running()
    if not directory.console.exists():
        raise UsageError(
            f"VM {directory.name!r} has no console socket; run it with --serial unix to have one"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as console:
        try:
            console.connect(str(directory.console))
        except OSError as error:
            raise PeerError(f"cannot connect to {directory.console}: {error.strerror}") from error
        check_server(console, f"console {directory.console}")
        stdin, stdout = sys.stdin.fileno(), sys.stdout.fileno()
        if os.isatty(stdin):
            print("connected; Ctrl-] leaves\r", file=sys.stderr)
        with raw_terminal(stdin):
            left = relay(console, stdin, stdout)
    if not left:
        print("\nvmm: the console was closed", file=sys.stderr)
    return 0


def relay(console: socket.socket, stdin: int, stdout: int) -> bool:
    """Copy both ways until the user leaves (True) or the console closes (False). The end of stdin ends
    nothing.
    """
    poller = select.poll()
    poller.register(console, select.POLLIN)
    poller.register(stdin, select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            if fd == stdin:
                keys = os.read(stdin, CHUNK)
                typed, leave, _ = keys.partition(LEAVE)
                if not keys:
                    poller.unregister(stdin)
                try:
                    console.sendall(typed)
                except OSError:
                    return False
                if leave:
                    return True
                continue
            try:
                said = console.recv(CHUNK)
            except ConnectionResetError:
                said = b""
            if not said:
                return False
            _write_all(stdout, said)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """`fd` in raw mode, where it is a terminal; its mode is restored at the end."""
    if not os.isatty(fd):
        yield
        return
    try:
        before = termios.tcgetattr(fd)
        tty.setraw(fd)
    except termios.error as error:
        raise HostError(f"cannot set the terminal's mode: {error.args[-1]}") from error
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
