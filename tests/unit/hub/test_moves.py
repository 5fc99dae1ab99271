"""On which hosts an instance is after each step of its move."""

import pytest

from imdsproxy.core.fleet.layout import HostId
from imdsproxy.core.model import InstanceId
from imdsproxy.errors import NotFound
from imdsproxy.hub.plan_writes import choose_departure, no_such

_A, _B, _C = (HostId(one) for one in "abc")
_WEB = InstanceId("web")


@pytest.mark.parametrize(
    ("hosts", "host", "cancel", "after"),
    [
        # Its guest has gone from the first, or has not come to the last.
        ((_A, _B), _A, False, (_B,)),
        ((_A, _B), _B, True, (_A,)),
        # Back again, though the move before was not finished.
        ((_A, _B), _B, False, (_A,)),
        # Its guest does not start where it was.
        ((_A, _B), _A, True, (_A, _B)),
        # One host always stays.
        ((_A,), _A, False, (_A,)),
        ((_A,), _A, True, (_A,)),
        # The others stay.
        ((_A, _B, _C), _A, False, (_B, _C)),
        ((_A, _B, _C), _C, True, (_A, _B)),
    ],
)
def test_a_host_takes_off_an_instance_nothing_but_itself_and_one_host_stays(
    hosts: tuple[HostId, ...], host: HostId, *, cancel: bool, after: tuple[HostId, ...]
) -> None:
    assert choose_departure(_WEB, host, cancel=cancel)(hosts) == after


@pytest.mark.parametrize("cancel", [False, True])
def test_of_an_instance_that_is_elsewhere_a_host_is_answered_as_of_none(*, cancel: bool) -> None:
    with pytest.raises(NotFound) as refused:
        choose_departure(_WEB, _C, cancel=cancel)((_A, _B))
    none = no_such("instance", _WEB)
    assert (refused.value.message, refused.value.hint) == (none.message, none.hint)
