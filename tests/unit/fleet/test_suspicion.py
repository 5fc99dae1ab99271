"""Whose claims that etcd was restored count, and when they stop writes."""

import pytest

from imdsproxy.fleet.codec import Unreadable
from imdsproxy.fleet.layout import (
    MOST_CLAIMS,
    Claim,
    HostId,
    HostState,
    StoredHost,
    Suspicion,
    parse_suspicion,
    render_suspicion,
)

A, B = HostId("a"), HostId("b")


def test_a_hub_or_two_hosts_stop_writes_and_a_host_with_a_hubs_name_is_a_host() -> None:
    alone = Suspicion("why").add_host(HostId("hub-1"), Claim(0))
    assert not alone.refuses
    assert alone.add_host(A, Claim(0)).refuses
    assert alone.add_hub("hub-1", 1).refuses


def test_a_claim_of_a_host_ends_with_its_revocation_and_does_not_come_back_with_the_next_one() -> (
    None
):
    suspicion = Suspicion("why", {}, {A: Claim(5), B: Claim(2)})
    members = {one: StoredHost(HostState.ENROLLED, ("1",)) for one in (A, B)}
    assert suspicion.of_members(members.get) == suspicion
    members[A] = StoredHost(HostState.REVOKED, revocations=1)
    left = suspicion.of_members(members.get)
    assert left is not None
    assert (dict(left.hosts), left.refuses) == ({B: Claim(2)}, False)
    members[A] = StoredHost(HostState.ENROLLED, ("2",), revocations=1)
    assert suspicion.of_members(members.get) == left
    del members[B]
    assert suspicion.of_members(members.get) is None
    assert suspicion.add_hub("hub-1", 1).of_members(members.get) is not None


def test_of_very_many_claims_those_of_the_highest_incarnations_stay() -> None:
    suspicion = Suspicion("why")
    for number in range(100):
        suspicion = suspicion.add_host(HostId(f"h{number}"), Claim(number))
    assert len(suspicion.hosts) == MOST_CLAIMS
    assert suspicion.incarnation == 99


def test_a_suspicion_is_read_as_it_was_written_and_rubbish_is_not_believed() -> None:
    suspicion = Suspicion("why", {"hub-1": 3}, {A: Claim(5, 1)})
    assert parse_suspicion(render_suspicion(suspicion)) == suspicion
    assert len(render_suspicion(Suspicion("x" * 2_000_000, {"hub-1": 3}))) < 2000
    for value in (
        b"",
        b"{}",
        b'{"why": "x", "hubs": {"h": "1"}, "hosts": {}}',
        b'{"why": "x", "hubs": {}, "hosts": {"a": 1}}',
        b'{"why": "x", "hubs": {}, "hosts": ["a"]}',
    ):
        with pytest.raises(Unreadable):
            parse_suspicion(value)
