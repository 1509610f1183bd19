"""Whether guests can run on this host, by the product's own probe and in its own sentence.

`python -m tests.host` says on stderr what is missing, and how to get it, and exits with 1; or says nothing.
"""

from __future__ import annotations

import os
import sys

from vmm.errors import HostError
from vmm.kvm import Port, System, require


def no_kvm(path: str | os.PathLike[str] = "/dev/kvm", port: Port | None = None) -> str | None:
    """Why no guest can run on the KVM at `path`; None where one can."""
    try:
        with System(path, port) as system:
            require(system)
    except HostError as error:
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(no_kvm())
