"""The sandbox's numbers against the kernel's and the C library's own headers, as the C compiler sees them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vmm.kvm import keeper
from vmm.sandbox import kernel, landlock, privileges, profile, seccomp
from vmm.sandbox.landlock import Access
from vmm.sandbox.seccomp import Action
from vmm.sandbox.syscalls import NUMBERS

HEADERS = (
    *(
        "stdio.h",
        "fcntl.h",
        "sched.h",
        "signal.h",
        "sys/mman.h",
        "sys/socket.h",
        "sys/syscall.h",
        "sys/prctl.h",
    ),
    *("asm/ioctls.h", "linux/audit.h", "linux/capability.h", "linux/filter.h", "linux/landlock.h"),
    "linux/seccomp.h",
)
SIMPLE = {
    **{
        name: getattr(profile, name)
        for name in dir(profile)
        if name.startswith(("F_", "FIO", "TC", "TIOC", "PR_"))
    },
    **{name: getattr(kernel, name) for name in dir(kernel) if name.startswith("PR_")},
    **{
        name: getattr(keeper, name)
        for name in ("PR_SET_NO_NEW_PRIVS", "PR_SET_SECCOMP", "SECCOMP_MODE_FILTER")
    },
    "PROT_EXEC": profile.PROT_EXEC,
    "CLONE_THREAD": profile.CLONE_THREAD,
    "AF_UNIX": profile.AF_UNIX,
    "AUDIT_ARCH_X86_64": seccomp.AUDIT_ARCH_X86_64,
    "__X32_SYSCALL_BIT": seccomp.X32,
    "SECCOMP_SET_MODE_FILTER": seccomp.SET_MODE_FILTER,
    "SECCOMP_GET_ACTION_AVAIL": seccomp.GET_ACTION_AVAIL,
    "SECCOMP_FILTER_FLAG_TSYNC": seccomp.FLAG_TSYNC,
    "BPF_LD | BPF_W | BPF_ABS": seccomp.LOAD,
    "BPF_ALU | BPF_AND | BPF_K": seccomp.AND,
    "BPF_JMP | BPF_JEQ | BPF_K": seccomp.JEQ,
    "BPF_JMP | BPF_JGE | BPF_K": seccomp.JGE,
    "BPF_RET | BPF_K": seccomp.RETURN,
    "__builtin_offsetof(struct seccomp_data, nr)": seccomp.NR,
    "__builtin_offsetof(struct seccomp_data, arch)": seccomp.ARCH,
    "__builtin_offsetof(struct seccomp_data, args)": seccomp.ARGUMENTS,
    "_LINUX_CAPABILITY_VERSION_3": privileges.CAPABILITY_VERSION_3,
    "LANDLOCK_CREATE_RULESET_VERSION": landlock.VERSION,
    "LANDLOCK_RULE_PATH_BENEATH": landlock.PATH_BENEATH,
    "sizeof(struct landlock_path_beneath_attr)": 12,
    **{f"SECCOMP_RET_{action.name}": int(action) for action in Action},
    **{f"__NR_{name}": number for name, number in NUMBERS.items()},
    "__NR_capset": privileges.CAPSET,
    "__NR_prctl": 157,
    "__NR_landlock_create_ruleset": landlock.CREATE_RULESET,
    "__NR_landlock_add_rule": landlock.ADD_RULE,
    "__NR_landlock_restrict_self": landlock.RESTRICT_SELF,
    **{
        f"LANDLOCK_ACCESS_FS_{access.name}": int(access)
        for access in Access
        if access.bit_count() == 1 and access is not Access.DEVICE
    },
    "LANDLOCK_ACCESS_NET_BIND_TCP | LANDLOCK_ACCESS_NET_CONNECT_TCP": landlock.NO_TCP,
    "LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | LANDLOCK_SCOPE_SIGNAL": landlock.ALL_SCOPES,
}
# Names that a header of Linux 6.1 (Debian 12) or glibc 2.36 may lack
MAY_BE_MISSING = ("TRUNCATE", "IOCTL_DEV", "ACCESS_NET", "SCOPE", "TCGETS2", "TCSETS2", "PR_SET_VMA")


def test_every_number(tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no C compiler: install gcc (CI=true)", pytrace=False)
        pytest.skip("no C compiler: install gcc")
    known = {name: value for name, value in SIMPLE.items() if has(compiler, name)}
    lacking = {name for name in SIMPLE if name not in known}
    assert {name for name in lacking if not any(word in name for word in MAY_BE_MISSING)} == set()
    source = tmp_path / "probe.c"
    source.write_text(program([f'printf("%lld\\n", (long long)({name}));' for name in known]))
    subprocess.run([compiler, "-D_GNU_SOURCE", "-w", "-o", tmp_path / "probe", source], check=True)
    output = subprocess.run([tmp_path / "probe"], check=True, capture_output=True, text=True).stdout
    said = dict(zip(known, map(int, output.split()), strict=True))
    wrong = {
        name: (said[name], value) for name, value in known.items() if said[name] % 2**32 != value % 2**32
    }
    assert not wrong


def program(lines: list[str]) -> str:
    return "\n".join(
        [*(f"#include <{name}>" for name in HEADERS), "int main(void) {", *lines, "return 0; }", ""]
    )


def has(compiler: str, name: str) -> bool:
    """Whether the headers state `name`; asked only where they may not."""
    if not any(word in name for word in MAY_BE_MISSING):
        return True
    text = program([f"long long x = (long long)({name});"])
    command = [compiler, "-D_GNU_SOURCE", "-w", "-fsyntax-only", "-xc", "-"]
    return subprocess.run(command, input=text, text=True, capture_output=True, check=False).returncode == 0
