"""What the monitor was told of a guest while it was on its way."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from vmm.process import Options
from vmm.process.new_side import NewSide


@pytest.mark.parametrize(
    ("ran", "held", "wish", "call"),
    [
        (True, False, True, "stop"),
        (True, True, False, "cont"),
        (True, False, False, None),
        (True, True, True, None),
        (False, False, True, None),  # it was paused, and still is
    ],
)
def test_a_wish_that_comes_as_the_guest_does(ran: bool, held: bool, wish: bool, call: str | None) -> None:
    """It is too late for the guest's arrival, and was answered as if it were not."""
    guest, loop, other = mock.Mock(held=wish), mock.Mock(ending=False), mock.Mock()
    parts: Any = guest, other, loop, other, other, other
    NewSide(*parts, Options())._arrived(ran, held)
    guest.own.assert_called_once_with()
    assert [name for name, _, _ in guest.machine.method_calls] == ([call] if call else [])
