"""What the design rests on: another process gets EIO from a VM's fds, and can map a vCPU's page."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kvm.real_mode import PORT, machine_with
from vmm.kvm import Exit

ROOT = Path(__file__).resolve().parents[2]

RECEIVER = """
import json, socket, sys
from vmm.kvm import DirectPort, IoctlError, Vcpu, Vm, abi

def error_of(call, *args):
    try:
        call(*args)
    except IoctlError as error:
        return error.errno, str(error)

fds = socket.recv_fds(socket.socket(fileno=int(sys.argv[1])), 1, 2)[1]
with Vm(fds[0], DirectPort(), int(sys.argv[2])) as vm, Vcpu(fds[1], 0, vm.port, vm.mmap_size) as vcpu:
    io = vcpu.run_page.io
    print(json.dumps({
        "check": error_of(vm.check, abi.Cap.USER_MEMORY),
        "get_regs": error_of(vcpu.get_regs, abi.kvm_regs()),
        "run": error_of(vcpu.run),
        "exit_reason": vcpu.run_page.exit_reason,
        "port": io.port,
        "data": bytes(vcpu.io_data(io.data_offset, io.size * io.count)).decode(),
    }))
    vcpu.io_data(io.data_offset, io.size)[:] = b"?"
"""


@pytest.mark.kvm
def test_received_fds_answer_eio_and_the_page_maps() -> None:
    code = b"\xb0\x41\xba\xf8\x03\xee\xf4"  # mov al, 'A'; mov dx, 0x3f8; out dx, al; hlt
    here, there = socket.socketpair()
    with machine_with(code) as machine, here, there:
        assert machine.next_exit() == Exit.IO
        receiver = subprocess.Popen(
            [sys.executable, "-c", RECEIVER, str(there.fileno()), str(machine.system.mmap_size)],
            cwd=ROOT,
            pass_fds=[there.fileno()],
            stdout=subprocess.PIPE,
            text=True,
        )
        with receiver:
            socket.send_fds(here, [b"x"], [machine.vm.fd, machine.vcpu.fd])
            answer = json.loads(receiver.communicate(timeout=30)[0])
        assert receiver.returncode == 0
        assert answer == {
            "check": [errno.EIO, "[Errno 5] KVM_CHECK_EXTENSION: Input/output error"],
            "get_regs": [errno.EIO, "[Errno 5] KVM_GET_REGS: Input/output error"],
            "run": [errno.EIO, "[Errno 5] KVM_RUN: Input/output error"],
            "exit_reason": Exit.IO,
            "port": PORT,
            "data": "A",
        }
        assert bytes(machine.io_data()) == b"?"  # the page is shared, both ways
        assert machine.next_exit() == Exit.HLT


@pytest.mark.kvm
def test_a_closed_vcpu_lets_go_of_its_mapping() -> None:
    """A mapping pins the VM, so one that `close` left behind would keep the whole guest alive."""
    with machine_with(b"\xf4") as machine:
        before = _vcpu_mappings()
        with machine.vm.create_vcpu(1):
            assert _vcpu_mappings() == before + 1
        assert _vcpu_mappings() == before


def _vcpu_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("anon_inode:kvm-vcpu")
