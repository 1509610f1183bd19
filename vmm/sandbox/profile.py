"""What a VMM process and a keeper do once they are set up: the only system calls that they need.

Measured with strace, with glibc, over what the tests do, and held by running every test confined. A feature
that needs another call adds it here, with its reason.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Final

from vmm.sandbox.seccomp import Action, Rule, Where

# asm-generic/ioctls.h, linux/kvm.h
KVMIO, IOCTL_TYPE = 0xAE00, 0xFF00
FIONBIO, FIONCLEX, FIOCLEX = 0x5421, 0x5450, 0x5451  # Python's os.set_blocking and os.set_inheritable
TCGETS, TCSETS, TCSETSW, TCSETSF, TCGETS2, TCSETS2 = 0x5401, 0x5402, 0x5403, 0x5404, 0x802C542A, 0x402C542B
TIOCGPTN: Final = 0x80045430

# fcntl.h, linux/fcntl.h
F_GETFD, F_SETFD, F_GETFL, F_SETFL = 1, 2, 3, 4
F_OFD_GETLK, F_OFD_SETLK = 36, 37  # the run token
F_DUPFD_CLOEXEC, F_ADD_SEALS, F_GET_SEALS = 1030, 1033, 1034

PROT_EXEC: Final = 4
CLONE_THREAD: Final = 0x10000
AF_UNIX: Final = 1
PR_SET_NAME, PR_SET_VMA = 15, 0x53564D41  # names of threads and mappings: Python 3.14, glibc

NOT_HERE: Final = Action.ERRNO | errno.ENOSYS  # the C library then uses the older call
REFUSED: Final = Action.ERRNO | errno.EPERM


def words(*lines: str) -> tuple[str, ...]:
    """The words of `lines`."""
    return tuple(word for line in lines for word in line.split())


# Calls without conditions. What they work on is an fd that is open, memory, time, or the process itself; a
# path meets Landlock.
MEMORY = words("munmap mremap madvise brk mincore memfd_create ftruncate fallocate")
THREADS = words(
    "futex set_robust_list rseq exit exit_group gettid getpid sched_yield sched_getaffinity membarrier",
    "getcpu rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait sigaltstack restart_syscall",
)
TIME = words("clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time getrandom")
STREAMS = words("read write readv writev pread64 pwrite64 lseek close fstat newfstatat dup dup2 dup3")
EVENTS = words("poll ppoll epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2 pipe2")
SOCKETS = words(
    "connect bind listen accept accept4 shutdown sendto recvfrom sendmsg recvmsg",
    "getsockname getpeername setsockopt getsockopt",
)
FILES = words(
    "openat stat lstat statx access faccessat faccessat2 readlink readlinkat getdents64 getcwd",
    "fchmod unlink unlinkat rename renameat renameat2 symlink symlinkat rmdir",
)
IDENTITY = words("getuid geteuid getgid getegid getppid uname sysinfo getrusage getrlimit")

NEW_THREADS = (  # and no processes: clone3's flags are in memory, where no filter can see them
    Rule("clone", (Where(0, CLONE_THREAD, CLONE_THREAD),)),
    Rule("clone3", action=NOT_HERE),
    Rule("prctl", (Where(0, PR_SET_NAME), Where(0, PR_SET_VMA))),
)


def vmm_rules(pid: int, refused: int = REFUSED) -> list[Rule]:
    """The VMM process `pid`, from the end of its set-up on; `refused`: what a library can live without."""
    requests = (FIONBIO, FIOCLEX, FIONCLEX, TCGETS, TCSETS, TCSETSW, TCSETSF, TCGETS2, TCSETS2, TIOCGPTN)
    flags = (F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC)
    commands = (*flags, F_OFD_GETLK, F_OFD_SETLK, F_ADD_SEALS, F_GET_SEALS)
    return [
        Rule("ioctl", (Where(1, KVMIO, IOCTL_TYPE), *(Where(1, request) for request in requests))),
        *_plain(STREAMS, THREADS, EVENTS, MEMORY, TIME, SOCKETS, FILES, IDENTITY),
        Rule("fcntl", tuple(Where(1, command) for command in commands)),
        Rule("socket", (Where(0, AF_UNIX),)),
        Rule("socketpair", (Where(0, AF_UNIX),)),
        Rule("tgkill", (Where(0, pid),)),  # a vCPU's thread is kicked
        Rule("kill", (Where(0, pid),)),
        Rule("waitid"),  # for a keeper of its own that it has told to end
        Rule("prlimit64", (Where(0, 0),)),
        *_no_new_code(refused),
        *NEW_THREADS,
    ]


def keeper_rules(pid: int, ioctls: Iterable[int], refused: int = REFUSED) -> list[Rule]:
    """The keeper `pid`, before its first message: KVM's `ioctls`, its sockets and threads; no file is
    opened.
    """
    calls = words(
        "read write close poll eventfd2 accept4 sendmsg sendto recvmsg lseek fstat newfstatat getsockname",
        "getsockopt geteuid munmap mremap madvise brk clock_gettime clock_nanosleep",
        "pidfd_open unlink",  # for who waits for its end; its own socket, then
    )
    return [
        Rule("ioctl", tuple(Where(1, request) for request in (*ioctls, FIONBIO, FIOCLEX, FIONCLEX))),
        *_plain(calls, (call for call in THREADS if call != "sigaltstack")),
        Rule("fcntl", tuple(Where(1, command) for command in (F_GETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC))),
        Rule("tgkill", (Where(0, pid),)),
        Rule("openat", action=Action.ERRNO | errno.EACCES),  # a traceback's source lines; the C library's own
        *_no_new_code(refused),
        *NEW_THREADS,
    ]


def _no_new_code(refused: int) -> list[Rule]:
    """Nothing that is written can be run. A library that tries may go on without, so the call just fails."""
    return [Rule(call, (Where(2, 0, PROT_EXEC),), unmet=refused) for call in ("mmap", "mprotect")]


def _plain(*groups: Iterable[str]) -> list[Rule]:
    return [Rule(call) for group in groups for call in group]
