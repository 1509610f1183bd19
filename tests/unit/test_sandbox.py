"""The sandbox: what its filters let through, call by call; what a confined process can and cannot do."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from vmm.cli.launch import LaunchedVmm
from vmm.errors import VmmError
from vmm.kvm.keeper_port import ISSUED
from vmm.sandbox import Grant, Mode, confine, keeper_program, keeper_ruleset, kernel, landlock, seccomp
from vmm.sandbox.kernel import Absent
from vmm.sandbox.landlock import Access
from vmm.sandbox.profile import CLONE_THREAD, keeper_rules, vmm_rules
from vmm.sandbox.seccomp import AUDIT_ARCH_X86_64, X32, Action, Rule, Where, assemble
from vmm.sandbox.syscalls import NUMBERS

ROOT = Path(__file__).parents[2]
ARCH_I386 = 0x40000003
PID = 4711
KILL, ALLOW, LOG = Action.KILL_PROCESS, Action.ALLOW, Action.LOG
REFUSED = Action.ERRNO | errno.EPERM


def act(program: bytes, number: int, *arguments: int, arch: int = AUDIT_ARCH_X86_64) -> int:
    """What the kernel does with a call: the program, interpreted as bpf(2)'s classic ancestor defines it."""
    words = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("=iIQ6Q", number & 0x7FFFFFFF, arch, 0, *words)
    code = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        operation, if_true, if_false, k = code[at]
        at += 1
        match operation:
            case seccomp.LOAD:
                (accumulator,) = struct.unpack_from("=I", data, k)
            case seccomp.AND:
                accumulator &= k
            case seccomp.JEQ:
                at += if_true if accumulator == k else if_false
            case seccomp.JGE:
                at += if_true if accumulator >= k else if_false
            case seccomp.RETURN:
                return k
            case _:
                raise AssertionError(f"unknown operation {operation:#x}")


# --- filters, without a kernel ---


RULES = [
    Rule("read"),
    Rule("socket", (Where(0, 1), Where(0, 3))),
    Rule("clone", (Where(0, CLONE_THREAD, CLONE_THREAD),)),
    Rule("mmap", (Where(2, 0, 4),), unmet=REFUSED),
    Rule("clone3", action=Action.ERRNO | errno.ENOSYS),
]


@pytest.mark.parametrize(
    ("call", "arguments", "expected"),
    [
        ("read", (7, 1, 2), ALLOW),
        ("socket", (1,), ALLOW),
        ("socket", (3,), ALLOW),
        ("socket", (2,), KILL),
        ("clone", (CLONE_THREAD | 0x3D0F00,), ALLOW),
        ("clone", (signal.SIGCHLD,), KILL),
        ("mmap", (0, 0, 3), ALLOW),
        ("mmap", (0, 0, 7), REFUSED),
        ("clone3", (), Action.ERRNO | errno.ENOSYS),
        ("write", (), KILL),
    ],
)
def test_rules(call: str, arguments: tuple[int, ...], expected: int) -> None:
    assert expected == act(assemble(RULES, KILL), NUMBERS[call], *arguments)


def test_calls_of_other_abis_end_the_process_whatever_the_mode() -> None:
    program = assemble(RULES, LOG)
    assert act(program, NUMBERS["read"], arch=ARCH_I386) == KILL
    assert act(program, NUMBERS["read"] | X32) == KILL
    assert act(program, NUMBERS["write"]) == LOG


def test_rules_that_cannot_be() -> None:
    with pytest.raises(VmmError, match="read has two rules"):
        assemble([Rule("read"), Rule("read")], KILL)
    with pytest.raises(VmmError, match="more conditions"):
        assemble([Rule("ioctl", tuple(Where(1, number) for number in range(200)))], KILL)


DANGEROUS = {
    # execve, execveat, fork, vfork, ptrace, process_vm_readv, _writev, bpf, perf_event_open, mount, setns,
    # unshare
    *(59, 322, 57, 58, 101, 310, 311, 321, 298, 165, 308, 272),
    # io_uring_setup, userfaultfd, init_module, keyctl, setuid, chroot, reboot, seccomp, open
    *(425, 323, 175, 250, 105, 161, 169, 317, 2),
    # capset, landlock_restrict_self, pidfd_getfd, pidfd_send_signal, process_madvise, memfd_secret, mkdir,
    # chmod
    *(126, 446, 438, 424, 440, 447, 83, 90),
}


@pytest.mark.parametrize("rules", [vmm_rules(PID), keeper_rules(PID, ISSUED)], ids=["vmm", "keeper"])
def test_no_profile_lets_a_dangerous_call_through(rules: list[Rule]) -> None:
    program = assemble(rules, KILL)
    assert {number for number in DANGEROUS if act(program, number, PID) != KILL} == set()
    assert act(program, NUMBERS["tgkill"], PID, PID + 1, signal.SIGUSR1) == ALLOW
    assert act(program, NUMBERS["tgkill"], PID + 1, PID + 1, signal.SIGKILL) == KILL
    assert act(program, NUMBERS["mprotect"], 0, 4096, 5) == REFUSED
    assert act(program, NUMBERS["prctl"], 8) == KILL  # PR_SET_KEEPCAPS


def test_the_keeper_s_profile_is_its_table_of_ioctls() -> None:
    program = assemble(keeper_rules(PID, ISSUED), KILL)
    ours = {number for number in ISSUED if act(program, NUMBERS["ioctl"], 3, number) == ALLOW}
    assert ours == set(ISSUED)
    tiocsti, memory_encrypt_op, create_device = 0x5412, 0xC008AEBA, 0xC00CAEE0
    for number in (tiocsti, memory_encrypt_op, create_device):
        assert act(program, NUMBERS["ioctl"], 3, number) == KILL
    for call in ("socket", "connect", "bind", "recvfrom", "ftruncate", "symlink", "rename", "kill", "dup"):
        assert act(program, NUMBERS[call], 1) == KILL, call


def test_the_vmm_s_profile_has_kvm_s_ioctls_and_its_terminal_s() -> None:
    program = assemble(vmm_rules(PID), KILL)
    assert all(act(program, NUMBERS["ioctl"], 3, number) == ALLOW for number in ISSUED)
    assert act(program, NUMBERS["ioctl"], 3, 0x5412) == KILL  # TIOCSTI types into a terminal
    assert act(program, NUMBERS["socket"], 1) == ALLOW
    assert act(program, NUMBERS["socket"], 2) == KILL
    assert act(program, NUMBERS["fcntl"], 3, 8) == KILL  # F_SETOWN: signals to others


def test_log_mode_refuses_nothing_of_this_abi() -> None:
    program = assemble(vmm_rules(PID, LOG), LOG)
    results = {act(program, number, 1) for number in range(463)}
    assert results <= {ALLOW, LOG, Action.ERRNO | errno.ENOSYS}  # clone3: the C library has clone instead


# --- what a confined process can do ---

PRELUDE = """
import ctypes, errno, mmap, os, signal, socket, subprocess, sys, threading
import asyncio, vmm.boot.elf
from vmm.sandbox import Access, Grant, Mode, confine, limit_resources
folder, mode = sys.argv[1:3]
memfd = os.memfd_create("m")
limit_resources()
report = confine(Mode(mode), [Grant(folder, Access.LINKS), Grant("/dev/null", Access.DEVICE)])
libc = ctypes.CDLL(None, use_errno=True)
"""


def run(folder: Path, act: str, mode: str = "on") -> subprocess.CompletedProcess[str]:
    """`act`, carried out by a process that is confined to sockets in `folder`."""
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(act), str(folder), mode],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.fixture(scope="module", autouse=True)
def here() -> None:
    """Both halves, or no point: says which one the kernel lacks."""
    try:
        landlock.abi()
        seccomp.require(Action.KILL_PROCESS, Action.LOG)
    except Absent as error:
        pytest.skip(f"this kernel cannot confine a process whole: {error}")


# the interpreter's own files may be root's alone: what is needed of them is read before
AS_NOBODY = "__import__('sysconfig').get_paths(); os.setresuid(65534, 65534, 65534)"

ENDS_THE_PROCESS = {
    "run a program": "os.execv('/bin/true', ['true'])",
    "start a process": "os.fork()",
    "start a process as subprocess does": "subprocess.run(['/bin/true'])",
    "speak IP": "socket.socket(socket.AF_INET)",
    "speak to the kernel": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "trace": "libc.ptrace(16, os.getppid(), 0, 0)",
    "read another process": "libc.process_vm_readv(os.getppid(), 0, 0, 0, 0, 0)",
    "end another process": "os.kill(os.getppid(), 0)",
    "load a BPF program": "libc.syscall(321, 0, 0, 0)",
    "use io_uring": "libc.syscall(425, 1, 0)",
    "change who it is": "os.setuid(65534)",
    "loosen the filter": "libc.prctl(22, 2, 0, 0, 0)",
    "make a directory": "os.mkdir(folder + '/d')",
    "change a limit of another process": "libc.syscall(302, os.getppid(), 7, 0, 0)",
    "type into a terminal": "__import__('fcntl').ioctl(0, 0x5412, b'x')",
}


@pytest.mark.parametrize("act", ENDS_THE_PROCESS.values(), ids=ENDS_THE_PROCESS)
def test_ends_the_process(tmp_path: Path, act: str) -> None:
    ended = run(tmp_path, f"{act}\nprint('survived')")
    assert ended.returncode == -signal.SIGSYS, ended.stderr
    assert "survived" not in ended.stdout


IS_REFUSED = {
    "read a file": ("open('/etc/passwd')", errno.EACCES),
    "read a file through /proc": ("open('/proc/self/root/etc/passwd')", errno.EACCES),
    "list a directory": ("os.listdir('/')", errno.EACCES),
    "write a file": ("open('/tmp/vmm-test', 'w')", errno.EACCES),
    "make a file where it may make sockets": ("open(folder + '/file', 'w')", errno.EACCES),
    "remove a directory": ("os.rmdir(folder)", errno.EACCES),
    "another device": ("open('/dev/zero')", errno.EACCES),
    "a socket elsewhere": ("socket.socket(socket.AF_UNIX).bind('/tmp/vmm-test')", errno.EACCES),
    "code in memory": ("mmap.mmap(-1, 4096, prot=7)", errno.EPERM),
    "code in a file": ("os.ftruncate(memfd, 4096) or mmap.mmap(memfd, 0, prot=5, flags=2)", errno.EPERM),
    "dump core": ("__import__('resource').setrlimit(4, (1 << 20, 1 << 20))", None),
}


@pytest.mark.parametrize(("act", "expected"), IS_REFUSED.values(), ids=IS_REFUSED)
def test_is_refused(tmp_path: Path, act: str, expected: int | None) -> None:
    ended = run(
        tmp_path,
        f"""
        try:
            {act}
        except (OSError, ValueError) as error:
            print("refused", getattr(error, "errno", None))
        """,
    )
    assert ended.stdout == f"refused {expected}\n", ended.stderr
    assert ended.returncode == 0


def test_an_abstract_socket_outside_cannot_be_reached(tmp_path: Path) -> None:
    if landlock.abi() < 6:
        pytest.skip("this kernel's Landlock knows no scopes (ABI 6, Linux 6.12)")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen()
        name = listener.getsockname().hex()
        ended = run(
            tmp_path,
            f"""
            try:
                socket.socket(socket.AF_UNIX).connect(bytes.fromhex("{name}"))
            except PermissionError:
                print("refused")
            """,
        )
    assert ended.stdout == "refused\n", ended.stderr


def test_what_a_vmm_does_still_works(tmp_path: Path) -> None:
    ended = run(
        tmp_path,
        """
        import elftools.elf.elffile, logging
        os.ftruncate(memfd, 4096)
        again = os.open(f"/proc/self/fd/{memfd}", os.O_RDWR)
        os.symlink("s", folder + "/link")
        os.rename(folder + "/link", folder + "/other")
        os.unlink(folder + "/other")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(folder + "/s")
            os.fchmod(server.fileno(), 0o600)
            server.listen()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(folder + "/s")
                socket.send_fds(client, [b"x"], [memfd])
                peer, _ = server.accept()
                _, (fd, *_), _, _ = socket.recv_fds(peer, 1, 1)
                os.close(fd)
        os.unlink(folder + "/s")
        open("/dev/null").close()
        results = []
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        def work():
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            results.append(signal.sigtimedwait({signal.SIGUSR1}, 1).si_signo)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        asyncio.run(asyncio.sleep(0.01))
        logging.warning("%s", results)
        print(report)
        raise ValueError("a traceback is no crime")
        """,
    )
    assert ended.returncode == 1, (ended.returncode, ended.stderr)
    assert ended.stderr.endswith("ValueError: a traceback is no crime\n")
    assert "missing=()" in ended.stdout


def test_privileges_are_gone_in_every_thread(tmp_path: Path) -> None:
    """Seen from outside: the process itself may not read its /proc."""
    child = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            PRELUDE + "threading.Thread(target=sys.stdin.read).start(); print('ready', flush=True)",
            *(str(tmp_path), "on"),
        ],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        tasks = [dict(rows(path / "status")) for path in Path(f"/proc/{child.pid}/task").iterdir()]
        limits = Path(f"/proc/{child.pid}/limits").read_text()
        child.communicate("")
    assert len(tasks) == 2
    for task in tasks:
        assert (task["NoNewPrivs"], task["Seccomp"]) == ("1", "2")
        for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb", *(["CapBnd"] if os.geteuid() == 0 else [])):
            assert int(task[kind], 16) == 0, kind
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)


def rows(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        yield name, value.strip()


def test_a_user_without_privileges_is_confined_as_well(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("everything here runs without privileges")
    ended = subprocess.run(
        [
            *(sys.executable, "-c"),
            PRELUDE.replace("limit_resources()", AS_NOBODY, 1)
            + "print(report); socket.socket(socket.AF_INET)",
            *(str(tmp_path), "on"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == -signal.SIGSYS, ended.stderr


def test_log_mode_carries_calls_out(tmp_path: Path) -> None:
    ended = run(tmp_path, "socket.socket(socket.AF_INET).close(); print('survived')", mode="log")
    assert (ended.returncode, ended.stdout) == (0, "survived\n"), ended.stderr


def test_off_does_nothing(tmp_path: Path) -> None:
    ended = run(tmp_path, "open('/etc/passwd').close(); subprocess.run(['true'], check=True)", mode="off")
    assert ended.returncode == 0, ended.stderr


# --- what the kernel lacks ---


def lacking(*numbers: int) -> mock._patch[mock.MagicMock]:
    """A kernel without those system calls, and on which the others do nothing."""

    def syscall(what: str, number: int, *arguments: object) -> int:
        if number in numbers:
            raise Absent(f"{what}: Function not implemented")
        return (
            os.memfd_create("ruleset")
            if number == landlock.CREATE_RULESET and arguments[0]
            else 7
            if number == landlock.CREATE_RULESET
            else 0
        )

    return mock.patch.object(kernel, "syscall", side_effect=syscall)


@pytest.mark.parametrize(
    ("number", "sentence", "left"),
    [
        (landlock.CREATE_RULESET, "files are not restricted", "seccomp (on)"),
        (seccomp.SECCOMP, "system calls are not restricted", "Landlock ABI"),
    ],
)
def test_what_is_missing_is_said_and_the_rest_is_done(number: int, sentence: str, left: str) -> None:
    with lacking(number), mock.patch.object(sys, "dont_write_bytecode"):
        report = confine(Mode.ON, [Grant("/nowhere", Access.READ)])
    [missing] = report.missing
    assert sentence in missing
    assert any(done.startswith(left) for done in report.done)


def test_a_keeper_is_not_confined_where_the_kernel_cannot() -> None:
    with lacking(landlock.CREATE_RULESET, seccomp.SECCOMP):
        assert keeper_program(Mode.ON, PID, ISSUED) == b""
        assert keeper_ruleset(Mode.ON, "/run/k") == -1
    assert keeper_program(Mode.OFF, PID, ISSUED) == b""
    assert keeper_ruleset(Mode.OFF, "/run/k") == -1


def test_not_beside_running_threads() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        with pytest.raises(VmmError, match="before the first thread"):
            confine(Mode.ON, [])
    finally:
        end.set()
        thread.join()


def test_older_landlock_is_asked_for_less() -> None:
    assert landlock.handled(1) == Access((1 << 13) - 1)
    assert not landlock.handled(2) & (Access.TRUNCATE | Access.IOCTL_DEV)
    assert landlock.handled(5) == landlock.handled(7) == Access((1 << 16) - 1)


def test_who_starts_a_vmm_that_the_sandbox_ends_says_so(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -SYS $$\n")
    python.chmod(0o700)
    vmm = LaunchedVmm([], monitor=lambda _: tmp_path / "qmp", log=tmp_path / "log", python=str(python))
    assert vmm.wait(10) == -signal.SIGSYS
    assert "was ended by its sandbox" in str(vmm.failure(-signal.SIGSYS))
