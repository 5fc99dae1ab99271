"""What a hub reports of the members of etcd."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import cast

from imdsproxy.fleet import layout
from imdsproxy.fleet.layout import HostState, StoredHost, render_host
from imdsproxy.host.clock import Clock
from imdsproxy.hub.api.operations import Operations, _lost_quorum, _member
from imdsproxy.hub.hosts.in_force import InForce, Peers
from imdsproxy.hub.hosts.streams import Streams
from imdsproxy.hub.pki.authority import make_authority
from imdsproxy.hub.store.etcd_messages import Header, MemberSilent, MemberStatus
from imdsproxy.hub.store.state import Change, FleetState
from imdsproxy.hub.store.writes import Writes
from support.fake_etcd import answer, client_of, header
from support.restores import restores_of

STATUS = MemberStatus(
    "https://a:2378",
    id=7,
    version="3.5.16",
    db_size=69,
    in_use=50,
    quota=100,
    problems=(),
    leader=7,
    header=Header(5, 2),
)


def test_a_member_that_is_soon_full_is_a_problem() -> None:
    assert _member(STATUS)["problems"] == []
    (problem,) = _member(replace(STATUS, db_size=71))["problems"]
    assert problem == "its database has 71% of its quota: compact and defragment it"
    assert _member(replace(STATUS, db_size=71, quota=0))["problems"] == []


def test_a_fleet_whose_etcd_has_no_quorum_says_so_and_what_to_do() -> None:
    alone = replace(STATUS, leader=0, problems=("etcdserver: no leader",))
    silent = MemberSilent("https://b:2378", "connection refused")
    lost = _lost_quorum([replace(silent, leaderless=True), silent, silent])
    assert lost is not None
    assert lost.startswith("no quorum: 1 of 3 members answer; start the other members")
    assert str(_lost_quorum([alone, alone, silent])).startswith("no leader: 2 of 3 members answer")
    assert _lost_quorum([alone, STATUS, silent]) is None
    assert _lost_quorum([silent]) is None


def test_a_members_alarm_is_a_problem() -> None:
    alarm = "memberID:7 alarm:NOSPACE"
    assert _member(replace(STATUS, problems=(alarm,)))["problems"] == [alarm]


async def test_a_hub_reports_the_fleet_while_no_member_answers() -> None:
    stopped = answer({"code": 14, "message": "etcdserver: stopped"}, 503)
    async with client_of(lambda *_: stopped, timeout_s=0.2) as (etcd, members):
        state, clock = FleetState(), Clock()
        streams = Streams(state, clock, lambda *_: True)
        unused = cast("Writes", None)
        report = await Operations(
            etcd,
            state,
            streams,
            unused,
            InForce(streams, Peers(state, "hub-1", clock)),
            restores_of(etcd, state, clock),
            clock,
        ).report()
    assert report.etcd == [
        {"url": members[0].url, "problems": ["does not answer: etcdserver: stopped"]}
    ]
    assert report.imports == []


@dataclass
class _Asked(Peers):
    """Another hub, which has host `b`, and one that does not answer."""

    asked: list[str] = field(default_factory=list)

    def urls(self) -> dict[str, str]:
        return {"hub-2": "https://hub2", "hub-3": "https://hub3"}

    async def ask(
        self,
        url: str,
        path: str,
        query: Mapping[str, str],
        timeout_s: float,
        body: object = None,
    ) -> object:
        del query, timeout_s, body
        self.asked.append(f"{url}{path}")
        return {"b": {"acknowledged": 4, "failed": {}}} if url == "https://hub2" else None


async def test_a_hub_asks_each_other_one_once_for_the_state_of_the_fleet_and_for_its_clock() -> (
    None
):
    value = render_host(StoredHost(HostState.ENROLLED, ("1",)))
    hosts = [Change(f"{layout.HOSTS}{name}", value, 1) for name in "ab"]
    async with client_of(lambda *_: answer({**header(5), "kvs": []})) as (etcd, _):
        state, clock = FleetState(), Clock()
        state.apply(1, hosts)
        streams, peers = Streams(state, clock, lambda *_: True), _Asked(state, "hub-1", clock)
        unused = cast("Writes", None)
        report = await Operations(
            etcd,
            state,
            streams,
            unused,
            InForce(streams, peers),
            restores_of(etcd, state, clock),
            clock,
        ).report()
    wanted = [
        f"https://{hub}/fleet/{what}" for hub in ("hub2", "hub3") for what in ("alive", "applied")
    ]
    assert sorted(peers.asked) == wanted
    assert [one["answers"] for one in report.hubs] == [True, True, False]
    assert (report.hosts, report.connected, report.absent) == (2, 1, ["a"])


async def test_hosts_that_have_no_certificate_since_the_cas_were_changed_are_named() -> None:
    authority = make_authority("fleet", datetime(2026, 1, 1, tzinfo=UTC))
    trusts = {"a": authority.trusted_digest, "b": "0f" * 8, "c": ""}
    hosts = [
        Change(
            f"{layout.HOSTS}{name}",
            render_host(StoredHost(HostState.ENROLLED, ("1",), trusts=one)),
            1,
        )
        for name, one in trusts.items()
    ]
    async with client_of(lambda *_: answer({**header(5), "kvs": []})) as (etcd, _):
        state, clock = FleetState(), Clock()
        state.apply(1, hosts)
        streams, peers = Streams(state, clock, lambda *_: True), Peers(state, "hub-1", clock)
        one = Operations(
            etcd,
            state,
            streams,
            cast("Writes", None),
            InForce(streams, peers),
            restores_of(etcd, state, clock),
            clock,
        )
        one.authority = authority
        report = await one.report()
    assert report.renewing == ["b"]
    assert report.authority_ends == datetime(2035, 12, 30, tzinfo=UTC).timestamp()
