"""UNIX sockets as every part of the VMM makes them: private from birth, stale files replaced, peers
looked at.
"""

from __future__ import annotations

import os
import socket
import stat
import struct

from vmm.errors import ConfigError, PeerError

PATH_BYTES = 108  # sockaddr_un.sun_path with its NUL
BACKLOG = 16
_UCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid


def listen(path: str, what: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """A non-blocking listening socket at `path`, mode 0600. A file that a dead listener left there is
    replaced.

    Raises ConfigError that begins with `what`: the path is too long, a listener lives there, something else
    is there, or what bind(2) says.
    """
    size = len(os.fsencode(path))
    if not 0 < size < PATH_BYTES:
        raise ConfigError(
            f"{what}: socket path {path} has {size} bytes; a socket address holds 1 to {PATH_BYTES - 1}"
        )
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        _clear(path, what, kind)
        # the file gets the socket inode's mode (unix_bind_bsd, net/unix/af_unix.c): private at once, and
        # without the umask, which is the whole process's
        os.fchmod(sock.fileno(), stat.S_IRUSR | stat.S_IWUSR)
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"{what}: cannot listen at {path}: {error.strerror}; choose another path"
        ) from error
    except BaseException:
        sock.close()
        raise
    return sock


def _clear(path: str, what: str, kind: socket.SocketKind) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{what}: {path} exists and is no socket; choose another path")
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # its backlog is full: it lives
    raise ConfigError(f"{what}: a running process listens at {path}; choose another path or end that process")


def peer(sock: socket.socket) -> tuple[int, int]:
    """`(pid, uid)` of the process at the other end of a connected UNIX socket (SO_PEERCRED)."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def check_peer(sock: socket.socket, what: str) -> int:
    """The peer's pid. Raises PeerError where it runs as another user (root excepted)."""
    pid, uid = peer(sock)
    if uid not in (os.geteuid(), 0):
        raise PeerError(
            f"{what}: the peer, process {pid}, is uid {uid}; only uid {os.geteuid()} and root may connect"
        )
    return pid


def check_server(sock: socket.socket, what: str) -> int:
    """The pid of who listens where we connected. Raises PeerError where that is another user, who could be
    told what is not his: root is served by all, and root asks all.
    """
    pid, uid = peer(sock)
    if uid not in (os.geteuid(), 0) and os.geteuid() != 0:
        raise PeerError(
            f"{what}: process {pid}, which listens there, is uid {uid}; only uid {os.geteuid()} and root are "
            "spoken to"
        )
    return pid
