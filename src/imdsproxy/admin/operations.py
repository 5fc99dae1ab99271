"""What the admin API asks of the controller, and in which shapes it is answered.

The controller implements `Operations`; the API, health and metrics know nothing else of it. All
values are frozen and say what was true at one moment.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from imdsproxy.admin.reports import LeftOut, StatusReport

# The OpenAPI document is made from these annotations, so they are imported for real.
from imdsproxy.config.change import SettingsReload
from imdsproxy.core.haproxy.watching import WatchReport
from imdsproxy.core.model import (
    Instance,
    InstanceId,
    IpAddress,
    MacAddress,
    Network,
    NetworkId,
)
from imdsproxy.core.observation import Claimant, Conflict, SourceName
from imdsproxy.core.policy_decides import Decided
from imdsproxy.core.policy_told import PolicyInForce
from imdsproxy.core.progress import Step
from imdsproxy.core.token_report import TokenReport

__all__ = [
    "CardReport",
    "DocumentAnswer",
    "Explanation",
    "GuardChange",
    "InstanceReport",
    "KeyRotation",
    "NetworkReport",
    "Operations",
    "PairReport",
    "PathDecision",
    "Probe",
    "TokenReport",
    "WatchReport",
    "Written",
]


@dataclass(frozen=True, slots=True)
class NetworkReport:
    """A network, where it comes from, and whether it is served; `left_out` says why not."""

    network: Network
    source: SourceName
    instances: int = 0
    left_out: LeftOut | None = None


@dataclass(frozen=True, slots=True)
class InstanceReport:
    """An instance, where it comes from, and the revision that guests see.

    Attributes:
        revision: Hash of the compiled record; empty while it is not compiled.
        conflicts: What others claim as well.
        pending: Why guests do not get the record, or not its newest version.
    """

    instance: Instance
    source: SourceName
    revision: str = ""
    conflicts: tuple[Conflict, ...] = ()
    pending: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Written:
    """What a change did: acknowledged once no worker of HAProxy answers with the old state.

    Attributes:
        applied: HAProxy has it. Off: it is stored, and comes in force when `pending` is mended.
        pending: Why it is not in force yet, as `namespace n1 is missing`.
        warnings: Names in the records that documents change or lack; twenty at most, then how many more.
    """

    networks: int = 0
    instances: int = 0
    applied: bool = True
    pending: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GuardChange:
    """What an operator did about one instance; it is on disk, and outlives every restart.

    Attributes:
        epoch: How often its tokens were revoked.
        reopened_at: When its boot was opened again, Unix time; `None` for never.
        applied: No worker of HAProxy goes by the state before. Off: it comes in force when `pending` is mended.
        pending: Why it is not in force yet.
        shared: Of a revocation, the file of keys that other hosts have too: none of them hears of it.
    """

    instance: InstanceId
    epoch: int
    reopened_at: int | None = None
    applied: bool = True
    pending: tuple[str, ...] = ()
    shared: str | None = None


@dataclass(frozen=True, slots=True)
class KeyRotation:
    """A fresh key signs tokens.

    Attributes:
        kid: Its name, with which its tokens begin.
        keys: How many keys are believed, with this one.
        file: Where they are.
        applied: Every worker of HAProxy knows it.
        pending: Why not yet.
    """

    kid: str
    keys: int
    file: str
    applied: bool = True
    pending: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PairReport:
    """An address and its MAC, in a network that checks them.

    Attributes:
        seen: The MAC that the neighbour table has.
        expected: The one that the records want; `*` for any, `None` where nobody has the address.
        granted: The one that the kernel lets through to HAProxy's quick answers.
        gate: The kernel looks at MACs there; without that nobody with a MAC in its record is answered.
    """

    seen: MacAddress | None
    expected: MacAddress | None
    granted: MacAddress | None
    gate: bool


@dataclass(frozen=True, slots=True)
class CardReport:
    """A network card of the record.

    Attributes:
        seen: The MACs that the neighbour table has for its addresses: those of the guest's real network cards.
    """

    network: NetworkId
    mac: MacAddress
    seen: tuple[MacAddress, ...] = ()


@dataclass(frozen=True, slots=True)
class PathDecision:
    """What the policy says to a GET; whether there is such a document is another question.

    Attributes:
        path: As it was asked for.
        without_token: Where the guest sends no session token.
        with_token: Where it sends a good one.
    """

    path: str
    without_token: Decided
    with_token: Decided


@dataclass(frozen=True, slots=True)
class Probe:
    """A GET as the guest sends it, without a session token, and the status of its answer."""

    path: str
    status: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """Who a guest is, why, and what it gets.

    Attributes:
        verdict: `found`, `unknown`, `mismatch`, `conflict`, `no-network` or `left-out`.
        answer: The HTTP status a document of an enabled dialect has: 200, 403, 404 or 503; `None` where the
            request is sent to Nova, which decides.
        why: The steps that led there, one sentence each, in order.
        how: `address`, `eui64`, `neighbour` or `router` where an instance was found.
        installed: The value in HAProxy's map, as its worker has it; `None` when it has none or
            could not be asked.
        policy: What applies to the guest's requests, as name and value (dialects, endpoint, hold).
        pair: The address and its MAC; `None` where the network does not check them.
        cards: The record's network cards, where an instance was found.
        rules: What the guest may read and who said so, where an instance was found.
        decision: Of the policy, where it was asked for by a path and an instance was found.
        probe: What a GET got, where one was asked for.
    """

    network: NetworkId
    address: IpAddress
    verdict: str
    answer: int | None
    why: tuple[str, ...] = ()
    instance: InstanceId | None = None
    instance_name: str | None = None
    source: SourceName | None = None
    how: str | None = None
    revision: str | None = None
    installed: str | None = None
    claimants: tuple[Claimant, ...] = ()
    policy: Mapping[str, str] = field(default_factory=dict)
    pair: PairReport | None = None
    cards: tuple[CardReport, ...] = ()
    rules: PolicyInForce | None = None
    decision: PathDecision | None = None
    probe: Probe | None = None


@dataclass(frozen=True, slots=True)
class DocumentAnswer:
    """What a guest would be told."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


class Operations(Protocol):
    """What the controller does for the admin API.

    Every method may raise `SourceUnavailable` where a store or the data plane does not answer. The
    `put_*` and `remove_*` methods return once the change is stored and no worker of HAProxy answers
    with the state before; they raise `SourceRefused` when no writable source is enabled, or when
    the record belongs to another source.
    """

    async def status(self) -> StatusReport:
        """Everything at one moment."""
        ...

    def network_id(self, text: str) -> NetworkId:
        """The id of the network that has this id or name; the text itself where none has.

        Raises:
            RequestRefused: Several have the name.
        """
        ...

    def instance_id(self, text: str) -> InstanceId:
        """The same of instances."""
        ...

    async def list_networks(self) -> Sequence[NetworkReport]:
        """Every network, by id."""
        ...

    async def get_network(self, network: NetworkId) -> NetworkReport:
        """One network; `NotFound` otherwise."""
        ...

    async def put_network(self, network: Network, *, create: bool = False) -> Written:
        """Store a network, or replace it; with `create`, `AlreadyExists` when there is one."""
        ...

    async def remove_network(self, network: NetworkId) -> Written:
        """Remove a network.

        Raises:
            NotFound: There is none.
            SourceRefused: Instances still have ports in it (`problems` names them).
        """
        ...

    async def list_instances(self, network: NetworkId | None = None) -> Sequence[InstanceReport]:
        """Every instance, or those with a port in `network`, by id."""
        ...

    async def get_instance(self, instance: InstanceId) -> InstanceReport:
        """One instance; `NotFound` otherwise."""
        ...

    async def put_instance(self, instance: Instance, *, create: bool = False) -> Written:
        """Store an instance, or replace it.

        Raises:
            AlreadyExists: With `create`, when there is one of this id.
            SourceRefused: A network is unknown, or an address taken (`problems` has the fields).
        """
        ...

    async def remove_instance(self, instance: InstanceId) -> Written:
        """Remove an instance; `NotFound` when there is none."""
        ...

    def progress(self) -> tuple[Step, ...]:
        """What is under way that takes long, and how far it is."""
        ...

    async def put_records(
        self, networks: Sequence[Network], instances: Collection[Instance], *, create: bool = False
    ) -> Written:
        """Store many at once: all of them, or none and `SourceRefused` (or `AlreadyExists`)."""
        ...

    async def revoke_tokens(self, instance: InstanceId) -> GuardChange:
        """Have no token be good that the instance has now; fresh ones are.

        Raises:
            NotFound: No source tells of the instance, and nothing was ever done about it.
            HostRefused: It cannot be written; nothing has changed.
        """
        ...

    async def reopen_instance(self, instance: InstanceId) -> GuardChange:
        """Have its boot begin now: what is locked after the boot is open until that is over again.

        Raises:
            NotFound: As `revoke_tokens`.
            HostRefused: As `revoke_tokens`.
        """
        ...

    async def rotate_token_keys(self) -> KeyRotation:
        """Have a fresh key sign tokens; those of the two keys before it stay good as long as they would be.

        Raises:
            SecretUnreadable: The file of the keys cannot be used; nothing has changed.
            HostRefused: It cannot be written; nothing has changed.
        """
        ...

    async def read_password(self, instance: InstanceId) -> bytes | None:
        """The password that the instance's guest posted, as it was posted; `None` where it has posted none.

        Raises:
            NotFound: There is no such instance.
        """
        ...

    async def clear_password(self, instance: InstanceId) -> bool:
        """Forget it, so that the guest can post another; `False` where there is none. Raises as `read_password`."""
        ...

    async def explain(
        self,
        network: NetworkId,
        address: IpAddress,
        path: str | None = None,
        *,
        probe: bool = False,
    ) -> Explanation:
        """Who has `address` in `network`, and why; never raises for an unknown one.

        With `path`, also what the policy says to a GET of it. With `probe`, also what a GET of it gets, or of a
        document that every instance has.
        """
        ...

    async def explain_instance(
        self, instance: InstanceId, path: str | None = None, *, probe: bool = False
    ) -> Sequence[Explanation]:
        """The same of each address that the instance is known by; `NotFound` where there is no such instance."""
        ...

    async def get(
        self,
        network: NetworkId,
        address: IpAddress,
        path: str,
        headers: Sequence[tuple[str, str]] = (),
    ) -> DocumentAnswer:
        """What the guest at `address` would be told for `GET path` (with its query).

        Nothing is remembered of it; an unknown guest is answered as one is, without being held.
        """
        ...

    async def watch(
        self,
        cursor: int | None,
        *,
        network: NetworkId | None = None,
        instance: InstanceId | None = None,
    ) -> WatchReport:
        """What guests were answered since `cursor`, of one network or instance or of all.

        The first question has HAProxy tell of requests, by a reload; another reload ends that when nobody has asked
        for some seconds.
        """
        ...

    async def token_report(self) -> TokenReport:
        """Who still reads without session tokens, as HAProxy has counted, and what required tokens leave open."""
        ...

    async def render(self) -> str:
        """The HAProxy configuration as it would be written now; nothing is touched."""
        ...

    async def reload(self, *, allow_dropped: bool = False) -> SettingsReload:
        """Read the settings again and take over what can be; `ConfigError` changes nothing.

        `SettingsDropped` where files or policies are missing that were there, unless `allow_dropped`.

        Returns once guests are answered by them, or says in `pending` why they are not yet.
        """
        ...

    async def stop(self, *, data_plane: bool) -> None:
        """End the controller after this call is answered; with `data_plane`, all processes."""
        ...
