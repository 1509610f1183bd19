"""The kernel's KVM interface on x86-64, as ctypes: structures, constants and ioctl numbers, and nothing else.

Names are the kernel's own (`include/uapi/linux/kvm.h`, `arch/x86/include/uapi/asm/kvm.h`): a class `kvm_regs`
is `struct kvm_regs`. A part that the kernel left unnamed, such as `struct { ... } io` inside `struct
kvm_run`, has a CamelCase name here. What a comment dates (`Linux 6.8`) is newer than Linux 6.1; all else is
older. `tests/abi` compares every size, offset, constant and ioctl number with the C compiler's view of the
kernel's header.

A structure's fields are its annotations: `rip: u64` is an int to a type checker, a `__u64` to the kernel, and
`indices: Annotated[Array[c_uint32], 0]` is a C array (length 0: the flexible array member, see `sized`).

This module must never open, call or allocate anything: it is data.
"""
# ruff: noqa: I002 (the annotations are the layout, so they are evaluated)

import functools
from collections.abc import Callable
from ctypes import (
    Array,
    Structure,
    Union,
    c_char,
    c_int16,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    sizeof,
)
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Annotated, Any, Final, TypeVar

u8 = Annotated[int, c_uint8]
u16 = Annotated[int, c_uint16]
u32 = Annotated[int, c_uint32]
u64 = Annotated[int, c_uint64]
s16 = Annotated[int, c_int16]
s32 = Annotated[int, c_int32]
s64 = Annotated[int, c_int64]

_Aggregate = TypeVar("_Aggregate", bound=type[Structure] | type[Union])
_Structure = TypeVar("_Structure", bound=Structure)


def _field(name: str, hint: Any) -> tuple[Any, ...]:
    """One `_fields_` entry. The hint is a structure, or Annotated as the module's docstring says."""
    if not hasattr(hint, "__metadata__"):
        return name, hint
    if hint.__origin__ in (int, bytes):
        return name, *hint.__metadata__
    lengths, element = hint.__metadata__, hint.__origin__
    for _ in lengths:
        (element,) = element.__args__
    for length in reversed(lengths):
        element *= length
    return name, element


def _layout(cls: _Aggregate) -> _Aggregate:
    """Class decorator: makes `_fields_` of a structure's or union's annotations, in their order."""
    cls._fields_ = [_field(name, hint) for name, hint in cls.__annotations__.items()]
    return cls


def sized(base: type[_Structure], count: int) -> type[_Structure]:
    """`base` with room for `count` elements in its last field, a flexible array member.

    `sized(kvm_msrs, 40)()` is a kvm_msrs with 40 entries; `sized(kvm_xsave, n)` has `4096 + 4 * n` bytes.
    The kernel's own count field (`nent`, `nmsrs`, `nr`, `len`) is left for the caller to set.
    """
    with_room: type[_Structure] = _sized(base, count)
    return with_room


@functools.cache
def _sized(base: Any, count: int) -> Any:
    name, flexible = base._fields_[-1][:2]
    if sizeof(flexible) != 0:
        raise TypeError(f"{base.__name__}.{name} is not a flexible array member, so it cannot be sized")
    return type(f"{base.__name__}_{count}", (base,), {"_fields_": [(name, flexible._type_ * count)]})


# --- ioctl numbers (include/uapi/asm-generic/ioctl.h) ---------------------------------------------------


class Direction(IntFlag):
    """Which way an ioctl's number says that data flows, as seen from user space.

    It is part of the number and no more than that: KVM_SET_IRQCHIP says READ and writes, KVM_GET_DIRTY_LOG
    and KVM_GET_DEVICE_ATTR say WRITE and read through a pointer.
    """

    NONE = 0
    WRITE = 1
    READ = 2


@dataclass(frozen=True, slots=True)
class Ioctl:
    """One ioctl request: what `ioctl(2)` is given, and what a person or another process must know of it."""

    name: str
    number: int  # the whole 32-bit request
    size: int = 0  # bytes of the fixed part of the argument; 0: the argument is an integer, or absent
    direction: Direction = Direction.NONE
    fds: tuple[str, ...] = ()  # fields of the argument that hold fds of the calling process

    def __str__(self) -> str:
        return self.name


KVMIO: Final = 0xAE
_TYPE_SHIFT: Final = 8
_SIZE_SHIFT: Final = 16
_DIRECTION_SHIFT: Final = 30


def _ioc(direction: Direction, name: str, nr: int, argument: Any, fds: tuple[str, ...] = ()) -> Ioctl:
    size = 0 if argument is None else sizeof(argument)
    number = direction << _DIRECTION_SHIFT | size << _SIZE_SHIFT | KVMIO << _TYPE_SHIFT | nr
    return Ioctl(name, number, size, direction, fds)


def _IO(name: str, nr: int) -> Ioctl:
    return _ioc(Direction.NONE, name, nr, None)


_Encoder = Callable[..., Ioctl]
_IOR: Final[_Encoder] = functools.partial(_ioc, Direction.READ)
_IOW: Final[_Encoder] = functools.partial(_ioc, Direction.WRITE)
_IOWR: Final[_Encoder] = functools.partial(_ioc, Direction.READ | Direction.WRITE)


# --- enumerations ---------------------------------------------------------------------------------------

KVM_API_VERSION: Final = 12


class Exit(IntEnum):
    """Why KVM_RUN returned: `kvm_run.exit_reason`, KVM_EXIT_*."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    NMI = 16
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    IOAPIC_EOI = 26
    HYPERV = 27
    X86_RDMSR = 29
    X86_WRMSR = 30
    DIRTY_RING_FULL = 31
    AP_RESET_HOLD = 32
    X86_BUS_LOCK = 33
    XEN = 34
    NOTIFY = 37
    MEMORY_FAULT = 39  # Linux 6.8


class InternalError(IntEnum):
    """`kvm_run.internal.suberror`, KVM_INTERNAL_ERROR_*."""

    EMULATION = 1
    SIMUL_EX = 2
    DELIVERY_EV = 3
    UNEXPECTED_EXIT_REASON = 4


class SystemEvent(IntEnum):
    """`kvm_run.system_event.type`, KVM_SYSTEM_EVENT_*."""

    SHUTDOWN = 1
    RESET = 2
    CRASH = 3
    WAKEUP = 4
    SUSPEND = 5
    SEV_TERM = 6


class MpState(IntEnum):
    """`kvm_mp_state.mp_state`, KVM_MP_STATE_*; those that x86 has."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4
    AP_RESET_HOLD = 9


class Cap(IntEnum):
    """What KVM_CHECK_EXTENSION and KVM_ENABLE_CAP are asked about, KVM_CAP_*; those that x86 has."""

    IRQCHIP = 0
    HLT = 1
    MMU_SHADOW_CACHE_CONTROL = 2
    USER_MEMORY = 3
    SET_TSS_ADDR = 4
    VAPIC = 6
    EXT_CPUID = 7
    CLOCKSOURCE = 8
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    PIT = 11
    NOP_IO_DELAY = 12
    PV_MMU = 13
    MP_STATE = 14
    COALESCED_MMIO = 15
    SYNC_MMU = 16
    DESTROY_MEMORY_REGION_WORKS = 21
    USER_NMI = 22
    SET_GUEST_DEBUG = 23
    REINJECT_CONTROL = 24
    IRQ_ROUTING = 25
    IRQ_INJECT_STATUS = 26
    JOIN_MEMORY_REGIONS_WORKS = 30
    MCE = 31
    IRQFD = 32
    PIT2 = 33
    SET_BOOT_CPU_ID = 34
    PIT_STATE2 = 35
    IOEVENTFD = 36
    SET_IDENTITY_MAP_ADDR = 37
    XEN_HVM = 38
    ADJUST_CLOCK = 39
    INTERNAL_ERROR_DATA = 40
    VCPU_EVENTS = 41
    HYPERV = 44
    HYPERV_VAPIC = 45
    HYPERV_SPIN = 46
    PCI_SEGMENT = 47
    INTR_SHADOW = 49
    DEBUGREGS = 50
    X86_ROBUST_SINGLESTEP = 51
    ENABLE_CAP = 54
    XSAVE = 55
    XCRS = 56
    ASYNC_PF = 59
    TSC_CONTROL = 60
    GET_TSC_KHZ = 61
    MAX_VCPUS = 66
    TSC_DEADLINE_TIMER = 72
    SYNC_REGS = 74
    KVMCLOCK_CTRL = 76
    SIGNAL_MSI = 77
    READONLY_MEM = 81
    IRQFD_RESAMPLE = 82
    DEVICE_CTRL = 89
    EXT_EMUL_CPUID = 95
    HYPERV_TIME = 96
    IOAPIC_POLARITY_IGNORED = 97
    ENABLE_CAP_VM = 98
    IOEVENTFD_NO_LENGTH = 100
    VM_ATTRIBUTES = 101
    CHECK_EXTENSION_VM = 105
    DISABLE_QUIRKS = 116
    X86_SMM = 117
    MULTI_ADDRESS_SPACE = 118
    SPLIT_IRQCHIP = 121
    IOEVENTFD_ANY_LENGTH = 122
    HYPERV_SYNIC = 123
    VCPU_ATTRIBUTES = 127
    MAX_VCPU_ID = 128
    X2APIC_API = 129
    MSI_DEVID = 131
    IMMEDIATE_EXIT = 136
    X86_DISABLE_EXITS = 143
    HYPERV_SYNIC2 = 148
    HYPERV_VP_INDEX = 149
    GET_MSR_FEATURES = 153
    HYPERV_EVENTFD = 154
    HYPERV_TLBFLUSH = 155
    NESTED_STATE = 157
    MSR_PLATFORM_INFO = 159
    HYPERV_SEND_IPI = 161
    COALESCED_PIO = 162
    HYPERV_ENLIGHTENED_VMCS = 163
    EXCEPTION_PAYLOAD = 164
    HYPERV_CPUID = 167
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    PMU_EVENT_FILTER = 173
    HYPERV_DIRECT_TLBFLUSH = 175
    HALT_POLL = 182
    ASYNC_PF_INT = 183
    LAST_CPU = 184
    SMALLER_MAXPHYADDR = 185
    STEAL_TIME = 187
    X86_USER_SPACE_MSR = 188
    X86_MSR_FILTER = 189
    ENFORCE_PV_FEATURE_CPUID = 190
    SYS_HYPERV_CPUID = 191
    DIRTY_LOG_RING = 192
    X86_BUS_LOCK_EXIT = 193
    SET_GUEST_DEBUG2 = 195
    SGX_ATTRIBUTE = 196
    VM_COPY_ENC_CONTEXT_FROM = 197
    PTP_KVM = 198
    HYPERV_ENFORCE_CPUID = 199
    SREGS2 = 200
    EXIT_HYPERCALL = 201
    BINARY_STATS_FD = 203
    EXIT_ON_EMULATION_FAILURE = 204
    VM_MOVE_ENC_CONTEXT_FROM = 206
    VM_GPA_BITS = 207
    XSAVE2 = 208
    SYS_ATTRIBUTES = 209
    PMU_CAPABILITY = 212
    DISABLE_QUIRKS2 = 213
    VM_TSC_CONTROL = 214
    SYSTEM_EVENT_DATA = 215
    X86_TRIPLE_FAULT_EVENT = 218
    X86_NOTIFY_VMEXIT = 219
    VM_DISABLE_NX_HUGE_PAGES = 220
    DIRTY_LOG_RING_ACQ_REL = 223
    DIRTY_LOG_RING_WITH_BITMAP = 225  # Linux 6.2
    PMU_EVENT_MASKED_EVENTS = 226  # Linux 6.3
    USER_MEMORY2 = 231  # Linux 6.8
    MEMORY_FAULT_INFO = 232  # Linux 6.8
    MEMORY_ATTRIBUTES = 233  # Linux 6.8
    GUEST_MEMFD = 234  # Linux 6.8
    VM_TYPES = 235  # Linux 6.8
    PRE_FAULT_MEMORY = 236  # Linux 6.11
    X86_APIC_BUS_CYCLES_NS = 237  # Linux 6.11
    GUEST_MEMFD_FLAGS = 244  # Linux 6.18


# --- memory ---------------------------------------------------------------------------------------------

KVM_MEM_LOG_DIRTY_PAGES: Final = 1 << 0
KVM_MEM_READONLY: Final = 1 << 1
KVM_MEM_GUEST_MEMFD: Final = 1 << 2  # Linux 6.8


@_layout
class kvm_userspace_memory_region(Structure):
    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64


@_layout
class kvm_userspace_memory_region2(Structure):
    """Linux 6.8."""

    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64
    guest_memfd_offset: u64
    guest_memfd: u32
    pad1: u32
    pad2: Annotated[Array[c_uint64], 14]


GUEST_MEMFD_FLAG_MMAP: Final = 1 << 0  # Linux 6.18
GUEST_MEMFD_FLAG_INIT_SHARED: Final = 1 << 1  # Linux 6.18


@_layout
class kvm_create_guest_memfd(Structure):
    """Linux 6.8."""

    size: u64
    flags: u64
    reserved: Annotated[Array[c_uint64], 6]


KVM_MEMORY_ATTRIBUTE_PRIVATE: Final = 1 << 3  # Linux 6.8


@_layout
class kvm_memory_attributes(Structure):
    """Linux 6.8."""

    address: u64
    size: u64
    attributes: u64
    flags: u64


@_layout
class kvm_pre_fault_memory(Structure):
    """Linux 6.11. The kernel moves `gpa` and `size` on to what is left."""

    gpa: u64
    size: u64
    flags: u64
    padding: Annotated[Array[c_uint64], 5]


@_layout
class kvm_dirty_log(Structure):
    slot: u32
    padding1: u32
    dirty_bitmap: u64  # address of one bit a page, little-endian 64-bit words


@_layout
class kvm_clear_dirty_log(Structure):
    slot: u32
    num_pages: u32
    first_page: u64
    dirty_bitmap: u64


KVM_DIRTY_LOG_PAGE_OFFSET: Final = 64


@_layout
class kvm_dirty_gfn(Structure):
    flags: u32
    slot: u32
    offset: u64


@_layout
class kvm_coalesced_mmio_zone(Structure):
    addr: u64
    size: u32
    pio: u32


@_layout
class kvm_coalesced_mmio(Structure):
    phys_addr: u64
    len: u32
    pio: u32
    data: Annotated[Array[c_uint8], 8]


KVM_COALESCED_MMIO_PAGE_OFFSET: Final = 2


@_layout
class kvm_coalesced_mmio_ring(Structure):
    first: u32
    last: u32
    coalesced_mmio: Annotated[Array[kvm_coalesced_mmio], 0]


_PAGE_SIZE: Final = 4096  # x86
KVM_COALESCED_MMIO_MAX: Final = (_PAGE_SIZE - sizeof(kvm_coalesced_mmio_ring)) // sizeof(kvm_coalesced_mmio)


# --- vCPU state -----------------------------------------------------------------------------------------


@_layout
class kvm_regs(Structure):
    rax: u64
    rbx: u64
    rcx: u64
    rdx: u64
    rsi: u64
    rdi: u64
    rsp: u64
    rbp: u64
    r8: u64
    r9: u64
    r10: u64
    r11: u64
    r12: u64
    r13: u64
    r14: u64
    r15: u64
    rip: u64
    rflags: u64


@_layout
class kvm_segment(Structure):
    base: u64
    limit: u32
    selector: u16
    type: u8
    present: u8
    dpl: u8
    db: u8
    s: u8
    l: u8
    g: u8
    avl: u8
    unusable: u8
    padding: u8


@_layout
class kvm_dtable(Structure):
    base: u64
    limit: u16
    padding: Annotated[Array[c_uint16], 3]


KVM_NR_INTERRUPTS: Final = 256


@_layout
class kvm_sregs(Structure):
    cs: kvm_segment
    ds: kvm_segment
    es: kvm_segment
    fs: kvm_segment
    gs: kvm_segment
    ss: kvm_segment
    tr: kvm_segment
    ldt: kvm_segment
    gdt: kvm_dtable
    idt: kvm_dtable
    cr0: u64
    cr2: u64
    cr3: u64
    cr4: u64
    cr8: u64
    efer: u64
    apic_base: u64
    interrupt_bitmap: Annotated[Array[c_uint64], 4]  # KVM_NR_INTERRUPTS bits


KVM_SREGS2_FLAGS_PDPTRS_VALID: Final = 1


@_layout
class kvm_sregs2(Structure):
    cs: kvm_segment
    ds: kvm_segment
    es: kvm_segment
    fs: kvm_segment
    gs: kvm_segment
    ss: kvm_segment
    tr: kvm_segment
    ldt: kvm_segment
    gdt: kvm_dtable
    idt: kvm_dtable
    cr0: u64
    cr2: u64
    cr3: u64
    cr4: u64
    cr8: u64
    efer: u64
    apic_base: u64
    flags: u64
    pdptrs: Annotated[Array[c_uint64], 4]


@_layout
class kvm_fpu(Structure):
    fpr: Annotated[Array[Array[c_uint8]], 8, 16]
    fcw: u16
    fsw: u16
    ftwx: u8
    pad1: u8
    last_opcode: u16
    last_ip: u64
    last_dp: u64
    xmm: Annotated[Array[Array[c_uint8]], 16, 16]
    mxcsr: u32
    pad2: u32


@_layout
class kvm_xsave(Structure):
    """4096 bytes, or `sized(kvm_xsave, n)` of as many as KVM_CAP_XSAVE2 says, asked of the VM."""

    region: Annotated[Array[c_uint32], 1024]
    extra: Annotated[Array[c_uint32], 0]


@_layout
class kvm_xcr(Structure):
    xcr: u32
    reserved: u32
    value: u64


KVM_MAX_XCRS: Final = 16


@_layout
class kvm_xcrs(Structure):
    nr_xcrs: u32
    flags: u32
    xcrs: Annotated[Array[kvm_xcr], KVM_MAX_XCRS]
    padding: Annotated[Array[c_uint64], 16]


@_layout
class kvm_debugregs(Structure):
    db: Annotated[Array[c_uint64], 4]
    dr6: u64
    dr7: u64
    flags: u64
    reserved: Annotated[Array[c_uint64], 9]


KVM_VCPUEVENT_VALID_NMI_PENDING: Final = 1 << 0
KVM_VCPUEVENT_VALID_SIPI_VECTOR: Final = 1 << 1
KVM_VCPUEVENT_VALID_SHADOW: Final = 1 << 2
KVM_VCPUEVENT_VALID_SMM: Final = 1 << 3
KVM_VCPUEVENT_VALID_PAYLOAD: Final = 1 << 4
KVM_VCPUEVENT_VALID_TRIPLE_FAULT: Final = 1 << 5


@_layout
class EventsException(Structure):
    injected: u8
    nr: u8
    has_error_code: u8
    pending: u8
    error_code: u32


@_layout
class EventsInterrupt(Structure):
    injected: u8
    nr: u8
    soft: u8
    shadow: u8


@_layout
class EventsNmi(Structure):
    injected: u8
    pending: u8
    masked: u8
    pad: u8


@_layout
class EventsSmi(Structure):
    smm: u8
    pending: u8
    smm_inside_nmi: u8
    latched_init: u8


@_layout
class EventsTripleFault(Structure):
    pending: u8


@_layout
class kvm_vcpu_events(Structure):
    exception: EventsException
    interrupt: EventsInterrupt
    nmi: EventsNmi
    sipi_vector: u32
    flags: u32
    smi: EventsSmi
    triple_fault: EventsTripleFault
    reserved: Annotated[Array[c_uint8], 26]
    exception_has_payload: u8
    exception_payload: u64


@_layout
class kvm_mp_state(Structure):
    mp_state: u32  # MpState


KVM_APIC_REG_SIZE: Final = 0x400


@_layout
class kvm_lapic_state(Structure):
    """The xAPIC register page's first 1 KiB: a 32-bit register every 16 bytes."""

    regs: Annotated[Array[c_uint8], KVM_APIC_REG_SIZE]


@_layout
class kvm_interrupt(Structure):
    irq: u32


@_layout
class kvm_translation(Structure):
    linear_address: u64
    physical_address: u64
    valid: u8
    writeable: u8
    usermode: u8
    pad: Annotated[Array[c_uint8], 5]


@_layout
class kvm_signal_mask(Structure):
    len: u32
    sigset: Annotated[Array[c_uint8], 0]


@_layout
class kvm_msr_entry(Structure):
    index: u32
    reserved: u32
    data: u64


@_layout
class kvm_msrs(Structure):
    nmsrs: u32
    pad: u32
    entries: Annotated[Array[kvm_msr_entry], 0]


@_layout
class kvm_msr_list(Structure):
    nmsrs: u32
    indices: Annotated[Array[c_uint32], 0]


KVM_CPUID_FLAG_SIGNIFCANT_INDEX: Final = 1 << 0  # the kernel's spelling
KVM_CPUID_FLAG_STATEFUL_FUNC: Final = 1 << 1
KVM_CPUID_FLAG_STATE_READ_NEXT: Final = 1 << 2


@_layout
class kvm_cpuid_entry2(Structure):
    function: u32
    index: u32
    flags: u32
    eax: u32
    ebx: u32
    ecx: u32
    edx: u32
    padding: Annotated[Array[c_uint32], 3]


@_layout
class kvm_cpuid2(Structure):
    nent: u32
    padding: u32
    entries: Annotated[Array[kvm_cpuid_entry2], 0]


KVM_GUESTDBG_ENABLE: Final = 0x1
KVM_GUESTDBG_SINGLESTEP: Final = 0x2
KVM_GUESTDBG_USE_SW_BP: Final = 0x10000
KVM_GUESTDBG_USE_HW_BP: Final = 0x20000
KVM_GUESTDBG_INJECT_DB: Final = 0x40000
KVM_GUESTDBG_INJECT_BP: Final = 0x80000
KVM_GUESTDBG_BLOCKIRQ: Final = 0x100000


@_layout
class kvm_guest_debug_arch(Structure):
    debugreg: Annotated[Array[c_uint64], 8]


@_layout
class kvm_guest_debug(Structure):
    control: u32
    pad: u32
    arch: kvm_guest_debug_arch


@_layout
class kvm_debug_exit_arch(Structure):
    exception: u32
    pad: u32
    pc: u64
    dr6: u64
    dr7: u64


@_layout
class NestedVmxSmm(Structure):
    flags: u16


@_layout
class kvm_vmx_nested_state_hdr(Structure):
    vmxon_pa: u64
    vmcs12_pa: u64
    smm: NestedVmxSmm
    pad: u16
    flags: u32
    preemption_timer_deadline: u64


@_layout
class kvm_svm_nested_state_hdr(Structure):
    vmcb_pa: u64


@_layout
class NestedHeader(Union):
    vmx: kvm_vmx_nested_state_hdr
    svm: kvm_svm_nested_state_hdr
    pad: Annotated[Array[c_uint8], 120]


@_layout
class kvm_nested_state(Structure):
    """A header of 128 bytes; `sized` to as many in all as KVM_CAP_NESTED_STATE says."""

    flags: u16
    format: u16
    size: u32
    hdr: NestedHeader
    data: Annotated[Array[c_uint8], 0]


# --- kvm_run --------------------------------------------------------------------------------------------

KVM_EXIT_IO_IN: Final = 0
KVM_EXIT_IO_OUT: Final = 1
KVM_MSR_EXIT_REASON_INVAL: Final = 1 << 0
KVM_MSR_EXIT_REASON_UNKNOWN: Final = 1 << 1
KVM_MSR_EXIT_REASON_FILTER: Final = 1 << 2
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES: Final = 1 << 0
KVM_NOTIFY_CONTEXT_INVALID: Final = 1 << 0
KVM_MEMORY_EXIT_FLAG_PRIVATE: Final = 1 << 3  # Linux 6.8
KVM_RUN_X86_SMM: Final = 1 << 0
KVM_RUN_X86_BUS_LOCK: Final = 1 << 1
KVM_SYNC_X86_REGS: Final = 1 << 0
KVM_SYNC_X86_SREGS: Final = 1 << 1
KVM_SYNC_X86_EVENTS: Final = 1 << 2
KVM_PIO_PAGE_OFFSET: Final = 1


@_layout
class HardwareExit(Structure):
    hardware_exit_reason: u64


@_layout
class FailEntryExit(Structure):
    hardware_entry_failure_reason: u64
    cpu: u32


@_layout
class ExceptionExit(Structure):
    exception: u32
    error_code: u32


@_layout
class IoExit(Structure):
    direction: u8  # KVM_EXIT_IO_IN or KVM_EXIT_IO_OUT
    size: u8  # bytes of one access: 1, 2 or 4
    port: u16
    count: u32  # accesses; more than 1 for a string instruction
    data_offset: u64  # of the first datum, from the start of kvm_run's mapping


@_layout
class DebugExit(Structure):
    arch: kvm_debug_exit_arch


@_layout
class MmioExit(Structure):
    phys_addr: u64
    data: Annotated[Array[c_uint8], 8]
    len: u32
    is_write: u8


@_layout
class HypercallExit(Structure):
    nr: u64
    args: Annotated[Array[c_uint64], 6]
    ret: u64
    longmode: u32  # since Linux 6.4 the low half of 64-bit flags


@_layout
class TprAccessExit(Structure):
    rip: u64
    is_write: u32
    pad: u32


@_layout
class InternalErrorExit(Structure):
    suberror: u32  # InternalError
    ndata: u32
    data: Annotated[Array[c_uint64], 16]


@_layout
class EmulationFailureExit(Structure):
    """`internal` for InternalError.EMULATION, seen another way."""

    suberror: u32
    ndata: u32
    flags: u64
    insn_size: u8
    insn_bytes: Annotated[Array[c_uint8], 15]


@_layout
class SystemEventExit(Structure):
    type: u32  # SystemEvent
    ndata: u32
    data: Annotated[Array[c_uint64], 16]


@_layout
class EoiExit(Structure):
    vector: u8


@_layout
class MsrExit(Structure):
    error: u8
    pad: Annotated[Array[c_uint8], 7]
    reason: u32
    index: u32
    data: u64


@_layout
class NotifyExit(Structure):
    flags: u32


@_layout
class MemoryFaultExit(Structure):
    """Linux 6.8. It comes with KVM_RUN failing with EFAULT."""

    flags: u64
    gpa: u64
    size: u64


@_layout
class ExitData(Union):
    hw: HardwareExit
    fail_entry: FailEntryExit
    ex: ExceptionExit
    io: IoExit
    debug: DebugExit
    mmio: MmioExit
    hypercall: HypercallExit
    tpr_access: TprAccessExit
    internal: InternalErrorExit
    emulation_failure: EmulationFailureExit
    system_event: SystemEventExit
    eoi: EoiExit
    msr: MsrExit
    notify: NotifyExit
    memory_fault: MemoryFaultExit
    padding: Annotated[bytes, c_char * 256]


@_layout
class kvm_sync_regs(Structure):
    regs: kvm_regs
    sregs: kvm_sregs
    events: kvm_vcpu_events


SYNC_REGS_SIZE_BYTES: Final = 2048


@_layout
class SyncArea(Union):
    regs: kvm_sync_regs
    padding: Annotated[bytes, c_char * SYNC_REGS_SIZE_BYTES]


@_layout
class kvm_run(Structure):
    """The page shared with the kernel at the start of a vCPU fd's mapping.

    `run.io` and `run.exit.io` are the same: the kernel's union has no name, and the second form is the typed
    one.
    """

    _anonymous_ = ("exit",)

    request_interrupt_window: u8
    immediate_exit: u8
    padding1: Annotated[Array[c_uint8], 6]
    exit_reason: u32  # Exit
    ready_for_interrupt_injection: u8
    if_flag: u8
    flags: u16
    cr8: u64
    apic_base: u64
    exit: ExitData
    kvm_valid_regs: u64
    kvm_dirty_regs: u64
    s: SyncArea


# --- interrupts -----------------------------------------------------------------------------------------


@_layout
class kvm_irq_level(Structure):
    irq: u32  # GSI
    level: u32


@_layout
class kvm_pic_state(Structure):
    last_irr: u8
    irr: u8
    imr: u8
    isr: u8
    priority_add: u8
    irq_base: u8
    read_reg_select: u8
    poll: u8
    special_mask: u8
    init_state: u8
    auto_eoi: u8
    rotate_on_auto_eoi: u8
    special_fully_nested_mode: u8
    init4: u8
    elcr: u8
    elcr_mask: u8


KVM_IOAPIC_NUM_PINS: Final = 24


@_layout
class RedirectionFields(Structure):
    vector: u8
    delivery_mode: Annotated[int, c_uint8, 3]
    dest_mode: Annotated[int, c_uint8, 1]
    delivery_status: Annotated[int, c_uint8, 1]
    polarity: Annotated[int, c_uint8, 1]
    remote_irr: Annotated[int, c_uint8, 1]
    trig_mode: Annotated[int, c_uint8, 1]
    mask: Annotated[int, c_uint8, 1]
    reserve: Annotated[int, c_uint8, 7]
    reserved: Annotated[Array[c_uint8], 4]
    dest_id: u8


@_layout
class Redirection(Union):
    bits: u64
    fields: RedirectionFields


@_layout
class kvm_ioapic_state(Structure):
    base_address: u64
    ioregsel: u32
    id: u32
    irr: u32
    pad: u32
    redirtbl: Annotated[Array[Redirection], KVM_IOAPIC_NUM_PINS]


KVM_IRQCHIP_PIC_MASTER: Final = 0
KVM_IRQCHIP_PIC_SLAVE: Final = 1
KVM_IRQCHIP_IOAPIC: Final = 2
KVM_NR_IRQCHIPS: Final = 3


@_layout
class Chip(Union):
    dummy: Annotated[bytes, c_char * 512]
    pic: kvm_pic_state
    ioapic: kvm_ioapic_state


@_layout
class kvm_irqchip(Structure):
    chip_id: u32  # KVM_IRQCHIP_*
    pad: u32
    chip: Chip


@_layout
class kvm_irq_routing_irqchip(Structure):
    irqchip: u32
    pin: u32


@_layout
class kvm_irq_routing_msi(Structure):
    address_lo: u32
    address_hi: u32
    data: u32
    devid: u32


KVM_IRQ_ROUTING_IRQCHIP: Final = 1
KVM_IRQ_ROUTING_MSI: Final = 2


@_layout
class Route(Union):
    irqchip: kvm_irq_routing_irqchip
    msi: kvm_irq_routing_msi
    pad: Annotated[Array[c_uint32], 8]


@_layout
class kvm_irq_routing_entry(Structure):
    gsi: u32
    type: u32  # KVM_IRQ_ROUTING_*
    flags: u32
    pad: u32
    u: Route


@_layout
class kvm_irq_routing(Structure):
    nr: u32
    flags: u32
    entries: Annotated[Array[kvm_irq_routing_entry], 0]


KVM_MSI_VALID_DEVID: Final = 1 << 0


@_layout
class kvm_msi(Structure):
    address_lo: u32
    address_hi: u32
    data: u32
    flags: u32
    devid: u32
    pad: Annotated[Array[c_uint8], 12]


KVM_IRQFD_FLAG_DEASSIGN: Final = 1 << 0
KVM_IRQFD_FLAG_RESAMPLE: Final = 1 << 1


@_layout
class kvm_irqfd(Structure):
    fd: u32
    gsi: u32
    flags: u32
    resamplefd: u32
    pad: Annotated[Array[c_uint8], 16]


KVM_IOEVENTFD_FLAG_DATAMATCH: Final = 1 << 0
KVM_IOEVENTFD_FLAG_PIO: Final = 1 << 1
KVM_IOEVENTFD_FLAG_DEASSIGN: Final = 1 << 2


@_layout
class kvm_ioeventfd(Structure):
    datamatch: u64
    addr: u64
    len: u32  # 1, 2, 4 or 8 bytes; 0: any
    fd: s32
    flags: u32
    pad: Annotated[Array[c_uint8], 36]


# --- PIT, clock -----------------------------------------------------------------------------------------

KVM_PIT_SPEAKER_DUMMY: Final = 1
KVM_PIT_FLAGS_HPET_LEGACY: Final = 1 << 0
KVM_PIT_FLAGS_SPEAKER_DATA_ON: Final = 1 << 1


@_layout
class kvm_pit_config(Structure):
    flags: u32
    pad: Annotated[Array[c_uint32], 15]


@_layout
class kvm_pit_channel_state(Structure):
    count: u32
    latched_count: u16
    count_latched: u8
    status_latched: u8
    status: u8
    read_state: u8
    write_state: u8
    write_latch: u8
    rw_mode: u8
    mode: u8
    bcd: u8
    gate: u8
    count_load_time: s64  # ns, CLOCK_MONOTONIC of the host


@_layout
class kvm_pit_state2(Structure):
    channels: Annotated[Array[kvm_pit_channel_state], 3]
    flags: u32
    reserved: Annotated[Array[c_uint32], 9]


@_layout
class kvm_reinject_control(Structure):
    pit_reinject: u8
    reserved: Annotated[Array[c_uint8], 31]


KVM_CLOCK_TSC_STABLE: Final = 1 << 1
KVM_CLOCK_REALTIME: Final = 1 << 2
KVM_CLOCK_HOST_TSC: Final = 1 << 3


@_layout
class kvm_clock_data(Structure):
    clock: u64  # ns
    flags: u32  # KVM_CLOCK_*
    pad0: u32
    realtime: u64  # ns, CLOCK_REALTIME of the host
    host_tsc: u64
    pad: Annotated[Array[c_uint32], 4]


# --- the rest -------------------------------------------------------------------------------------------


@_layout
class kvm_enable_cap(Structure):
    cap: u32  # Cap
    flags: u32
    args: Annotated[Array[c_uint64], 4]
    pad: Annotated[Array[c_uint8], 64]


KVM_VCPU_TSC_CTRL: Final = 0  # attribute group of a vCPU
KVM_VCPU_TSC_OFFSET: Final = 0  # attribute of that group


@_layout
class kvm_device_attr(Structure):
    flags: u32
    group: u32
    attr: u64
    addr: u64  # address of the value


@_layout
class kvm_stats_header(Structure):
    flags: u32
    name_size: u32
    num_desc: u32
    id_offset: u32
    desc_offset: u32
    data_offset: u32


@_layout
class kvm_stats_desc(Structure):
    flags: u32
    exponent: s16
    size: u16
    offset: u32
    bucket_size: u32
    name: Annotated[bytes, c_char * 0]


KVM_MSR_FILTER_READ: Final = 1 << 0
KVM_MSR_FILTER_WRITE: Final = 1 << 1
KVM_MSR_FILTER_DEFAULT_DENY: Final = 1 << 0
KVM_MSR_FILTER_MAX_RANGES: Final = 16


@_layout
class kvm_msr_filter_range(Structure):
    flags: u32
    nmsrs: u32
    base: u32
    bitmap: u64  # address


@_layout
class kvm_msr_filter(Structure):
    flags: u32
    ranges: Annotated[Array[kvm_msr_filter_range], KVM_MSR_FILTER_MAX_RANGES]


# --- requests on /dev/kvm -------------------------------------------------------------------------------

KVM_GET_API_VERSION: Final = _IO("KVM_GET_API_VERSION", 0x00)
KVM_CREATE_VM: Final = _IO("KVM_CREATE_VM", 0x01)
KVM_GET_MSR_INDEX_LIST: Final = _IOWR("KVM_GET_MSR_INDEX_LIST", 0x02, kvm_msr_list)
KVM_CHECK_EXTENSION: Final = _IO("KVM_CHECK_EXTENSION", 0x03)
KVM_GET_VCPU_MMAP_SIZE: Final = _IO("KVM_GET_VCPU_MMAP_SIZE", 0x04)
KVM_GET_SUPPORTED_CPUID: Final = _IOWR("KVM_GET_SUPPORTED_CPUID", 0x05, kvm_cpuid2)
KVM_GET_EMULATED_CPUID: Final = _IOWR("KVM_GET_EMULATED_CPUID", 0x09, kvm_cpuid2)
KVM_GET_MSR_FEATURE_INDEX_LIST: Final = _IOWR("KVM_GET_MSR_FEATURE_INDEX_LIST", 0x0A, kvm_msr_list)

# --- requests on a VM -----------------------------------------------------------------------------------

KVM_CREATE_VCPU: Final = _IO("KVM_CREATE_VCPU", 0x41)
KVM_GET_DIRTY_LOG: Final = _IOW("KVM_GET_DIRTY_LOG", 0x42, kvm_dirty_log)
KVM_SET_USER_MEMORY_REGION: Final = _IOW("KVM_SET_USER_MEMORY_REGION", 0x46, kvm_userspace_memory_region)
KVM_SET_TSS_ADDR: Final = _IO("KVM_SET_TSS_ADDR", 0x47)
KVM_SET_IDENTITY_MAP_ADDR: Final = _IOW("KVM_SET_IDENTITY_MAP_ADDR", 0x48, c_uint64)
KVM_SET_USER_MEMORY_REGION2: Final = _IOW(  # Linux 6.8
    "KVM_SET_USER_MEMORY_REGION2", 0x49, kvm_userspace_memory_region2, ("guest_memfd",)
)
KVM_CREATE_IRQCHIP: Final = _IO("KVM_CREATE_IRQCHIP", 0x60)
KVM_IRQ_LINE: Final = _IOW("KVM_IRQ_LINE", 0x61, kvm_irq_level)
KVM_GET_IRQCHIP: Final = _IOWR("KVM_GET_IRQCHIP", 0x62, kvm_irqchip)
KVM_SET_IRQCHIP: Final = _IOR("KVM_SET_IRQCHIP", 0x63, kvm_irqchip)
KVM_REGISTER_COALESCED_MMIO: Final = _IOW("KVM_REGISTER_COALESCED_MMIO", 0x67, kvm_coalesced_mmio_zone)
KVM_UNREGISTER_COALESCED_MMIO: Final = _IOW("KVM_UNREGISTER_COALESCED_MMIO", 0x68, kvm_coalesced_mmio_zone)
KVM_SET_GSI_ROUTING: Final = _IOW("KVM_SET_GSI_ROUTING", 0x6A, kvm_irq_routing)
KVM_REINJECT_CONTROL: Final = _IO("KVM_REINJECT_CONTROL", 0x71)
KVM_IRQFD: Final = _IOW("KVM_IRQFD", 0x76, kvm_irqfd, ("fd", "resamplefd"))
KVM_CREATE_PIT2: Final = _IOW("KVM_CREATE_PIT2", 0x77, kvm_pit_config)
KVM_SET_BOOT_CPU_ID: Final = _IO("KVM_SET_BOOT_CPU_ID", 0x78)
KVM_IOEVENTFD: Final = _IOW("KVM_IOEVENTFD", 0x79, kvm_ioeventfd, ("fd",))
KVM_SET_CLOCK: Final = _IOW("KVM_SET_CLOCK", 0x7B, kvm_clock_data)
KVM_GET_CLOCK: Final = _IOR("KVM_GET_CLOCK", 0x7C, kvm_clock_data)
KVM_GET_PIT2: Final = _IOR("KVM_GET_PIT2", 0x9F, kvm_pit_state2)
KVM_SET_PIT2: Final = _IOW("KVM_SET_PIT2", 0xA0, kvm_pit_state2)
KVM_SIGNAL_MSI: Final = _IOW("KVM_SIGNAL_MSI", 0xA5, kvm_msi)
KVM_CLEAR_DIRTY_LOG: Final = _IOWR("KVM_CLEAR_DIRTY_LOG", 0xC0, kvm_clear_dirty_log)
KVM_X86_SET_MSR_FILTER: Final = _IOW("KVM_X86_SET_MSR_FILTER", 0xC6, kvm_msr_filter)
KVM_RESET_DIRTY_RINGS: Final = _IO("KVM_RESET_DIRTY_RINGS", 0xC7)
KVM_SET_MEMORY_ATTRIBUTES: Final = _IOW("KVM_SET_MEMORY_ATTRIBUTES", 0xD2, kvm_memory_attributes)  # Linux 6.8
KVM_CREATE_GUEST_MEMFD: Final = _IOWR("KVM_CREATE_GUEST_MEMFD", 0xD4, kvm_create_guest_memfd)  # Linux 6.8

# --- requests on a vCPU ---------------------------------------------------------------------------------

KVM_RUN: Final = _IO("KVM_RUN", 0x80)
KVM_GET_REGS: Final = _IOR("KVM_GET_REGS", 0x81, kvm_regs)
KVM_SET_REGS: Final = _IOW("KVM_SET_REGS", 0x82, kvm_regs)
KVM_GET_SREGS: Final = _IOR("KVM_GET_SREGS", 0x83, kvm_sregs)
KVM_SET_SREGS: Final = _IOW("KVM_SET_SREGS", 0x84, kvm_sregs)
KVM_TRANSLATE: Final = _IOWR("KVM_TRANSLATE", 0x85, kvm_translation)
KVM_INTERRUPT: Final = _IOW("KVM_INTERRUPT", 0x86, kvm_interrupt)
KVM_GET_MSRS: Final = _IOWR("KVM_GET_MSRS", 0x88, kvm_msrs)
KVM_SET_MSRS: Final = _IOW("KVM_SET_MSRS", 0x89, kvm_msrs)
KVM_SET_SIGNAL_MASK: Final = _IOW("KVM_SET_SIGNAL_MASK", 0x8B, kvm_signal_mask)
KVM_GET_FPU: Final = _IOR("KVM_GET_FPU", 0x8C, kvm_fpu)
KVM_SET_FPU: Final = _IOW("KVM_SET_FPU", 0x8D, kvm_fpu)
KVM_GET_LAPIC: Final = _IOR("KVM_GET_LAPIC", 0x8E, kvm_lapic_state)
KVM_SET_LAPIC: Final = _IOW("KVM_SET_LAPIC", 0x8F, kvm_lapic_state)
KVM_SET_CPUID2: Final = _IOW("KVM_SET_CPUID2", 0x90, kvm_cpuid2)
KVM_GET_CPUID2: Final = _IOWR("KVM_GET_CPUID2", 0x91, kvm_cpuid2)
KVM_GET_MP_STATE: Final = _IOR("KVM_GET_MP_STATE", 0x98, kvm_mp_state)
KVM_SET_MP_STATE: Final = _IOW("KVM_SET_MP_STATE", 0x99, kvm_mp_state)
KVM_NMI: Final = _IO("KVM_NMI", 0x9A)
KVM_SET_GUEST_DEBUG: Final = _IOW("KVM_SET_GUEST_DEBUG", 0x9B, kvm_guest_debug)
KVM_GET_VCPU_EVENTS: Final = _IOR("KVM_GET_VCPU_EVENTS", 0x9F, kvm_vcpu_events)
KVM_SET_VCPU_EVENTS: Final = _IOW("KVM_SET_VCPU_EVENTS", 0xA0, kvm_vcpu_events)
KVM_GET_DEBUGREGS: Final = _IOR("KVM_GET_DEBUGREGS", 0xA1, kvm_debugregs)
KVM_SET_DEBUGREGS: Final = _IOW("KVM_SET_DEBUGREGS", 0xA2, kvm_debugregs)
KVM_GET_XSAVE: Final = _IOR("KVM_GET_XSAVE", 0xA4, kvm_xsave)
KVM_SET_XSAVE: Final = _IOW("KVM_SET_XSAVE", 0xA5, kvm_xsave)
KVM_GET_XCRS: Final = _IOR("KVM_GET_XCRS", 0xA6, kvm_xcrs)
KVM_SET_XCRS: Final = _IOW("KVM_SET_XCRS", 0xA7, kvm_xcrs)
KVM_KVMCLOCK_CTRL: Final = _IO("KVM_KVMCLOCK_CTRL", 0xAD)
KVM_SMI: Final = _IO("KVM_SMI", 0xB7)
KVM_GET_NESTED_STATE: Final = _IOWR("KVM_GET_NESTED_STATE", 0xBE, kvm_nested_state)
KVM_SET_NESTED_STATE: Final = _IOW("KVM_SET_NESTED_STATE", 0xBF, kvm_nested_state)
KVM_GET_SREGS2: Final = _IOR("KVM_GET_SREGS2", 0xCC, kvm_sregs2)
KVM_SET_SREGS2: Final = _IOW("KVM_SET_SREGS2", 0xCD, kvm_sregs2)
KVM_GET_XSAVE2: Final = _IOR("KVM_GET_XSAVE2", 0xCF, kvm_xsave)
KVM_PRE_FAULT_MEMORY: Final = _IOWR("KVM_PRE_FAULT_MEMORY", 0xD5, kvm_pre_fault_memory)  # Linux 6.11

# --- requests on a VM or a vCPU -------------------------------------------------------------------------

KVM_SET_TSC_KHZ: Final = _IO("KVM_SET_TSC_KHZ", 0xA2)
KVM_GET_TSC_KHZ: Final = _IO("KVM_GET_TSC_KHZ", 0xA3)
KVM_ENABLE_CAP: Final = _IOW("KVM_ENABLE_CAP", 0xA3, kvm_enable_cap)
KVM_GET_STATS_FD: Final = _IO("KVM_GET_STATS_FD", 0xCE)
KVM_SET_DEVICE_ATTR: Final = _IOW("KVM_SET_DEVICE_ATTR", 0xE1, kvm_device_attr)
KVM_GET_DEVICE_ATTR: Final = _IOW("KVM_GET_DEVICE_ATTR", 0xE2, kvm_device_attr)
KVM_HAS_DEVICE_ATTR: Final = _IOW("KVM_HAS_DEVICE_ATTR", 0xE3, kvm_device_attr)
