"""What is known of ports, while answers come in another order than their questions were asked in."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from imdsproxy.core.addresses import link_local_of
from imdsproxy.core.model import InstanceId, MacAddress, NetworkId
from imdsproxy.sources.neutron.cache import open_cache
from imdsproxy.sources.neutron.known import KnownPorts
from imdsproxy.sources.neutron.ports import (
    NeutronPort,
    PortQuery,
    parse_ports,
    render_query,
)
from support.fake_neutron import neutron_port

_MAC = "fa:16:3e:00:00:05"
_A = neutron_port("p-a", "n1", "10.0.0.5", device="i-a", mac=_MAC)
_B = neutron_port("p-b", "n1", "10.0.0.6", device="i-b")


def owner(known: KnownPorts, address: str) -> str | None:
    found = known.at(NetworkId("n1"), ip_address(address))
    return None if found is None else found.port.id


def test_an_answer_that_is_late_does_not_undo_a_newer_one() -> None:
    known = KnownPorts()
    known.put(replace(_A, addresses=(ip_address("10.0.0.7"),)), asked=20)
    known.put(_A, asked=10)
    known.lose("p-a", asked=15)
    known.lose("p-a", asked=15, steady=0)
    known.lose("p-a", asked=16, steady=0)
    assert owner(known, "10.0.0.7") == "p-a"
    assert owner(known, "10.0.0.5") is None
    known.lose("p-a", asked=21)
    assert not known.ports


@pytest.mark.parametrize("taken", ["10.0.0.5", str(link_local_of(MacAddress(_MAC)))])
@pytest.mark.parametrize("first", ["older", "newer"])
def test_an_address_is_of_the_port_that_was_asked_for_last_whichever_answer_came_first(
    first: str, taken: str
) -> None:
    known = KnownPorts()
    newer = replace(_B, addresses=(ip_address("10.0.0.5"), ip_address("10.0.0.6")), mac=_A.mac)
    answers: list[tuple[NeutronPort, float]] = [(_A, 10), (newer, 20)]
    for port, asked in answers if first == "older" else reversed(answers):
        known.put(port, asked)
    assert owner(known, taken) == "p-b"
    assert owner(known, "10.0.0.6") == "p-b"
    mine = known.ports.get("p-a")
    assert mine is not None
    assert (mine.port.addresses, mine.port.mac) == ((), None)
    claims = [key for instance in known.changes().instances.values() for key in _claims(instance)]
    assert len(claims) == len(set(claims))


def _claims(instance: object) -> list[object]:
    ports = getattr(instance, "ports", ())
    return [(port.network, address) for port in ports for address in (*port.addresses, port.mac)]


@pytest.mark.parametrize("stolen", ["p-0", "p-z"])
def test_each_port_keeps_its_own_project_whatever_instance_it_names(stolen: str) -> None:
    """Any tenant can write any instance's id on a port: Nova is asked with the port's project (OSSA-2013-033)."""
    known = KnownPorts()

    def projects() -> dict[str, str | None]:
        instance = known.changes().instances[InstanceId("i-a")]
        return {port.network: port.project or instance.project for port in instance.ports}

    known.put(_A, asked=10)
    known.put(neutron_port(stolen, "n9", "10.9.0.1", device="i-a", project="red"), asked=10)
    assert projects() == {"n1": "blue", "n9": "red"}
    known.put(replace(_A, project="green"), asked=20)
    assert projects() == {"n1": "green", "n9": "red"}


def test_at_most_a_hundred_refused_ports_are_reported_with_what_a_tenant_wrote_escaped_and_cut() -> (
    None
):
    known = KnownPorts()
    for number in range(150):
        known.put(neutron_port(f"p-{number}", "n1", device="\x1b[31m" + "x" * 1000), asked=1)
    assert len(known.problems) == 100
    assert not any("\x1b" in each.reason or len(each.reason) >= 200 for each in known.problems)


def _created(known: KnownPorts) -> int | None:
    known.changes()
    return known.published[InstanceId("i-a")].created_at


@pytest.mark.parametrize(
    ("times", "made"),
    [((None,), None), ((7, 5), 5), ((None, 7), 7), ((7, None, 8), 7)],
)
def test_an_instance_was_made_when_its_oldest_port_was_whatever_ports_come_and_go_later(
    times: tuple[int | None, ...], made: int | None
) -> None:
    ports = [
        replace(_A, id=f"p-{index}", addresses=(), mac=None, created_at=when)
        for index, when in enumerate(times)
    ]
    for order in (ports, ports[::-1]):
        known = KnownPorts()
        for port in order:
            known.put(port, asked=10)
        assert _created(known) == made
        known.put(replace(_B, device="i-a", created_at=900), asked=20)
        for port in order:
            known.lose(port.id, asked=30)
        assert _created(known) == (made or 900)


@pytest.mark.parametrize(
    ("reported", "wanted"),
    [("2026-11-26T12:00:00Z", 1_795_694_400), ("yesterday", None), (None, None), ([], None)],
)
def test_when_a_port_was_made_is_asked_for_and_taken_where_it_is_a_time(
    reported: object, wanted: int | None
) -> None:
    assert "fields=created_at" in render_query(PortQuery())
    (port,) = parse_ports({"ports": [{"id": "p", "created_at": reported}]})
    assert port.created_at == wanted


def test_what_a_cache_could_not_write_it_writes_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "there" / "cache.sqlite"
    (tmp_path / "there").write_text("no directory")
    first, second = (neutron_port(f"p-{n}", "n1", f"10.0.0.{n}", created_at=n) for n in (1, 2))
    cache = open_cache(path)
    cache.keep({first.id: first, second.id: first})
    cache.save()
    problem = cache.problem
    assert problem is not None
    assert problem.file == str(path)
    (tmp_path / "there").unlink()
    cache.keep({second.id: second})
    cache.save()
    assert cache.problem is None
    with closing(sqlite3.connect(path)) as kept, kept:
        # As another program may: these are passed over.
        for number, text in enumerate(("{", "[]", "{}", "[" * 100_000)):
            kept.execute("INSERT INTO ports VALUES (?, ?)", (str(number), text))
        kept.execute("INSERT INTO routes VALUES ('r', 'n1', 'no address', 'p-1')")
    assert set(open_cache(path).load()) == {(first.id, first), (second.id, second)}
