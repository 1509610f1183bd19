"""Where named VMs live: `$XDG_RUNTIME_DIR/vmm/NAME/`, or a private directory under /tmp. Directories 0700,
sockets 0600.

NAME/qmp.sock       -> the monitor of the VMM that runs the guest (a symlink, replaced in one step by whoever
takes over) NAME/qmp-PID.sock   the monitor of process PID NAME/console.sock   the console, where the
machine's serial line is `unix` NAME/vmm.log        the log of VMMs started by `vmm handover`
"""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from vmm.errors import ConfigError, HostError, UsageError
from vmm.machine.names import check_name
from vmm.sandbox import Access, Grant
from vmm.sockets import peer


def base() -> Path:
    """The private directory of this user's VMs, made if needed. Raises HostError where it cannot be or is not
    private.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(runtime) / "vmm" if runtime else Path("/tmp") / f"vmm-{os.geteuid()}"
    return _private(path)


def _private(path: Path) -> Path:
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        info = path.lstat()
    except OSError as error:
        raise HostError(f"{path} cannot be made: {error.strerror}; set XDG_RUNTIME_DIR to another") from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise HostError(f"{path} is not a private directory of this user; remove it or set XDG_RUNTIME_DIR")
    return path


class RunDir:
    """The directory of one named VM."""

    def __init__(self, name: str) -> None:
        self.name = check_name(name)
        self.path = base() / name

    def make(self) -> RunDir:
        """Make the directory if needed."""
        _private(self.path)
        return self

    @property
    def qmp(self) -> Path:
        """The monitor of the VMM that runs the guest."""
        return self.path / "qmp.sock"

    @property
    def console(self) -> Path:
        """The console's socket."""
        return self.path / "console.sock"

    @property
    def log(self) -> Path:
        """The log of VMMs without a terminal."""
        return self.path / "vmm.log"

    def own_qmp(self) -> Path:
        """The monitor of this process."""
        return self.path / f"qmp-{os.getpid()}.sock"

    @property
    def keeper(self) -> Path:
        """Where the keeper of the VM listens: a symlink, replaced in one step where a new keeper takes
        over.
        """
        return self.path / "keeper.sock"

    def own_keeper(self) -> Path:
        """Where a keeper listens that this process starts."""
        return self.path / f"keeper-{os.getpid()}.sock"

    def keepers(self) -> list[Path]:
        """Where keepers of the VM answer, the VM's own first; others are of a handover that was cut off."""
        own = os.readlink(self.keeper) if self.keeper.is_symlink() else ""
        found = sorted(self.path.glob("keeper-*.sock"), key=lambda path: (path.name != own, path.name))
        return [path for path in found if _listens(path, socket.SOCK_SEQPACKET)]

    def kept(self) -> bool:
        """Whether a keeper has the VM, with or without a VMM."""
        return bool(self.keepers())

    def lives(self) -> bool:
        """Whether a VMM listens at the VM's monitor; one that was killed leaves a socket that refuses."""
        return _listens(self.qmp)

    def served_by(self) -> int | None:
        """The pid of the VMM that listens at the VM's monitor, 0 where it cannot be told; None where none
        does.
        """
        return _listener(self.qmp)

    def tidy(self) -> None:
        """Remove what a VMM that was killed has left: the sockets that refuse, the links to them, and the
        directory if that leaves it empty.
        """
        left = []
        for path in self.path.glob("*.sock"):
            kind = socket.SOCK_SEQPACKET if path.name.startswith("keeper") else socket.SOCK_STREAM
            if not path.is_symlink() and not _listens(path, kind):
                left.append(path)
        gone = {path.name for path in left}
        left += [link for link in (self.qmp, self.keeper) if link.is_symlink() and os.readlink(link) in gone]
        left += [link for link in (self.qmp, self.keeper) if link.is_symlink() and not link.exists()]
        for path in left:
            path.unlink(missing_ok=True)
        if left:
            self.remove_if_empty()

    def grants(self) -> tuple[Grant, ...]:
        """What a VMM of this VM does in its directory, once it is confined."""
        return (
            Grant(str(self.path), Access.LINKS),
            Grant(str(self.path.parent), Access.REMOVE_DIR),
        )

    def claim(self) -> None:
        """Make this process's monitor the VM's monitor, and its keeper, if it started one, the VM's keeper;
        each in one step.
        """
        for own, link in ((self.own_qmp(), self.qmp), (self.own_keeper(), self.keeper)):
            if own.exists():
                fresh = self.path / f"{link.name}-{os.getpid()}"
                fresh.unlink(missing_ok=True)
                fresh.symlink_to(own.name)
                fresh.replace(link)

    def disclaim(self) -> None:
        """The VM is gone with this process: leave nothing but the log, and no directory where there is no
        log.
        """
        if self.qmp.is_symlink() and os.readlink(self.qmp) == self.own_qmp().name:
            self.qmp.unlink()
            if self.keeper.is_symlink():
                self.keeper.resolve().unlink(missing_ok=True)
                self.keeper.unlink()
        self.remove_if_empty()

    def remove_if_empty(self) -> None:
        """Remove the directory, unless something is in it."""
        try:
            self.path.rmdir()
        except OSError:
            return  # the log or another VMM's socket is still in it

    def running(self) -> Path:
        """The monitor of the running VM. Raises UsageError where there is none."""
        if not self.lives():
            known = ", ".join(vm.name for vm in named()) or "none"
            raise UsageError(f"no VM named {self.name!r} runs (running: {known}); see 'vmm list'")
        return self.qmp


def named() -> list[RunDir]:
    """Every named VM whose VMM lives, by name."""
    return [directory for directory in directories() if directory.lives()]


def directories() -> list[RunDir]:
    """Every VM's directory, by name; what is no VM's is left out."""
    found = []
    for path in sorted(base().iterdir()):
        try:
            found.append(RunDir(path.name))
        except ConfigError:
            continue  # not one of ours
    return found


def _listens(path: Path, kind: int = socket.SOCK_STREAM) -> bool:
    return _listener(path, kind) is not None


def _listener(path: Path, kind: int = socket.SOCK_STREAM) -> int | None:
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return 0  # its backlog is full
        except OSError:
            return None
        return peer(probe)[0]
