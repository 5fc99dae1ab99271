"""Verdicts on whether session tokens can be required: of the host, each network and each project."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from imdsproxy.controller.record_plan import policy_place
from imdsproxy.controller.token_report import GuestWithoutToken, TokenVerdict
from imdsproxy.model.entities import Instance, InstanceId, NetworkId
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.policy import PolicyBook, PolicyScope, TokenMode

_DAY_S: Final = 86_400
_NAMED: Final = 3


@dataclass(frozen=True, slots=True)
class Counted:
    """Mode of counting reads, and its start.

    Attributes:
        since: Start of any count, Unix time.
        all_since: Start of the count of every read; `None` while only a sample is counted.
        one_in: Sampling rate: one in so many reads is counted now; 0 for none.
    """

    since: float
    all_since: float | None
    one_in: int


def judge_tokens(
    guests: Iterable[GuestWithoutToken],
    inventory: Inventory,
    book: PolicyBook,
    counted: Counted,
    *,
    projects: Iterable[str],
    now: float,
    days: int,
) -> list[TokenVerdict]:
    """Return a verdict on the host, then on each network, then on each project.

    Instances that no longer exist do not count. Guests whose own policy is `optional` or `off` do not count either:
    they could still read.

    Args:
        days: Days for which no guest may have read without a token.
    """
    late = [one for one in guests if one.last_at >= now - days * _DAY_S]
    in_the_way = [(one, theirs) for one in late if (theirs := _concerned(one, inventory, book))]
    networks: dict[str, list[GuestWithoutToken]] = {str(one): [] for one in inventory.networks}
    in_projects: dict[str, list[GuestWithoutToken]] = {one: [] for one in projects}
    for guest, theirs in in_the_way:
        networks.setdefault(guest.network, []).append(guest)
        for project in theirs - {None}:
            in_projects.setdefault(str(project), []).append(guest)
    enough = _enough(counted, now, days)
    return [
        _judge("host", "", [guest for guest, _ in in_the_way], enough, days),
        *(_judge("network", name, found, enough, days) for name, found in sorted(networks.items())),
        *(
            _judge("project", name, found, enough, days)
            for name, found in sorted(in_projects.items())
        ),
    ]


def projects_of(instance: Instance) -> set[str]:
    found = {instance.project, *(port.project for port in instance.ports)}
    return {one for one in found if one is not None}


def judge_instance(
    instance: InstanceId,
    guests: Iterable[GuestWithoutToken],
    counted: Counted,
    *,
    now: float,
    days: int,
) -> TokenVerdict:
    """Return a verdict on one instance, whatever its present policy; arguments as of `judge_tokens`."""
    late = [one for one in guests if one.last_at >= now - days * _DAY_S]
    return _judge("instance", instance, late, _enough(counted, now, days), days)


def _concerned(
    guest: GuestWithoutToken, inventory: Inventory, book: PolicyBook
) -> frozenset[str | None]:
    """Return the guest's projects in which a policy of a wider scope would apply; none if its own policy decides."""
    instance = inventory.instances.get(InstanceId(guest.instance))
    if instance is None:
        return frozenset()
    network = NetworkId(guest.network)
    ports = [port for port in instance.ports if port.network == network] or instance.ports
    found: set[str | None] = set()
    for project in {port.project or instance.project for port in ports}:
        folded = book.fold(policy_place(inventory, network, project, instance))
        of_its_own = dict(folded.origins).get("tokens") is PolicyScope.INSTANCE
        if not of_its_own or folded.policy.tokens is TokenMode.REQUIRED:
            found.add(project)
    return frozenset(found)


def _enough(counted: Counted, now: float, days: int) -> str | None:
    """Return why the counts do not suffice for the verdict yes; `None` if they suffice."""
    if counted.one_in == 0:
        return "reads are not counted: tokens.count_reads is off"
    if counted.all_since is None:
        return (
            f"one read in {counted.one_in} is counted, so rare readers may not be seen: "
            "tokens.count_reads: all counts each"
        )
    passed = (now - counted.all_since) / _DAY_S
    if passed < days:
        return f"each read is counted for {passed:.1f} days of {days}"
    return None


def _judge(
    scope: Literal["host", "network", "project", "instance"],
    name: str,
    found: list[GuestWithoutToken],
    enough: str | None,
    days: int,
) -> TokenVerdict:
    guests: Mapping[str, GuestWithoutToken] = {one.instance: one for one in reversed(found)}
    over = f"in the last {days} days"
    if guests:
        shown = ", ".join(_named(list(guests.values())[::-1]))
        many = "1 guest reads" if len(guests) == 1 else f"{len(guests)} guests read"
        return TokenVerdict(
            scope, name, "no", f"{many} without a token {over}: {shown}", len(guests)
        )
    none = f"no guest has read without a token {over}"
    if enough is not None:
        return TokenVerdict(scope, name, "unknown", f"{none}, but {enough}", 0)
    return TokenVerdict(scope, name, "yes", f"{none}, and each read is counted", 0)


def _named(guests: list[GuestWithoutToken]) -> Iterator[str]:
    for one in guests[:_NAMED]:
        client = next((reader.client for reader in one.readers if reader.client), "")
        yield f"{one.instance} ({client})" if client else one.instance
    if len(guests) > _NAMED:
        yield f"and {len(guests) - _NAMED} more"
