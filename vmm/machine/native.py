"""Does this host's KVM execute a guest's instructions, or emulate them one by one?

An emulating KVM (under PVM, say) lacks what its emulator lacks: SSE arithmetic, AVX, XSAVE. No capability
says so, and it is tried, in a VM of its own that ends with it.
"""

from __future__ import annotations

from vmm.boot.cpuid import FEATURES_LEAF
from vmm.fds import FdStore
from vmm.kvm import Exit, System, abi
from vmm.memory import GuestMemory

ENTRY, RAM_SIZE = 0x1000, 0x100000
FLAGS = 2  # bit 1 of FLAGS is always set
XSAVE_AND_AVX = 1 << 26 | 1 << 28  # leaf 1 ECX
# mov eax, cr4; or eax, 0x40600 (OSFXSR, OSXMMEXCPT, OSXSAVE); mov cr4, eax; xor ecx, ecx; xgetbv; addps xmm0,
# xmm1; hlt
PROBE = bytes.fromhex("0f20e0 660d00060400 0f22e0 6631c9 0f01d0 0f58c1 f4")


def executes_avx() -> bool:
    """Whether guests have AVX here and can use it."""
    with System() as system:
        block = system.supported_cpuid()
    features = next((one.ecx for one in block.entries[: block.nent] if one.function == FEATURES_LEAF), 0)
    return features & XSAVE_AND_AVX == XSAVE_AND_AVX and what_is_missing() is None


def what_is_missing() -> str | None:
    """What this KVM does not execute, in a sentence; None where it executes natively. Raises HostError."""
    fds = FdStore()
    memory = GuestMemory.map(fds, RAM_SIZE)
    try:
        memory.write(ENTRY, PROBE)
        [region] = memory.regions
        with System() as system, system.create_vm() as vm:
            vm.set_tss_address()
            vm.set_identity_map()
            vm.set_memory(0, region.gpa, region.size, region.hva, region.fd, 0)
            with vm.create_vcpu(0) as vcpu:
                vcpu.set_cpuid(system.supported_cpuid())
                sregs, regs = abi.kvm_sregs(), abi.kvm_regs(rip=ENTRY, rsp=0x8000, rflags=FLAGS)
                vcpu.get_sregs(sregs)
                sregs.cs.base = sregs.cs.selector = 0
                vcpu.set_sregs(sregs)
                vcpu.set_regs(regs)
                while not vcpu.run():
                    pass
                reason = Exit(vcpu.run_page.exit_reason)
                vcpu.get_regs(regs)
    finally:
        memory.close()
        fds.close()
    if reason == Exit.HLT:
        return None
    return f"this KVM does not execute XGETBV and ADDPS: exit {reason.name} at {regs.rip:#x}"
