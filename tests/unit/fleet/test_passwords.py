"""What a host does about a guest's password, given what the fleet has."""

import pytest

from imdsproxy.fleet.guests import CLEARED, Forget, Keep, PasswordStep, Send, plan_password


@pytest.mark.parametrize(
    ("local", "fleet", "before", "step"),
    [
        (None, None, None, None),
        (None, b"p", None, Keep(b"p")),
        (b"p", b"p", None, None),
        # Another host's was first.
        (b"q", b"p", None, Keep(b"p")),
        (b"p", None, None, Send(b"p")),
        (b"p", CLEARED, b"p", Forget()),
        # Posted after the one before was cleared.
        (b"q", CLEARED, b"p", Send(b"q")),
        (b"q", CLEARED, None, Send(b"q")),
        (None, CLEARED, b"p", None),
    ],
)
def test_a_password_is_where_its_instance_is_until_it_is_cleared(
    local: bytes | None, fleet: bytes | None, before: bytes | None, step: PasswordStep
) -> None:
    assert plan_password(local, fleet, before) == step
