"""`vmm version`: everything that two VMMs must agree on in a handover, and the kernel's side of it."""

from __future__ import annotations

import argparse
import json
import platform

import vmm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vmm version`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the versions. Without a usable /dev/kvm its line says why, and that is no failure."""
    from vmm.cpr.protocol import OLDEST_VERSION, VERSION
    from vmm.errors import HostError
    from vmm.machine.host import kvm_api_version
    from vmm.machine.ports import KEEPER_PROTOCOL
    from vmm.state.arena import LAYOUT_VERSION

    api: int | None = None
    why: str | None = None
    try:
        api = kvm_api_version()
    except HostError as error:
        why = str(error)
    versions = {
        "vmm": vmm.__version__,
        "kvm-api": api,
        "kvm-error": why,
        "state-layout": LAYOUT_VERSION,
        "oldest-state-layout": LAYOUT_VERSION,
        "protocol": VERSION,
        "oldest-protocol": OLDEST_VERSION,
        "keeper-protocol": KEEPER_PROTOCOL,
        "python": platform.python_version(),
        "kernel": platform.release(),
    }
    if arguments.json:
        print(json.dumps(versions))
        return 0
    print(f"vmm            {vmm.__version__}")
    print(f"KVM API        {api if why is None else why}")
    print(f"state layout   {LAYOUT_VERSION} (understands no other; of a section also the version before)")
    print(f"protocol       {VERSION} (understands {OLDEST_VERSION} to {VERSION})")
    print(f"keeper         {KEEPER_PROTOCOL} (understands no other)")
    print(f"Python         {versions['python']}, Linux {versions['kernel']}")
    return 0
