"""How a hub invites, certifies, renews and revokes, while others write too and etcd does not always confirm."""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

import pytest
from structlog.testing import capture_logs

from imdsproxy.errors import AccessDenied, NotFound, RequestRefused, SourceUnavailable, WriteUnknown
from imdsproxy.fleet.layout import (
    HostId,
    HostState,
    StoredHost,
    host_key,
    operator_key,
    parse_host,
    read_host,
    render_host,
)
from imdsproxy.fleet.members import Identity, Role, admits_host, admits_operator, spell_serial
from imdsproxy.host.certificates import make_key, parse_certificate, render_request
from imdsproxy.hub.pki.authority import make_authority
from imdsproxy.hub.pki.enrolment import INVITATION_S, Certified, Enrolment
from imdsproxy.hub.store.etcd import Etcd
from imdsproxy.hub.store.etcd_messages import Committed, Compare, Conflict, KeyValue, Snapshot
from support.hand_clock import HandClock

_HOST = HostId("host-1")
_URLS = ("https://hub1:8469",)


@dataclass
class _Store:
    """Compare-and-swap as etcd's, of which single answers may be lost.

    Attributes:
        lost: Of the next writes, whether each is done before its answer is lost; `None` answers.
    """

    values: dict[str, KeyValue] = field(default_factory=dict)
    revision: int = 1
    lost: list[bool | None] = field(default_factory=list)

    async def read(self, key: str) -> Snapshot:
        # Others come in between.
        await asyncio.sleep(0)
        found = self.values.get(key)
        return Snapshot(self.revision, [] if found is None else [found])

    async def commit(
        self, compares: Iterable[Compare], puts: Mapping[str, bytes]
    ) -> Committed | Conflict:
        lost = self.lost.pop(0) if self.lost else None
        if lost is False:
            raise WriteUnknown("no answer")
        for one in compares:
            found = self.values.get(one.key)
            if (0 if found is None else found.mod_revision) != one.revision:
                return Conflict(self.revision, [])
        self.revision += 1
        for key, value in puts.items():
            self.values[key] = KeyValue(key, value, self.revision, self.revision)
        if lost:
            raise WriteUnknown("no answer")
        return Committed(self.revision)


@pytest.fixture
def store() -> _Store:
    return _Store()


@pytest.fixture
def clock() -> HandClock:
    return HandClock(pace=1)


@pytest.fixture
def enrolment(store: _Store, clock: HandClock) -> Enrolment:
    return Enrolment(cast("Etcd", store), make_authority("fleet", clock.now()), clock)


def _request() -> str:
    return render_request(make_key()).decode()


def _serial(certified: Certified) -> str:
    return spell_serial(parse_certificate(certified.certificate.encode(), "it").serial_number)


def _admits(store: _Store, serial: str) -> bool:
    return admits_host(parse_host(store.values[host_key(_HOST)].value), serial)


async def test_of_two_hosts_that_use_a_token_at_once_one_gets_a_certificate(
    enrolment: Enrolment, store: _Store
) -> None:
    token = (await enrolment.invite(_HOST, _URLS)).token
    both = (enrolment.enrol(_HOST, token, _request()) for _ in range(2))
    found = await asyncio.gather(*both, return_exceptions=True)
    (certified,) = (one for one in found if isinstance(one, Certified))
    (denied,) = (one for one in found if not isinstance(one, Certified))
    assert isinstance(denied, AccessDenied)
    assert _admits(store, _serial(certified))
    with pytest.raises(AccessDenied):
        await enrolment.enrol(_HOST, token, _request())


async def test_a_token_is_good_for_its_host_only_and_until_it_ends(
    enrolment: Enrolment, clock: HandClock
) -> None:
    token = (await enrolment.invite(_HOST, _URLS)).token
    await enrolment.invite(HostId("host-2"), _URLS)
    with pytest.raises(AccessDenied):
        await enrolment.enrol(HostId("host-2"), token, _request())
    clock.time += INVITATION_S + 1
    with pytest.raises(AccessDenied, match="expired"):
        await enrolment.enrol(_HOST, token, _request())


async def test_a_write_that_etcd_did_not_confirm_is_looked_for_and_not_done_twice(
    enrolment: Enrolment, store: _Store
) -> None:
    for done in (True, False):
        token = (await enrolment.invite(_HOST, _URLS)).token
        store.lost = [done]
        certified = await enrolment.enrol(_HOST, token, _request())
        assert _admits(store, _serial(certified))
    store.lost = [False] * 5
    with pytest.raises(SourceUnavailable):
        await enrolment.revoke(_HOST)


async def test_a_host_renews_with_a_certificate_that_is_good_and_not_after_it_is_revoked(
    enrolment: Enrolment, store: _Store
) -> None:
    token = (await enrolment.invite(_HOST, _URLS)).token
    first = _serial(await enrolment.enrol(_HOST, token, _request()))
    second = _serial(await enrolment.renew(Identity(Role.HOST, _HOST, first), _request()))
    assert _admits(store, first)
    assert _admits(store, second)
    third = _serial(await enrolment.renew(Identity(Role.HOST, _HOST, second), _request()))
    assert not _admits(store, first)
    assert await enrolment.revoke(_HOST) == store.revision
    for serial in (second, third):
        assert not _admits(store, serial)
        with pytest.raises(AccessDenied):
            await enrolment.renew(Identity(Role.HOST, _HOST, serial), _request())
    with pytest.raises(NotFound):
        await enrolment.revoke(HostId("host-9"))


async def test_a_request_that_is_none_uses_no_token_up(enrolment: Enrolment, store: _Store) -> None:
    token = (await enrolment.invite(_HOST, _URLS)).token
    with pytest.raises(RequestRefused):
        await enrolment.enrol(_HOST, token, "rubbish")
    await enrolment.enrol(_HOST, token, _request())
    assert parse_host(store.values[host_key(_HOST)].value).state is HostState.ENROLLED


async def test_an_operator_is_revoked_by_name(enrolment: Enrolment, store: _Store) -> None:
    anna = Identity(Role.OPERATOR, "anna", "0A")
    assert admits_operator(anna, None)
    await enrolment.revoke_operator("anna")
    assert not admits_operator(anna, store.values[operator_key("anna")].value)


async def test_tokens_and_keys_are_in_no_log_and_no_value(
    enrolment: Enrolment, store: _Store
) -> None:
    with capture_logs() as logs:
        token = (await enrolment.invite(_HOST, _URLS)).token
        with pytest.raises(AccessDenied) as denied:
            await enrolment.enrol(_HOST, "wrong", _request())
        await enrolment.enrol(_HOST, token, _request())
    seen = f"{logs} {denied.value!r} {store.values} {enrolment!r}"
    assert logs
    assert token not in seen
    assert "PRIVATE" not in seen


async def test_a_host_whose_value_another_program_wrote_is_revoked_or_invited_again(
    enrolment: Enrolment, store: _Store
) -> None:
    key = host_key(_HOST)
    for value in (b"garbage", b"{}", b'{"state": "unreadable"}'):
        for mend in (enrolment.revoke(_HOST), enrolment.invite(_HOST, _URLS)):
            await store.commit((), {key: value})
            assert read_host(value, 9).state is HostState.UNREADABLE
            known = store.revision
            await mend
            mended = parse_host(store.values[key].value)
            assert mended.state in {HostState.REVOKED, HostState.INVITED}
            assert mended.revocations >= known
    await store.commit((), {key: b"garbage"})
    with pytest.raises(AccessDenied):
        await enrolment.renew(Identity(Role.HOST, _HOST, "0A"), _request())


async def test_a_host_is_renewed_and_revoked_as_the_hub_knows_it_where_etcd_has_an_older_value(
    store: _Store, clock: HandClock
) -> None:
    kept: dict[str, bytes] = {}

    async def keep(values: Mapping[str, bytes]) -> None:
        kept.update(values)

    key = host_key(_HOST)
    older = render_host(StoredHost(HostState.ENROLLED, ("01",), version=2))
    store.values[key] = KeyValue(key, older, 5, 5)
    newer = StoredHost(HostState.ENROLLED, ("02", "03"), revocations=1, version=7)
    known = {key: (render_host(newer), 9)}
    authority = make_authority("fleet", clock.now())
    enrolment = Enrolment(cast("Etcd", store), authority, clock, known=known.get, keep=keep)
    with pytest.raises(AccessDenied):
        await enrolment.renew(Identity(Role.HOST, _HOST, "01"), _request())
    certified = await enrolment.renew(Identity(Role.HOST, _HOST, "03"), _request())
    assert _admits(store, _serial(certified))
    await enrolment.revoke(_HOST)
    stored = parse_host(store.values[key].value)
    assert (stored.state, stored.revocations, stored.version) == (HostState.REVOKED, 2, 9)
    # Before an operator is answered the journal has it.
    assert kept == {key: store.values[key].value}
