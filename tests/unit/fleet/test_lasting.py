"""What etcd may not forget has an order of its own: any two values have a join, whatever history they are of."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.fleet.codec import Unreadable
from imdsproxy.fleet.layout import (
    ISSUER,
    OVERRIDES,
    HostId,
    HostState,
    StoredHost,
    StoredIssuer,
    StoredOperator,
    host_key,
    operator_key,
    parse_host,
    parse_issuer,
    parse_override,
    read_host,
    render_host,
    render_issuer,
    render_operator,
    render_override,
)
from imdsproxy.fleet.members import plan_enrolment, plan_invitation, plan_revocation
from imdsproxy.fleet.restores import describe_regained, join_values
from imdsproxy.model.policy import OperatorOverride

HOST, OVERRIDE = host_key(HostId("a")), f"{OVERRIDES}web"
_SMALL = st.integers(0, 3)
_HOSTS = st.builds(
    StoredHost,
    st.sampled_from([HostState.INVITED, HostState.ENROLLED, HostState.REVOKED]),
    revocations=_SMALL,
    version=_SMALL,
).map(render_host)
_OVERRIDES = st.builds(OperatorOverride, _SMALL, _SMALL).map(render_override)


def _rank(value: bytes) -> tuple[int, int, bool]:
    stored = parse_host(value)
    return stored.revocations, stored.version, stored.state is HostState.REVOKED


@given(_HOSTS, _HOSTS)
def test_of_two_values_of_a_host_the_one_with_more_revocations_counts_then_the_later_one(
    one: bytes, other: bytes
) -> None:
    joined = join_values(HOST, one, other)
    assert joined in {one, other}
    assert _rank(joined) == max(_rank(one), _rank(other))
    assert _rank(join_values(HOST, other, one)) == _rank(joined)


@given(_OVERRIDES, _OVERRIDES, _OVERRIDES)
def test_overrides_only_grow_in_whatever_order_they_come(
    one: bytes, two: bytes, three: bytes
) -> None:
    joined = join_values(OVERRIDE, join_values(OVERRIDE, one, two), three)
    again = join_values(OVERRIDE, three, join_values(OVERRIDE, two, one))
    assert parse_override(joined) == parse_override(again)
    for value in (one, two, three):
        assert parse_override(joined).epoch >= parse_override(value).epoch
        assert parse_override(joined).reopened_at >= parse_override(value).reopened_at
        assert join_values(OVERRIDE, value, joined) == joined


def test_a_revoked_host_stays_revoked_though_a_restored_backup_renewed_it_often() -> None:
    revoked = render_host(StoredHost(HostState.REVOKED, revocations=1, version=6))
    renewed = render_host(StoredHost(HostState.ENROLLED, ("1", "2"), version=99))
    assert join_values(HOST, revoked, renewed) == revoked
    joined = render_host(StoredHost(HostState.ENROLLED, ("3",), revocations=1, version=8))
    assert join_values(HOST, revoked, joined) == joined


def test_no_journal_brings_a_certificate_back_that_a_host_had_before_it_was_enrolled_again() -> (
    None
):
    backup = StoredHost(HostState.ENROLLED, ("1",), version=2)
    renewed = render_host(replace(backup, serials=("4", "5"), version=6))
    invited = plan_invitation(backup, "token", 100)
    enrolled = render_host(plan_enrolment(invited, "token", "9", 50))
    assert join_values(HOST, renewed, enrolled) == enrolled
    assert join_values(HOST, enrolled, renewed) == enrolled


def test_a_count_that_could_not_grow_is_not_readable() -> None:
    enrolled, most = StoredHost(HostState.ENROLLED, ("1",)), 2**63 - 1
    for full in (replace(enrolled, revocations=most), replace(enrolled, version=most)):
        with pytest.raises(Unreadable):
            parse_host(render_host(full))
        revoked = plan_revocation(HostId("a"), read_host(render_host(full), 7))
        assert parse_host(render_host(revoked)).state is HostState.REVOKED


def _issuer(replaced: int, sequence: int, key: str = "k") -> bytes:
    ring = {
        "format": 1,
        "sequence": sequence,
        "keys": [{"id": key, "state": "signing", "since": 1}],
    }
    return render_issuer(StoredIssuer(ring, {key: {}}, {key: ""}, replaced))


_ISSUERS = st.builds(_issuer, _SMALL, _SMALL, st.sampled_from(["k", "l"]))


@given(_ISSUERS, _ISSUERS)
def test_stolen_keys_never_come_back_and_hubs_agree_on_the_keys(one: bytes, other: bytes) -> None:
    joined = join_values(ISSUER, one, other)
    assert joined == join_values(ISSUER, other, one)
    assert parse_issuer(joined).replaced == max(
        parse_issuer(one).replaced, parse_issuer(other).replaced
    )


def test_of_the_same_keys_the_later_step_of_a_rotation_counts() -> None:
    assert join_values(ISSUER, _issuer(1, 5), _issuer(1, 4)) == _issuer(1, 5)
    assert join_values(ISSUER, _issuer(2, 1), _issuer(1, 4)) == _issuer(2, 1)


@pytest.mark.parametrize("key", [HOST, OVERRIDE, ISSUER, operator_key("anna")])
def test_what_cannot_be_read_is_no_newer_value(key: str) -> None:
    known = {
        HOST: render_host(StoredHost(HostState.ENROLLED)),
        OVERRIDE: render_override(OperatorOverride(1, 1)),
        ISSUER: _issuer(1, 1),
    }.get(key, render_operator(StoredOperator(5)))
    for value in (b"", b"[]", b"{}", b"\xff"):
        with pytest.raises(Unreadable):
            join_values(key, known, value)


def test_operators_read_what_was_put_back() -> None:
    said = [
        describe_regained(key, value, absent=absent)
        for key, value, absent in (
            (HOST, render_host(StoredHost(HostState.REVOKED)), False),
            (HOST, render_host(StoredHost(HostState.ENROLLED)), False),
            (HOST, render_host(StoredHost(HostState.ENROLLED)), True),
            (operator_key("anna"), render_operator(StoredOperator(5)), True),
            (OVERRIDE, render_override(OperatorOverride(1, 0)), True),
            (ISSUER, _issuer(1, 1), False),
        )
    ]
    assert said == [
        ("host a", "stays revoked"),
        ("host a", "keeps the certificate that it got after the backup"),
        ("host a", "stays a member, though it joined after the backup"),
        ("operator anna", "stays revoked"),
        ("instance web", "keeps its revoked tokens and its reopened boot"),
        ("issuer of identity tokens", "keeps the keys that it got after the backup"),
    ]
