"""The tests of vCPUs, memory and state once more, the ioctls being carried out in a keeper: nothing above the
port can tell the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.kvm import real_mode, test_kvm_run, test_kvm_state
from tests.kvm.keeping import keeper_port
from vmm.kvm.keeper_port import KeeperPort

pytestmark = pytest.mark.kvm

# those that are about the calling thread's own signals, which a keeper's vCPU threads do not see
OF_THIS_PROCESS = {
    "test_a_blocked_signal_ends_a_run_under_way",
    "test_a_kick_before_the_run_is_not_lost",
    "test_no_signal_mask_is_the_threads_own",
}


@pytest.fixture(autouse=True)
def _in_a_keeper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ExitStack() as keepers:

        def start() -> KeeperPort:
            return keepers.enter_context(keeper_port())

        monkeypatch.setattr(real_mode, "DirectPort", start)
        yield


for _module in (test_kvm_run, test_kvm_state):
    globals().update(
        {
            name: value
            for name, value in vars(_module).items()
            if name.startswith("test_") and name not in OF_THIS_PROCESS and callable(value)
        }
    )
