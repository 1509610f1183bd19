"""vmm.kvm.abi against the kernel's own header, as the C compiler sees it.

A C program states every size, offset, signedness, bit-field, constant and ioctl number by the kernel's names;
the names come from the ctypes classes, so that nothing in the module goes unchecked. What the installed
header is too old to know must be listed in NEWER_THAN_6_1 with a release newer than that header.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from vmm.kvm import abi

Linux = tuple[int, int]

# Names that the header of Linux 6.1 (Debian 12's linux-libc-dev) lacks, and the release that brought each.
NEWER_THAN_6_1: dict[str, Linux] = {
    "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP": (6, 2),
    "KVM_CAP_PMU_EVENT_MASKED_EVENTS": (6, 3),
    "KVM_CAP_USER_MEMORY2": (6, 8),
    "KVM_CAP_MEMORY_FAULT_INFO": (6, 8),
    "KVM_CAP_MEMORY_ATTRIBUTES": (6, 8),
    "KVM_CAP_GUEST_MEMFD": (6, 8),
    "KVM_CAP_VM_TYPES": (6, 8),
    "KVM_CAP_PRE_FAULT_MEMORY": (6, 11),
    "KVM_CAP_X86_APIC_BUS_CYCLES_NS": (6, 11),
    "KVM_CAP_GUEST_MEMFD_FLAGS": (6, 18),
    "KVM_EXIT_MEMORY_FAULT": (6, 8),
    "KVM_MEM_GUEST_MEMFD": (6, 8),
    "KVM_MEMORY_ATTRIBUTE_PRIVATE": (6, 8),
    "KVM_MEMORY_EXIT_FLAG_PRIVATE": (6, 8),
    "GUEST_MEMFD_FLAG_MMAP": (6, 18),
    "GUEST_MEMFD_FLAG_INIT_SHARED": (6, 18),
    "KVM_SET_USER_MEMORY_REGION2": (6, 8),
    "KVM_SET_MEMORY_ATTRIBUTES": (6, 8),
    "KVM_CREATE_GUEST_MEMFD": (6, 8),
    "KVM_PRE_FAULT_MEMORY": (6, 11),
    "kvm_userspace_memory_region2": (6, 8),
    "kvm_memory_attributes": (6, 8),
    "kvm_create_guest_memfd": (6, 8),
    "kvm_pre_fault_memory": (6, 11),
    "kvm_run.memory_fault": (6, 8),
}

ENUMS = {
    "KVM_EXIT_": abi.Exit,
    "KVM_CAP_": abi.Cap,
    "KVM_INTERNAL_ERROR_": abi.InternalError,
    "KVM_SYSTEM_EVENT_": abi.SystemEvent,
    "KVM_MP_STATE_": abi.MpState,
}

Aggregate = type[ctypes.Structure] | type[ctypes.Union]


@dataclass(frozen=True)
class Fact:
    """A C expression, its value by the ctypes module, and the name that a header may be too old for."""

    expression: str
    value: int
    name: str


def aggregates() -> tuple[Aggregate, ...]:
    return tuple(
        value
        for value in vars(abi).values()
        if isinstance(value, type)
        and issubclass(value, ctypes.Structure | ctypes.Union)
        and value.__module__ == abi.__name__
    )


TAGGED = tuple(cls for cls in aggregates() if cls.__name__.startswith("kvm_"))
UNNAMED = tuple(cls for cls in aggregates() if cls not in TAGGED)
IOCTLS = tuple(value for value in vars(abi).values() if isinstance(value, abi.Ioctl))
CONSTANTS = {
    name: value
    for name, value in vars(abi).items()
    if type(value) is int and re.fullmatch(r"(KVM|GUEST_MEMFD|SYNC)[A-Z0-9_]+", name)
}


def structure_facts(tag: Aggregate) -> Iterator[Fact]:
    yield Fact(f"sizeof(struct {tag.__name__})", ctypes.sizeof(tag), tag.__name__)
    yield from member_facts(tag, tag, "", 0)


def member_facts(tag: Aggregate, cls: Aggregate, prefix: str, base: int) -> Iterator[Fact]:
    """The facts of `cls`: `tag`, or the unnamed part of it called `prefix`, `base` bytes into it."""
    fields: list[Any] = list(cls._fields_)
    for name, field_type, *bits in fields:
        offset = base + getattr(cls, name).offset
        if name in getattr(cls, "_anonymous_", ()):
            yield from member_facts(tag, field_type, prefix, offset)
            continue
        path = prefix + name
        owner = tag.__name__ if tag.__name__ in NEWER_THAN_6_1 else f"{tag.__name__}.{path.partition('.')[0]}"
        member = f"((struct {tag.__name__} *)0)->{path}"
        if bits:
            whole = prefix.removesuffix(".")
            yield Fact(bit_field(tag, whole, path), ctypes_bits(cls, name), owner)
            continue
        yield Fact(f"offsetof(struct {tag.__name__}, {path})", offset, owner)
        element, steps = element_of(field_type)
        if ctypes.sizeof(field_type):
            yield Fact(f"sizeof({member})", ctypes.sizeof(field_type), owner)
        if element is not ctypes.c_uint8:  # a flexible array of bytes may be any aggregate in C
            yield Fact(f"sizeof({member}{steps})", ctypes.sizeof(element), owner)
        if element in UNNAMED:
            yield from member_facts(tag, element, f"{path}{steps}.", offset)
        elif element not in TAGGED and not steps:
            yield Fact(f"(__typeof__({member}))-1 < 0", int(element(-1).value < 0), owner)


def element_of(field_type: Any) -> tuple[Any, str]:
    """The innermost element of an array (else the type itself), and the C subscripts that lead to it."""
    steps = ""
    while issubclass(field_type, ctypes.Array):
        field_type, steps = field_type._type_, f"{steps}[0]"
    return field_type, steps


def bit_field(tag: Aggregate, whole: str, path: str) -> str:
    """The first eight bytes of a structure in which the one bit-field is all ones."""
    return (
        f"({{ struct {tag.__name__} s = {{0}}; unsigned long long bits = 0; s.{path} = ~0; "
        f"memcpy(&bits, &s.{whole}, 8); bits; }})"
    )


def ctypes_bits(cls: Aggregate, name: str) -> int:
    filled = cls()
    setattr(filled, name, -1)
    return int.from_bytes(bytes(filled)[:8], "little")


def all_facts() -> Iterator[Fact]:
    for tag in TAGGED:
        yield from structure_facts(tag)
    for ioctl in IOCTLS:
        yield Fact(ioctl.name, ioctl.number, ioctl.name)
    for prefix, enum in ENUMS.items():
        for member in enum:
            yield Fact(prefix + member.name, member.value, prefix + member.name)
    for name, value in CONSTANTS.items():
        yield Fact(name, value, name)


class Header:
    """The installed <linux/kvm.h>: its release, the values of expressions, and those it cannot state."""

    def __init__(self, compiler: str, folder: Path, expressions: list[str]) -> None:
        self.compiler, self.folder = compiler, folder
        text = self.source(expressions)
        checked = self.compile(text, "-fsyntax-only", "-fmax-errors=0")
        failed = {
            int(line) for line in re.findall(r"^probe\.c:(\d+):\d+: error: ", checked.stderr, re.MULTILINE)
        }
        first = text.split("\n").index(self.fact(0, expressions[0])) + 1
        known = [e for line, e in enumerate(expressions, first) if line not in failed]
        self.missing = set(expressions) - set(known)
        self.values = self.run(known)
        code = self.run(["LINUX_VERSION_CODE"])["LINUX_VERSION_CODE"]
        self.linux: Linux = (code >> 16, code >> 8 & 0xFF)

    @staticmethod
    def fact(index: int, expression: str) -> str:
        return f'  printf("%d %lld\\n", {index}, (long long)({expression}));'

    def source(self, expressions: list[str]) -> str:
        headers = ("stddef.h", "stdio.h", "string.h", "linux/version.h", "linux/kvm.h")
        includes = [f"#include <{header}>" for header in headers]
        facts = [self.fact(index, expression) for index, expression in enumerate(expressions)]
        return "\n".join(
            [*includes, "#define PAGE_SIZE 4096", "int main(void) {", *facts, "  return 0;", "}", ""]
        )

    def compile(self, text: str, *options: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "probe.c").write_text(text)
        command = [self.compiler, "-std=gnu11", "-w", *options, "-o", "probe", "probe.c"]
        environment = os.environ | {"LC_ALL": "C"}
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )

    def run(self, expressions: list[str]) -> dict[str, int]:
        compiled = self.compile(self.source(expressions))
        assert compiled.returncode == 0, compiled.stderr
        output = subprocess.run([self.folder / "probe"], capture_output=True, text=True, check=True).stdout
        numbers = (line.split() for line in output.splitlines())
        return {expressions[int(index)]: int(value) for index, value in numbers}


def unavailable(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (CI=true)", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Header:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        unavailable("no C compiler: install gcc")
    assert compiler is not None
    preprocessed = subprocess.run(
        [compiler, "-E", "-include", "linux/kvm.h", "-xc", "/dev/null"], capture_output=True, check=False
    )
    if preprocessed.returncode:
        unavailable("no <linux/kvm.h>: install linux-libc-dev")
    return Header(compiler, tmp_path_factory.mktemp("abi"), [fact.expression for fact in all_facts()])


def disagreements(header: Header, facts: Iterator[Fact]) -> dict[str, Any]:
    """Expressions whose values differ. What the header lacks is test_what_the_header_lacks' business."""
    return {
        fact.expression: {"header": header.values[fact.expression], "vmm.kvm.abi": fact.value}
        for fact in facts
        if fact.expression not in header.missing and header.values[fact.expression] != fact.value
    }


@pytest.mark.parametrize("tag", TAGGED, ids=lambda tag: tag.__name__)
def test_structure(header: Header, tag: Aggregate) -> None:
    assert not disagreements(header, structure_facts(tag))


def test_every_other_fact(header: Header) -> None:
    assert not disagreements(header, all_facts())


def test_what_the_header_lacks(header: Header) -> None:
    """A name may be missing only if its release is newer than the header; then the skip shows it."""
    missing = {fact.name for fact in all_facts() if fact.expression in header.missing}
    unexpected = {name for name in missing if NEWER_THAN_6_1.get(name, (0, 0)) <= header.linux}
    assert not unexpected
    if missing:
        release = ".".join(map(str, header.linux))
        pytest.skip(
            f"the header of Linux {release} cannot say if these are right: {', '.join(sorted(missing))}"
        )


def test_the_newer_names_exist() -> None:
    assert not set(NEWER_THAN_6_1) - {fact.name for fact in all_facts()}


def test_an_ioctl_is_called_what_it_is() -> None:
    named = {name: value.name for name, value in vars(abi).items() if isinstance(value, abi.Ioctl)}
    assert {name: name for name in named} == named


def test_an_ioctl_names_fds_that_its_argument_has() -> None:
    arguments = {
        "KVM_IRQFD": abi.kvm_irqfd,
        "KVM_IOEVENTFD": abi.kvm_ioeventfd,
        "KVM_SET_USER_MEMORY_REGION2": abi.kvm_userspace_memory_region2,
    }
    with_fds = {ioctl.name: ioctl for ioctl in IOCTLS if ioctl.fds}
    assert set(arguments) == set(with_fds)
    for name, argument in arguments.items():
        assert set(with_fds[name].fds) <= {field[0] for field in argument._fields_}
        assert ctypes.sizeof(argument) == with_fds[name].size


def test_a_part_without_a_kernel_name_is_part_of_something() -> None:
    """So that each is compared: a CamelCase class that no kvm_ structure contains would not be."""
    contained: set[Any] = set()
    pending: list[Any] = list(TAGGED)
    while pending:
        for _, field_type, *_ in pending.pop()._fields_:
            part, _ = element_of(field_type)
            if part in UNNAMED and part not in contained:
                contained.add(part)
                pending.append(part)
    assert set(UNNAMED) == contained
    assert all(re.fullmatch(r"([A-Z][a-z]+)+", cls.__name__) for cls in UNNAMED)


def test_every_enumeration_is_compared() -> None:
    enums = {
        v for v in vars(abi).values() if isinstance(v, type) and issubclass(v, IntEnum) and v is not IntEnum
    }
    assert enums == set(ENUMS.values())


def test_sized_gives_room_and_keeps_the_layout() -> None:
    msrs = abi.sized(abi.kvm_msrs, 3)
    assert issubclass(msrs, abi.kvm_msrs)
    assert msrs is abi.sized(abi.kvm_msrs, 3)
    assert ctypes.sizeof(abi.kvm_msrs) + 3 * ctypes.sizeof(abi.kvm_msr_entry) == ctypes.sizeof(msrs)
    block = msrs(nmsrs=3)
    block.entries[2] = abi.kvm_msr_entry(index=0x10, data=1 << 63)
    assert (3).to_bytes(4, "little") == bytes(block)[:4]
    assert (1 << 63).to_bytes(8, "little") == bytes(block)[-8:]


def test_sized_refuses_what_has_no_flexible_array_member() -> None:
    with pytest.raises(TypeError, match=r"kvm_regs\.rflags is not a flexible array member"):
        abi.sized(abi.kvm_regs, 2)
