"""Whether tokens can be required, and of whom."""

from collections.abc import Sequence

import pytest

from imdsproxy.controller.token_report import GuestWithoutToken, ReaderWithoutToken, TokenVerdict
from imdsproxy.controller.token_verdict import Counted, judge_instance, judge_tokens, projects_of
from imdsproxy.model.entities import Instance, InstanceId, NetworkId, Port
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import Observation, SourceName
from imdsproxy.model.policy import PolicyBook, PolicyRules, TokenMode
from support.record_builders import network

_DAY_S = 86_400
_NOW = 1_795_000_000.0
_LONG = Counted(_NOW - 30 * _DAY_S, _NOW - 30 * _DAY_S, 1)


def _instance(name: str, place: str, project: str) -> Instance:
    ports = (Port(NetworkId(place)),)
    return Instance(InstanceId(name), name, name, ports=ports, project=project)


def _inventory() -> Inventory:
    source = SourceName("file")
    inventory = Inventory([source])
    instances = [
        _instance("web", "blue", "shop"),
        _instance("db", "red", "shop"),
        _instance("ci", "red", "build"),
    ]
    networks = {one.id: one for one in (network("blue"), network("red"))}
    known = {one.id: one for one in instances}
    inventory.observe(Observation(source, networks=networks, instances=known))
    return inventory


def _guest(name: str, place: str, *, days_ago: float = 1, client: str = "") -> GuestWithoutToken:
    last = _NOW - days_ago * _DAY_S
    readers = (ReaderWithoutToken("latest", client, 1, 0, last),) if client else ()
    return GuestWithoutToken(place, name, 5, 0, last, readers)


def _judge(
    guests: Sequence[GuestWithoutToken], book: PolicyBook, counted: Counted, days: int
) -> list[TokenVerdict]:
    inventory = _inventory()
    projects = set[str]().union(*map(projects_of, inventory.instances.values()))
    return judge_tokens(guests, inventory, book, counted, projects=projects, now=_NOW, days=days)


def _ready(
    *guests: GuestWithoutToken,
    book: PolicyBook | None = None,
    counted: Counted = _LONG,
    days: int = 7,
) -> dict[str, str]:
    found = _judge(guests, book or PolicyBook(), counted, days)
    return {f"{one.scope} {one.id}".strip(): one.ready for one in found}


def test_a_guest_that_reads_without_a_token_is_in_the_way_of_all_its_scopes() -> None:
    assert _ready(_guest("web", "blue")) == {
        "host": "no",
        "network blue": "no",
        "network red": "yes",
        "project build": "yes",
        "project shop": "no",
    }


def test_the_reason_names_the_guests_and_their_clients() -> None:
    guests = [_guest(name, "blue", client="curl/8") for name in ("web", "db", "ci")]
    (host, *_) = _judge(guests, PolicyBook(), _LONG, 7)
    assert host.because == (
        "3 guests read without a token in the last 7 days: web (curl/8), db (curl/8), ci (curl/8)"
    )
    assert host.guests == 3


@pytest.mark.parametrize(
    ("guest", "book", "ready"),
    [
        (_guest("web", "blue", days_ago=8), PolicyBook(), "yes"),
        (_guest("gone", "blue"), PolicyBook(), "yes"),
        # Its own policy lets it go on reading.
        (_guest("web", "blue"), PolicyBook(instances={"web": PolicyRules(tokens=TokenMode.OPTIONAL)}), "yes"),
        (_guest("web", "blue"), PolicyBook(instances={"web": PolicyRules(tokens=TokenMode.OFF)}), "yes"),
        (_guest("web", "blue"), PolicyBook(instances={"web": PolicyRules(tokens=TokenMode.REQUIRED)}), "no"),
        (_guest("web", "blue"), PolicyBook(networks={"blue": PolicyRules(tokens=TokenMode.OPTIONAL)}), "no"),
    ],
)  # fmt: skip
def test_only_who_would_be_refused_and_reads_now_is_in_the_way(
    guest: GuestWithoutToken, book: PolicyBook, ready: str
) -> None:
    assert _ready(guest, book=book)["host"] == ready


@pytest.mark.parametrize(
    ("counted", "days", "ready"),
    [
        (_LONG, 7, "yes"),
        (Counted(_LONG.since, _NOW - 2 * _DAY_S, 1), 7, "unknown"),
        (Counted(_LONG.since, _NOW - 2 * _DAY_S, 1), 2, "yes"),
        (Counted(_LONG.since, None, 20), 7, "unknown"),
        (Counted(_LONG.since, None, 0), 7, "unknown"),
    ],
)
def test_it_is_yes_only_where_each_read_was_counted_for_long_enough(
    counted: Counted, days: int, ready: str
) -> None:
    assert _ready(counted=counted, days=days)["host"] == ready
    # One that reads is in the way however little was counted.
    assert _ready(_guest("web", "blue"), counted=counted, days=days)["host"] == "no"


def test_an_instance_is_judged_by_its_own_reads_whatever_its_policy_says() -> None:
    def judge(*guests: GuestWithoutToken, counted: Counted = _LONG) -> str:
        return judge_instance(InstanceId("web"), guests, counted, now=_NOW, days=7).ready

    assert judge(_guest("web", "blue")) == "no"
    assert judge(_guest("web", "blue", days_ago=8)) == "yes"
    assert judge(counted=Counted(_LONG.since, None, 20)) == "unknown"
