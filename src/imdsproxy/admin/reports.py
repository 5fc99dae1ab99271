"""What the admin API answers, where no other part has a type for it: the status, an explanation, a change of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from imdsproxy.admin.record_reports import LeftOut
from imdsproxy.core.haproxy.limits import Asker
from imdsproxy.core.model import InstanceId, IpAddress, MacAddress, NetworkId
from imdsproxy.core.observation import Claimant, Conflict, SourceName
from imdsproxy.core.policy_report import Decided, PolicyInForce
from imdsproxy.core.timing import Step
from imdsproxy.dataplane.haproxy import ReloadReport
from imdsproxy.errors import Problem
from imdsproxy.nova.upstream import NovaEndpointReport


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One source of records.

    Attributes:
        in_sync: It has reported all its records.
        stale_s: Seconds for which it has not answered, 0 while it does; its last records stay.
        problems: Every record that it refuses now.
    """

    name: SourceName
    in_sync: bool
    networks: int = 0
    instances: int = 0
    stale_s: float = 0.0
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class HaproxyReport:
    """The data plane; `None` where it is not known (not started, or not answering)."""

    version: str | None = None
    master: int | None = None
    worker: int | None = None
    old_workers: tuple[int, ...] = ()
    reloads: int = 0
    last_reload: ReloadReport | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class DocumentsReport:
    """The document server's processes: the parent first.

    Attributes:
        needed: Off where the settings say so; then it does not run.
    """

    pids: tuple[int, ...] = ()
    problem: str = ""
    needed: bool = True


@dataclass(frozen=True, slots=True)
class UnixListenerReport:
    """The socket for Neutron's proxies, where it is enabled.

    Attributes:
        serving: HAProxy's socket is at the path.
        mode: Of the socket, as `0644`; empty where it is left out.
        user: Its owner's uid.
        group: Its group's gid.
        problem: Why it is left out.
        taken_over: How often the path was taken from a process that lives, since the controller started.
        taken_from: The process, the last time; empty for none.
    """

    path: str
    serving: bool
    mode: str = ""
    user: int | None = None
    group: int | None = None
    problem: str = ""
    taken_over: int = 0
    taken_from: str = ""


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The last plan: what it did, why, and what of it failed (and is tried again)."""

    at: float
    operations: int
    reasons: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    took_s: float = 0.0


@dataclass(frozen=True, slots=True)
class MacsReport:
    """What is made of guests' MACs.

    Attributes:
        gates: Networks where the kernel looks at them.
        refused: Networks where it should, and cannot: guests with a MAC in their records get no answer there.
        pairs: Addresses that are let through with a MAC, or with any.
        learned: Addresses that guests have by their MAC alone.
        mismatches: Requests with an address of one and the MAC of another since the controller started, by network;
            the twenty with the most.
    """

    gates: int = 0
    refused: int = 0
    pairs: int = 0
    learned: int = 0
    mismatches: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The audit log.

    Attributes:
        mode: `sampled` or `all`.
        written: Lines since the controller started.
        left_out: Requests without a line since then, because HAProxy's ring or the journal had no room.
        problem: Why no lines are written now.
    """

    mode: str
    destination: str
    written: int = 0
    left_out: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether guests get what the sources say.

    Attributes:
        reasons: Why not, a line each.
        degraded: Networks that are configured and not served, then what is wrong and no guest notices; a line each.
    """

    ready: bool
    reasons: tuple[str, ...] = ()
    degraded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StatusReport:
    """Everything at one moment.

    Attributes:
        started_at: Unix time of the controller's start, in seconds.
        serving: Networks that are served as configured.
        problems: What is wrong and belongs to no source, network or instance.
        unix_listener: `None` where it is off.
        warnings: Names in records that documents change or lack; twenty at most, then how many more.
        policy_for_nobody: Where settings speak of a network, project or instance that no source tells of.
        busiest: Who is kept to its limits now, and then who asks for most; ten at most.
        audit: `None` where there is none.
        progress: Long work that is under way.
    """

    version: str
    controller: int
    started_at: float
    uptime_s: float
    readiness: Readiness
    networks: int
    serving: int
    instances: int
    addresses: int
    left_out: tuple[LeftOut, ...] = ()
    sources: tuple[SourceReport, ...] = ()
    conflicts: tuple[Conflict, ...] = ()
    problems: tuple[Problem, ...] = ()
    haproxy: HaproxyReport = field(default_factory=HaproxyReport)
    documents: DocumentsReport = field(default_factory=DocumentsReport)
    last_plan: PlanReport | None = None
    nova: tuple[NovaEndpointReport, ...] = ()
    unix_listener: UnixListenerReport | None = None
    macs: MacsReport = field(default_factory=MacsReport)
    warnings: tuple[str, ...] = ()
    policy_for_nobody: tuple[str, ...] = ()
    busiest: tuple[Asker, ...] = ()
    audit: AuditReport | None = None
    progress: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class PairReport:
    """An address and its MAC, in a network that checks them.

    Attributes:
        seen: The MAC that the neighbour table has.
        expected: The one that the records want; `*` for any, `None` where no instance has the address.
        granted: The one that the kernel lets through to HAProxy's quick answers.
        gate: The kernel looks at MACs there; without that, guests with a MAC in their records get no answer.
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


@dataclass(slots=True)
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
        rules: What the guest may read and which scope sets it, where an instance was found.
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
