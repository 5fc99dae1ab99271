"""Guests that read without session tokens: HAProxy's counts over all workers, and trees that need no token."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from typing import Final, Literal, TypeAlias

from imdsproxy.core.haproxy.counting import READS_KEPT_S, CountedRow
from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import Dialect, InstanceId, NetworkId, Upstream
from imdsproxy.core.path_rules import PathWord
from imdsproxy.core.plan import policy_place
from imdsproxy.core.policy import OperatorOverride, Policy, PolicyBook, render_policy_word
from imdsproxy.core.policy_report import decide_read

_GUESTS_KEPT: Final = 50_000
_READERS_KEPT: Final = 10_000
_GUEST_PARTS: Final = 2
# The first part of the key of a row that is kept.
_SUM, _SEEN, _TOTAL, _MODE = "sum", "seen", "total", "mode"
_OPEN_TREES_SHOWN: Final = 100
_EC2: Final = "/latest"
_TREES: Final = {Dialect.EC2: _EC2, Dialect.OPENSTACK: "/openstack", Dialect.NOCLOUD: "/nocloud"}

_Key: TypeAlias = tuple[str, ...]
Kept: TypeAlias = tuple[float, ...]
"""The numbers of a row that outlives the controller."""


@dataclass(frozen=True, slots=True)
class ReaderWithoutToken:
    """A client of a guest, at one branch of a tree.

    Attributes:
        path: Its first three segments; letters that are odd are `_`.
        client: User-Agent, the same way; empty where there was none.
        seen: How often it was looked at closely.
        refused: So many of these because a token is required.
        last_at: Unix time.
    """

    path: str
    client: str
    seen: int
    refused: int
    last_at: float


@dataclass(frozen=True, slots=True)
class GuestWithoutToken:
    """A guest that reads without tokens.

    Attributes:
        reads: So many that were not refused; an estimate where one in so many is counted.
        refused: Each read that was refused because a token is required.
        last_at: Unix time.
        readers: Its clients, the last one first.
    """

    network: str
    instance: str
    reads: int
    refused: int
    last_at: float
    readers: tuple[ReaderWithoutToken, ...]


@dataclass(frozen=True, slots=True)
class OpenTree:
    """User-data takes a token in EC2's tree, or is denied somewhere, and this tree serves it without one.

    Attributes:
        tree: `/latest` (EC2's), `/openstack` or `/nocloud`.
    """

    network: NetworkId
    instance: InstanceId
    tree: str


@dataclass(frozen=True, slots=True)
class TokenVerdict:
    """Whether `tokens: required` would refuse a client that reads today.

    Attributes:
        scope: What the policy would be for.
        id: The network's, project's or instance's; empty of the host.
        ready: `unknown` where not enough was counted to say so.
        because: Why, in one sentence without a full stop.
        guests: How many guests read without a token.
    """

    scope: Literal["host", "network", "project", "instance"]
    id: str
    ready: Literal["yes", "no", "unknown"]
    because: str
    guests: int


@dataclass(frozen=True, slots=True)
class TokenReport:
    """Attributes as of their classes.

    Attributes:
        since: Since when reads are counted, over restarts of the controller, Unix time; what is a week old is
            forgotten.
        guests: The last seen first.
        open_trees: At most a hundred of `open_tree_count`.
        one_in: Of so many reads that are not refused one is counted now; 0 for none (`tokens.count_reads`).
        all_since: Since when each read is counted, Unix time; `None` while not each is.
        days: For the verdict yes, no guest may have read without a token for so long.
        verdicts: Of the host first; of the networks and projects then those that are no first, at most a hundred.
    """

    since: float
    guests: tuple[GuestWithoutToken, ...]
    open_trees: tuple[OpenTree, ...]
    open_tree_count: int
    one_in: int = 1
    all_since: float | None = None
    days: int = 7
    verdicts: tuple[TokenVerdict, ...] = ()


@dataclass(frozen=True, slots=True)
class InstanceTokens:
    """How one instance reads without session tokens.

    Attributes:
        since: As of a `TokenReport`, as the next.
        one_in: Of so many reads one is counted.
        verdict: Whether tokens can be required of it.
        guests: What it read in each of its networks.
        open_trees: Those of it alone.
    """

    since: float
    one_in: int
    verdict: TokenVerdict
    guests: tuple[GuestWithoutToken, ...]
    open_trees: tuple[OpenTree, ...]


@dataclass(slots=True)
class _Sums:
    """Counts by key, over workers that each begin at 0 and forget entries as they please."""

    kept: int
    changed: dict[_Key, Kept | None]
    totals: dict[_Key, tuple[int, int, float]] = field(default_factory=dict)
    before: dict[str, dict[_Key, CountedRow]] = field(default_factory=dict)

    def add(
        self, worker: str, rows: Iterable[CountedRow], now: float
    ) -> list[tuple[_Key, int, int]]:
        """Take in one worker's table; what is more than at its last look."""
        before, seen = self.before.get(worker, {}), dict[_Key, CountedRow]()
        for row in rows:
            # Clients whose names differ only where they are not shown are one.
            seen[row.key] = row.plus(seen[row.key]) if row.key in seen else row
        self.before[worker] = seen
        self.changed.update({(_SEEN, worker, *key): None for key in before.keys() - seen.keys()})
        # Where an entry is new, or was forgotten and made anew.
        nothing = CountedRow((), 0, 0, 0)
        grown: list[tuple[_Key, int, int]] = []
        for key, row in seen.items():
            was = before.get(key, nothing)
            if row.reads < was.reads or row.refused < was.refused:
                was = nothing
            more = (row.reads - was.reads, row.refused - was.refused)
            if more != (0, 0):
                reads, refused, last = self.totals.get(key, (0, 0, 0.0))
                last = max(last, now - row.age_s)
                self.totals[key] = (reads + more[0], refused + more[1], last)
                self.changed[_SUM, *key] = self.totals[key]
                self.changed[_SEEN, worker, *key] = (row.reads, row.refused)
                grown.append((key, *more))
        for key in sorted(self.totals, key=lambda key: self.totals[key][2]):
            if len(self.totals) <= self.kept and self.totals[key][2] >= now - READS_KEPT_S:
                break
            del self.totals[key]
            self.changed[_SUM, *key] = None
        return grown

    def forget_others(self, workers: Collection[str]) -> None:
        """Forget how far workers had counted that are gone."""
        for gone in self.before.keys() - set(workers):
            self.changed.update({(_SEEN, gone, *key): None for key in self.before.pop(gone)})


@dataclass(slots=True)
class TokenLedger:
    """What all workers have counted since `since`; bounded, as their tables are.

    A worker is named by what no later one has. How far each had counted is kept with the sums, so that the next
    controller goes on where this one ended.

    Attributes:
        read: Reads by network, as of `GuestWithoutToken`; only ever grows.
        refused: Refused reads by network; only ever grows.
        all_since: Since when each read is counted, Unix time; `None` while only some are, or none.
        changes: Rows to be kept by their keys, `None` for those that are gone; who keeps them clears it.
    """

    since: float
    read: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    all_since: float | None = None
    changes: dict[_Key, Kept | None] = field(default_factory=dict)
    _one_in: int | None = None
    _guests: _Sums = field(init=False)
    _readers: _Sums = field(init=False)

    def __post_init__(self) -> None:
        self._guests = _Sums(_GUESTS_KEPT, self.changes)
        self._readers = _Sums(_READERS_KEPT, self.changes)

    def recall(self, rows: Iterable[tuple[_Key, Kept]]) -> None:
        """Take over what an earlier controller kept; to be called before anything else."""
        for (kind, *key), numbers in rows:
            if kind == _MODE:
                since, all_since, one_in = numbers
                self.since, self.all_since = since, all_since or None
                self._one_in = int(one_in)
            elif kind == _TOTAL:
                self.read[key[0]], self.refused[key[0]] = int(numbers[0]), int(numbers[1])
            elif kind == _SUM:
                reads, refused, last = numbers
                self._sums_of(key).totals[tuple(key)] = (int(reads), int(refused), last)
            else:
                row = CountedRow(tuple(key[1:]), int(numbers[0]), int(numbers[1]), 0)
                self._sums_of(row.key).before.setdefault(key[0], {})[row.key] = row

    def _sums_of(self, key: Collection[str]) -> _Sums:
        return self._guests if len(key) == _GUEST_PARTS else self._readers

    def note_mode(self, one_in: int, now: float) -> None:
        """Of so many reads one is counted from now on."""
        if one_in == self._one_in:
            return
        if one_in and self._one_in == 0:
            self.since = now
        self.all_since = now if one_in == 1 else None
        self._one_in = one_in
        self.changes[_MODE,] = (self.since, self.all_since or 0, one_in)

    def keep_workers(self, workers: Collection[str]) -> None:
        """Forget how far others had counted: they are gone."""
        for sums in (self._guests, self._readers):
            sums.forget_others(workers)

    def add(
        self, worker: str, guests: Iterable[CountedRow], readers: Iterable[CountedRow], now: float
    ) -> None:
        """Take in one worker's tables, of guests and of their clients."""
        for (network, _), reads, refused in self._guests.add(worker, guests, now):
            self.read[network] += reads
            self.refused[network] += refused
            self.changes[_TOTAL, network] = (self.read[network], self.refused[network])
        self._readers.add(worker, readers, now)

    def report(self, trees: Iterable[OpenTree]) -> TokenReport:
        """What is known of all of it."""
        readers: dict[_Key, list[ReaderWithoutToken]] = {}
        for (network, instance, path, client), counted in self._readers.totals.items():
            one = ReaderWithoutToken(path, client, *counted)
            readers.setdefault((network, instance), []).append(one)
        guests = [
            GuestWithoutToken(
                network, instance, reads, refused, last,
                tuple(sorted(
                    readers.get((network, instance), []), key=lambda one: (-one.last_at, one.path, one.client)
                )),
            )
            for (network, instance), (reads, refused, last) in self._guests.totals.items()
        ]  # fmt: skip
        guests.sort(key=lambda one: (-one.last_at, one.network, one.instance))
        found = tuple(trees)
        return TokenReport(
            self.since,
            tuple(guests),
            found[:_OPEN_TREES_SHOWN],
            len(found),
            all_since=self.all_since,
        )


def open_trees(
    inventory: Inventory, book: PolicyBook, only: InstanceId | None = None
) -> list[OpenTree]:
    """Where user-data is had without a token although another tree keeps it (`open_user_data`).

    Args:
        inventory: Everything known.
        book: The policies in force.
        only: One instance, of all that there are.
    """
    found: list[OpenTree] = []
    for one in sorted(inventory.instances) if only is None else (only,):
        instance = inventory.instances.get(one)
        if instance is None:
            continue
        if instance.user_data is None and instance.upstream is not Upstream.NOVA:
            continue
        served = frozenset(_TREES[one] for one in instance.served)
        ports = sorted({(port.network, port.project) for port in instance.ports}, key=str)
        for network, project in ports:
            place = policy_place(inventory, network, project or instance.project, instance)
            trees = open_user_data(book.fold(place).policy, served).trees
            found += [OpenTree(network, instance.id, tree) for tree in trees]
    return found


USER_DATA: Final[Mapping[str, str]] = {
    _EC2: "/latest/user-data",
    "/openstack": "/openstack/latest/user_data",
    "/nocloud": "/nocloud/user-data",
}
"""Where each tree has it."""


@dataclass(frozen=True, slots=True)
class OpenUserData:
    """The same user-data is kept in one place and given in others.

    Attributes:
        denied: Paths under which it is denied.
        trees: Those that give it without a token: `/latest` for EC2's, `/openstack`, `/nocloud`.
    """

    denied: tuple[str, ...]
    trees: tuple[str, ...]


@lru_cache(1024)
def open_user_data(policy: Policy, served: frozenset[str] = frozenset(USER_DATA)) -> OpenUserData:
    """What a policy leaves open; no `trees` where it keeps user-data nowhere, or everywhere.

    Who denies a tree as a whole has it turned off, and keeps nothing by that. Sealed user-data does not count: after
    the boot it is not served, and no tree asks for tokens before.

    Args:
        policy: What is in force.
        served: The trees that there are.
    """
    if not policy.endpoint or policy.seal_user_data:
        return OpenUserData(denied=(), trees=())
    word = render_policy_word(policy, OperatorOverride(), None)
    paths = {tree: path for tree, path in USER_DATA.items() if tree in served}
    status = {
        tree: decide_read(word, 0, path, token=False, paths=policy.paths).status
        for tree, path in paths.items()
    }
    denied = tuple(path for path in paths.values() if (path, PathWord.DENY) in policy.paths)
    keeps = status.get(_EC2) == HTTPStatus.UNAUTHORIZED or denied
    trees = tuple(tree for tree in paths if keeps and status[tree] is None)
    return OpenUserData(denied, trees)
