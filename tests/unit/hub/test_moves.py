"""On which hosts an instance is after each step of its move."""

import pytest

from imdsproxy.errors import NotFound, RecordConflict, RequestRefused
from imdsproxy.fleet.layout import HostId
from imdsproxy.hub.store.plan_changes import choose_departure, choose_move
from imdsproxy.hub.store.transactions import no_such
from imdsproxy.model.entities import InstanceId

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


@pytest.mark.parametrize("to", [None, _B])
def test_a_move_is_finished_or_canceled_again_as_its_answer_may_have_been_lost(
    to: HostId | None,
) -> None:
    finish = choose_move(_WEB, to, finish=True, cancel=False)
    assert finish((_A, _B)) == (_B,)
    assert finish((_B,)) == (_B,)
    cancel = choose_move(_WEB, to, finish=False, cancel=True)
    assert cancel((_A, _B)) == (_A,)
    assert cancel((_A,)) == (_A,)


def test_a_move_that_has_ended_in_another_way_is_not_ended_again() -> None:
    with pytest.raises(RecordConflict, match="web is not on host b yet"):
        choose_move(_WEB, _B, finish=True, cancel=False)((_A,))
    with pytest.raises(RecordConflict, match="its move there is finished"):
        choose_move(_WEB, _B, finish=False, cancel=True)((_B,))
    with pytest.raises(RequestRefused, match="not on its way"):
        choose_move(_WEB, None, finish=False, cancel=False)((_A,))
