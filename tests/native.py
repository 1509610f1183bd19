"""Does this machine's KVM execute guest instructions, or emulate them one by one?

An emulating KVM (under PVM, say) lacks what its emulator lacks: SSE arithmetic, AVX, XSAVE. Tests that need
those call `need_native_instructions` and skip with the reason.
"""

from __future__ import annotations

from functools import cache

import pytest

from tests.kvm.real_mode import machine_with
from vmm.kvm import Exit

# mov eax, cr4; or eax, 0x40600 (OSFXSR, OSXMMEXCPT, OSXSAVE); mov cr4, eax; xor ecx, ecx; xgetbv; addps xmm0,
# xmm1; hlt
PROBE = bytes.fromhex("0f20e0 660d00060400 0f22e0 6631c9 0f01d0 0f58c1 f4")


@cache
def _missing() -> str:
    with machine_with(PROBE) as machine:
        machine.vcpu.set_cpuid(machine.system.supported_cpuid())
        machine.enter_at()
        reason = machine.next_exit()
        if reason == Exit.HLT:
            return ""
        at = machine.regs().rip
    return f"this KVM does not execute XGETBV and ADDPS: exit {reason.name} at {at:#x}"


def need_native_instructions() -> None:
    """Skip the test where guests cannot execute XSAVE and SSE."""
    if missing := _missing():
        pytest.skip(missing)
