"""The fleet's keys of session tokens: sealed in etcd, replaced in two steps, and read by hosts."""

import itertools

import pytest

from imdsproxy.errors import SourceCorrupt
from imdsproxy.fleet import codec
from imdsproxy.fleet.codec import Json
from imdsproxy.fleet.stream import Batch
from imdsproxy.hub.hosts.sealed import PLACE, FleetKeys, TokenKeyRing, open_keys, seal_keys
from imdsproxy.hub.store.envelope import Envelope, make_envelope, parse_envelope
from imdsproxy.hub.store.state import Change, FleetState
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.tokens import KEPT_KEYS, TokenKey, instance_key
from imdsproxy.sources.fleet.known import FleetKnown

_WEB = InstanceId("web")
_KEYS = tuple(TokenKey(bytes([number]) * 32) for number in range(9))
_ALL = FleetKeys(_KEYS[0], _KEYS[1], _KEYS[2:4])


def _envelope() -> Envelope:
    return parse_envelope(make_envelope(), "envelope.key")


def test_keys_are_read_as_they_were_sealed_and_nothing_of_them_shows() -> None:
    envelope = _envelope()
    for keys in (_ALL, FleetKeys(_KEYS[0])):
        sealed = seal_keys(keys, envelope)
        assert open_keys(sealed, envelope) == keys
        assert keys.current.text.encode() not in sealed
        assert keys.current.text not in repr(keys)


@pytest.mark.parametrize("value", [b"", b"[]", b"{}", b'{"sealed": "x"}', b'{"sealed": "AAAA"}'])
def test_what_another_program_wrote_is_refused(value: bytes) -> None:
    with pytest.raises(SourceCorrupt):
        open_keys(value, _envelope())


def test_a_key_signs_in_two_steps_and_as_many_are_believed_after_it_as_of_a_hosts_own() -> None:
    fresh, keys = iter(_KEYS[1:]), FleetKeys(_KEYS[0])
    for number in range(1, 5):
        begun = keys.begin_rotation(next(fresh))
        assert (begun.current, begun.pending) == (keys.current, _KEYS[number])
        # One that was not finished goes on.
        assert begun.begin_rotation(_KEYS[8]) == begun
        before, keys = keys, begun.end_rotation(_KEYS[number])
        assert (keys.current, keys.pending) == (_KEYS[number], None)
        assert keys.old[0] == before.current
        assert len(keys.old) == min(number, KEPT_KEYS - 1)


def test_a_host_takes_an_instances_keys_with_the_one_that_signs_first() -> None:
    known = FleetKnown(lambda _instance, _sha256: None)
    item: Json = _ALL.item_of(_WEB)
    known.apply(Batch(5, "f", 1, {"keys/web": (5, item)}), whole=True)
    expected = tuple(instance_key(key, "web") for key in _KEYS[:4])
    assert known.policies().keys == {_WEB: expected}
    assert _ALL.item_of(InstanceId("web-2")) != item


def test_keys_that_a_hub_cannot_read_leave_those_of_before_in_force() -> None:
    envelope, revisions = _envelope(), itertools.count(1)
    state = FleetState()
    ring = TokenKeyRing(envelope)
    state.keys_of, state.keys_problem = ring.item_of, ring.problem

    def write(value: bytes) -> None:
        revision = next(revisions)
        state.apply(revision, [Change(PLACE, value, revision)])

    assert state.item("keys/web") is None
    write(seal_keys(_ALL, envelope))
    assert (state.item("keys/web"), state.unread_keys()) == ((1, _ALL.item_of(_WEB)), None)
    write(seal_keys(FleetKeys(_KEYS[5]), _envelope()))
    # With the revision that they are of: another hub may have read the newer ones.
    assert state.item("keys/web") == (1, _ALL.item_of(_WEB))
    assert "a key that this hub does not have" in str(
        state.unread_keys()
    ) or "does not open" in str(ring.problem)
    write(codec.encode({"sealed": "x"}))
    assert state.item("keys/web") == (1, _ALL.item_of(_WEB))
    assert "written by another program" in str(state.unread_keys())
    write(seal_keys(FleetKeys(_KEYS[5]), envelope))
    assert (state.item("keys/web"), state.unread_keys()) == (
        (4, FleetKeys(_KEYS[5]).item_of(_WEB)),
        None,
    )


def test_a_pending_key_signs_only_if_it_is_the_one_that_hosts_confirmed() -> None:
    first = FleetKeys(_KEYS[0]).begin_rotation(_KEYS[1])
    # Another rotation ended this one, and began the next.
    second = first.end_rotation(_KEYS[1]).begin_rotation(_KEYS[2])
    assert second.end_rotation(_KEYS[1]) == second
    assert second.end_rotation(_KEYS[2]).current == _KEYS[2]
