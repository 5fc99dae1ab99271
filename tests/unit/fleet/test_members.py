"""Which hosts a fleet accepts, and what becomes of one."""

import pytest

from imdsproxy.errors import AccessDenied, NotFound
from imdsproxy.fleet.codec import Unreadable
from imdsproxy.fleet.layout import (
    HostId,
    HostState,
    StoredHost,
    StoredOperator,
    parse_host,
    render_host,
    render_operator,
)
from imdsproxy.fleet.members import (
    Identity,
    Invitation,
    Role,
    admits_host,
    admits_operator,
    hash_token,
    parse_invitation,
    plan_enrolment,
    plan_invitation,
    plan_renewal,
    plan_revocation,
    read_identity,
    render_invitation,
    spell_serial,
)

_HOST = HostId("host-1")
_INVITED = plan_invitation(None, "the-token", 100)


def test_a_token_is_good_once_for_its_host_until_it_ends() -> None:
    enrolled = plan_enrolment(_INVITED, "the-token", "0A", 99)
    assert enrolled == StoredHost(HostState.ENROLLED, ("0A",), version=2)
    for stored, token, now in (
        (enrolled, "the-token", 99),
        (_INVITED, "another", 99),
        (_INVITED, "", 99),
        (_INVITED, "the-token", 100),
        (None, "the-token", 99),
        (None, "", 99),
        (plan_revocation(_HOST, _INVITED), "the-token", 99),
        (plan_invitation(_INVITED, "the next", 100), "the-token", 99),
    ):
        with pytest.raises(AccessDenied) as raised:
            plan_enrolment(stored, token, "0B", now)
        assert "the-token" not in str(raised.value)


def test_only_hashes_of_tokens_are_stored() -> None:
    stored = render_host(_INVITED)
    assert b"the-token" not in stored
    assert hash_token("the-token").encode() in stored


def test_a_host_that_renews_is_good_with_the_certificate_that_it_has_shown_and_the_next_one() -> (
    None
):
    first = StoredHost(HostState.ENROLLED, ("0A",))
    second = plan_renewal(first, "0A", "0B")
    assert second.serials == ("0A", "0B")
    assert plan_renewal(second, "0B", "0C").serials == ("0B", "0C")
    # Its answer was lost, and it asks again.
    assert plan_renewal(second, "0A", "0D").serials == ("0A", "0D")
    for stored, serial in (
        (None, "0A"),
        (_INVITED, "0A"),
        (plan_revocation(_HOST, second), "0B"),
        (plan_renewal(second, "0B", "0C"), "0A"),
    ):
        with pytest.raises(AccessDenied):
            plan_renewal(stored, serial, "0E")


def test_a_host_is_admitted_by_number_and_not_after_it_is_revoked() -> None:
    stored = StoredHost(HostState.ENROLLED, ("0A", "0B"))
    assert admits_host(stored, "0A")
    assert admits_host(stored, "0B")
    assert not admits_host(stored, "0a")
    assert not admits_host(stored, "")
    assert not admits_host(None, "0A")
    assert not admits_host(StoredHost(HostState.INVITED, ("0A",)), "0A")
    assert not admits_host(plan_revocation(_HOST, stored), "0A")
    with pytest.raises(NotFound):
        plan_revocation(_HOST, None)


def test_an_enrolled_host_that_is_invited_again_goes_on_until_it_joins() -> None:
    stored = plan_invitation(StoredHost(HostState.ENROLLED, ("0A",)), "again", 100)
    assert admits_host(stored, "0A")
    joined = plan_enrolment(stored, "again", "0B", 0)
    assert joined.serials == ("0B",)
    revoked = plan_revocation(_HOST, stored)
    assert not admits_host(plan_invitation(revoked, "again", 100), "0A")


def test_each_write_of_a_host_is_newer_and_a_revocation_is_counted() -> None:
    joined = plan_enrolment(_INVITED, "the-token", "0A", 0)
    renewed = plan_renewal(joined, "0A", "0B")
    revoked = plan_revocation(_HOST, renewed)
    again = plan_invitation(revoked, "again", 100)
    written = (_INVITED, joined, renewed, revoked, again)
    assert [(one.revocations, one.version) for one in written] == [
        (0, 1), (0, 2), (0, 3), (1, 4), (1, 5),
    ]  # fmt: skip


def test_an_operator_is_admitted_until_the_name_is_revoked() -> None:
    revoked = render_operator(StoredOperator(5))
    for role in Role:
        identity = Identity(role, "anna", "0A")
        assert admits_operator(identity, None) is (role is not Role.HOST)
        assert not admits_operator(identity, revoked)


def test_a_hosts_value_is_read_as_it_was_written_and_rubbish_is_not_believed() -> None:
    for stored in (_INVITED, StoredHost(HostState.ENROLLED, ("0A", "0B"))):
        assert parse_host(render_host(stored)) == stored
    for value in (
        b"",
        b"[]",
        b"{}",
        render_host(_INVITED).replace(b"invited", b"admin"),
        render_host(_INVITED).replace(b'"serials":[]', b'"serials":[1]'),
        render_host(_INVITED).replace(b'"serials":[]', b'"serials":"0A"'),
    ):
        with pytest.raises(Unreadable):
            parse_host(value)


def test_an_invitation_is_one_word_that_is_read_as_it_was_written() -> None:
    invitation = Invitation(_HOST, ("https://hub1:8469", "https://[::1]:8469"), "0f" * 32, "secret")
    text = render_invitation(invitation)
    assert parse_invitation(f" {text}\n") == invitation
    assert text.isprintable()
    assert " " not in text
    assert "secret" not in repr(invitation)


@pytest.mark.parametrize("cut", [0, 10, 17, 20, 60, -1, -5])
def test_an_invitation_that_is_cut_is_refused_and_not_repeated(cut: int) -> None:
    invitation = Invitation(_HOST, ("https://hub1:8469",), "0f" * 32, "secret" * 8)
    text = render_invitation(invitation)[:cut]
    with pytest.raises(ValueError, match=r"incomplete|begin") as raised:
        parse_invitation(text)
    assert raised.value.__cause__ is None
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "invitation",
    [
        Invitation(HostId("a b"), ("https://h:1",), "0f" * 32, "t"),
        Invitation(HostId("a\n"), ("https://h:1",), "0f" * 32, "t"),
        Invitation(_HOST, ("http://h:1",), "0f" * 32, "t"),
        Invitation(_HOST, (), "0f" * 32, "t"),
        Invitation(_HOST, ("https://h:1",), "0F" * 32, "t"),
        Invitation(_HOST, ("https://h:1",), "0f" * 32, ""),
    ],
)
def test_an_invitation_that_no_hub_makes_is_refused(invitation: Invitation) -> None:
    with pytest.raises(ValueError, match="incomplete"):
        parse_invitation(render_invitation(invitation))


def test_who_sent_a_request_is_what_haproxys_headers_name() -> None:
    headers = {
        "x-imdsproxy-role": "mover",
        "x-imdsproxy-name": "anna",
        "x-imdsproxy-serial": "0A1B",
        "x-imdsproxy-scope": "p-1",
    }
    assert read_identity(headers) == Identity(Role.MOVER, "anna", "0A1B", "p-1")
    assert read_identity({"x-imdsproxy-name": "anna"}) is None
    assert spell_serial(0x0A1B) == "0A1B"
    assert spell_serial(0xFF) == "FF"
