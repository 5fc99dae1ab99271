"""Guests that read without session tokens: HAProxy's counts over all workers, and trees that need no token."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from typing import Final, Literal, TypeAlias

from imdsproxy.controller.record_plan import policy_place
from imdsproxy.haproxy.rules.counting import READS_KEPT_S, CountedRow
from imdsproxy.model.entities import Dialect, InstanceId, NetworkId, Upstream
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.path_rules import PathWord
from imdsproxy.model.policy import OperatorOverride, Policy, PolicyBook, render_policy_word
from imdsproxy.model.policy_report import decide_read

_GUESTS_KEPT: Final = 50_000
_READERS_KEPT: Final = 10_000
_GUEST_PARTS: Final = 2
# First part of a stored row's key.
_SUM, _SEEN, _TOTAL, _MODE = "sum", "seen", "total", "mode"
_OPEN_TREES_SHOWN: Final = 100
_EC2: Final = "/latest"
_TREES: Final = {Dialect.EC2: _EC2, Dialect.OPENSTACK: "/openstack", Dialect.NOCLOUD: "/nocloud"}

_Key: TypeAlias = tuple[str, ...]
Kept: TypeAlias = tuple[float, ...]
"""Numbers of a row that outlives the controller."""


@dataclass(frozen=True, slots=True)
class ReaderWithoutToken:
    """Client program of a guest, at one branch of a tree.

    Attributes:
        path: First three segments of the path; unusual characters are replaced by `_`.
        client: User-Agent, with the same replacement; empty if the requests had none.
        seen: Number of requests that were examined closely.
        refused: Number of these that were refused because a token is required.
    """

    path: str
    client: str
    seen: int
    refused: int
    last_at: float


@dataclass(frozen=True, slots=True)
class GuestWithoutToken:
    """Guest that reads without tokens.

    Attributes:
        reads: Number of reads that were not refused; an estimate if only one in several is counted.
        refused: Number of reads that were refused because a token is required; each is counted.
        readers: Client programs, the most recent first.
    """

    network: str
    instance: str
    reads: int
    refused: int
    last_at: float
    readers: tuple[ReaderWithoutToken, ...]


@dataclass(frozen=True, slots=True)
class OpenTree:
    """Tree that serves user-data without a token, though EC2's tree requires one or a path rule denies it.

    Attributes:
        tree: `/latest` (EC2's), `/openstack` or `/nocloud`.
    """

    network: NetworkId
    instance: InstanceId
    tree: str


@dataclass(frozen=True, slots=True)
class TokenVerdict:
    """Answer to the question whether `tokens: required` would refuse a client that reads today.

    Attributes:
        id: Id of the network, project or instance; empty for the host.
        ready: `unknown` if too little was counted for an answer.
        because: Reason, in one sentence without a full stop.
        guests: Number of guests that read without a token.
    """

    scope: Literal["host", "network", "project", "instance"]
    id: str
    ready: Literal["yes", "no", "unknown"]
    because: str
    guests: int


@dataclass(frozen=True, slots=True)
class TokenReport:
    """Report on guests that read without tokens, for the whole host.

    Attributes:
        since: Start of the count, over restarts of the controller, Unix time; counts older than a week are dropped.
        open_trees: At most a hundred of `open_tree_count`.
        one_in: Sampling rate: one in so many reads that are not refused is counted now; 0 for none
            (`tokens.count_reads`).
        all_since: Time since which every read is counted, Unix time; `None` if only some reads are counted.
        days: Days without any read without a token that the verdict yes requires.
        verdicts: Verdict of the host first; then at most a hundred of networks and projects, those with no first.
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
    """Report on one instance's reads without session tokens.

    Attributes:
        verdict: Answer whether tokens can be required of the instance.
    """

    since: float
    one_in: int
    verdict: TokenVerdict
    guests: tuple[GuestWithoutToken, ...]
    open_trees: tuple[OpenTree, ...]


@dataclass(slots=True)
class _Sums:
    """Counts by key over all workers. Each worker begins at 0 and may drop entries at any time."""

    kept: int
    changed: dict[_Key, Kept | None]
    totals: dict[_Key, tuple[int, int, float]] = field(default_factory=dict)
    before: dict[str, dict[_Key, CountedRow]] = field(default_factory=dict)

    def add(
        self, worker: str, rows: Iterable[CountedRow], now: float
    ) -> list[tuple[_Key, int, int]]:
        """Add one worker's table; return the increases since that worker's previous table."""
        before, seen = self.before.get(worker, {}), dict[_Key, CountedRow]()
        for row in rows:
            # Names that differ only in their replaced characters count as one client.
            seen[row.key] = row.plus(seen[row.key]) if row.key in seen else row
        self.before[worker] = seen
        self.changed.update({(_SEEN, worker, *key): None for key in before.keys() - seen.keys()})
        # The base for an entry that is new, or that the worker dropped and made again.
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
        """Drop the previous tables of workers that have ended."""
        for gone in self.before.keys() - set(workers):
            self.changed.update({(_SEEN, gone, *key): None for key in self.before.pop(gone)})


@dataclass(slots=True)
class TokenLedger:
    """Counts of all workers since `since`; bounded, as the workers' tables are.

    A worker's name is unique: no later worker has it. The ledger stores each worker's last table with the sums, so that
    the next controller continues the count.

    Attributes:
        read: Reads by network, as of `GuestWithoutToken`; only ever grows.
        refused: Refused reads by network; only ever grows.
        all_since: Time since which every read is counted, Unix time; `None` if some or all reads are not counted.
        changes: Changed rows to store, by key; `None` for removed rows. The caller that stores them clears it.
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
        """Restore the rows that an earlier controller stored; call it before any other method."""
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
        """Set the sampling rate: one in so many reads is counted from now on."""
        if one_in == self._one_in:
            return
        if one_in and self._one_in == 0:
            self.since = now
        self.all_since = now if one_in == 1 else None
        self._one_in = one_in
        self.changes[_MODE,] = (self.since, self.all_since or 0, one_in)

    def keep_workers(self, workers: Collection[str]) -> None:
        """Drop the previous tables of all other workers: those have ended."""
        for sums in (self._guests, self._readers):
            sums.forget_others(workers)

    def add(
        self, worker: str, guests: Iterable[CountedRow], readers: Iterable[CountedRow], now: float
    ) -> None:
        for (network, _), reads, refused in self._guests.add(worker, guests, now):
            self.read[network] += reads
            self.refused[network] += refused
            self.changes[_TOTAL, network] = (self.read[network], self.refused[network])
        self._readers.add(worker, readers, now)

    def report(self, trees: Iterable[OpenTree]) -> TokenReport:
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
    """List the trees that serve user-data without a token though another tree protects it (`open_user_data`)."""
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
"""Path of user-data in each tree."""


@dataclass(frozen=True, slots=True)
class OpenUserData:
    """User-data that is protected in one tree and open in others.

    Attributes:
        denied: User-data paths that a path rule denies.
        trees: Trees that serve it without a token: `/latest` for EC2's, `/openstack`, `/nocloud`.
    """

    denied: tuple[str, ...]
    trees: tuple[str, ...]


@lru_cache(1024)
def open_user_data(policy: Policy, served: frozenset[str] = frozenset(USER_DATA)) -> OpenUserData:
    """List the trees where a policy leaves user-data open; none if the policy protects it nowhere, or everywhere.

    A rule that denies a whole tree turns the tree off, which does not count as protection. Sealed user-data does not
    count either: after the boot it is not served, and before that the other trees require no token.
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
