"""Nova's endpoints from the settings, with secrets and resolved names, as values for the planner."""

import asyncio
import hashlib
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, ClassVar, Final

import structlog

from imdsproxy.config.nova import EndpointSetSettings, NovaSettings, NovaUrl
from imdsproxy.errors import ConfigUnreadable, DataplaneError, Problem, SecretUnreadable
from imdsproxy.haproxy.master import WorkerEnded
from imdsproxy.haproxy.process import Haproxy
from imdsproxy.haproxy.rules.model import NovaBackend, NovaServer, NovaTimes, NovaTls
from imdsproxy.haproxy.rules.nova import refused_counter, set_of_server
from imdsproxy.haproxy.rules.runtime import WorkerTotals, parse_count
from imdsproxy.host.files import read_secret, write_atomic
from imdsproxy.model.entities import IpAddress
from imdsproxy.nova.routing import EndpointSet, NovaRouting, find_secret_fault
from imdsproxy.reconcile.part import By, Impact, Part

RESOLVE_EVERY_S: Final = 30.0
_MAX_ADDRESSES: Final = 8
"""Maximum number of addresses of a name: each becomes a server with its own checks."""


async def resolve_name(name: str) -> tuple[IpAddress, ...]:
    """Resolve a name as this host does (/etc/hosts, DNS). Raises `OSError`: the name cannot be resolved now."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise OSError(error.strerror) from error
    return tuple(dict.fromkeys(ip_address(entry[4][0]) for entry in found))


@dataclass(slots=True)
class NovaUpstream(Part):
    """Nova's endpoints in force, changed by `read`, and by `resolve` if a name has other addresses.

    Attributes:
        directory: Directory for files that HAProxy reads and that are made from other files.
        resolver: Function that returns the addresses of a host's name; raises `OSError` if the look-up fails.
        unresolved: Names that cannot be resolved, with reasons.
    """

    impact: ClassVar = Impact.HARMS
    directory: Path
    resolver: Callable[[str], Awaitable[tuple[IpAddress, ...]]] = resolve_name
    routing: NovaRouting = field(default_factory=NovaRouting)
    unresolved: tuple[Problem, ...] = ()
    _settings: NovaSettings = field(default_factory=NovaSettings)
    _tls: Mapping[str, NovaTls | None] = field(default_factory=dict)
    _addresses: dict[str, tuple[IpAddress, ...]] = field(default_factory=dict)

    def read(self, settings: NovaSettings) -> bool:
        """Apply settings and read their secrets; return whether records change.

        Raises:
            SecretUnreadable: A secret is missing or empty; the routing in force stays.
            ConfigUnreadable: Another file is missing.
        """
        sets = settings.endpoint_sets
        routing = NovaRouting(tuple(_endpoint_set(name, one) for name, one in sets.items()))
        joined_files = {name: self.directory / f"nova-{name}.pem" for name in sets}
        found = {name: _read_tls(name, one, joined_files[name]) for name, one in sets.items()}
        for name, (_, joined) in found.items():
            if joined is not None:
                write_atomic(joined_files[name], joined, mode=0o600)
        self._tls = {name: tls for name, (tls, _) in found.items()}
        changed = routing != self.routing
        self.routing, self._settings = routing, settings
        return changed

    def problems(self) -> tuple[Problem, ...]:
        return self.unresolved

    def names(self) -> tuple[str, ...]:
        return tuple(one.name for one in self.routing.sets)

    @property
    def times(self) -> NovaTimes:
        one = self._settings
        check = one.health_check, one.health_check_interval_s
        return NovaTimes(one.connect_timeout_s, one.response_timeout_s, *check)

    def backends(self) -> tuple[NovaBackend, ...]:
        sets = sorted(self._settings.endpoint_sets.items())
        return tuple(self._backend(name, one) for name, one in sets)

    async def resolve(self) -> bool:
        """Resolve every name; return whether the addresses have changed.

        A name that cannot be resolved keeps its last addresses.
        """
        before = dict(self._addresses)
        looked_up = [
            await self._look_up(endpoint.url, f"nova.endpoint_sets.{name}.endpoints[{number}].url")
            for name, one in self._settings.endpoint_sets.items()
            for number, endpoint in enumerate(one.endpoints)
        ]
        problems = tuple(problem for problem in looked_up if problem is not None)
        for problem in problems:
            if problem not in self.unresolved:
                structlog.get_logger().warning(
                    "nova endpoint not found", field=problem.field, reason=problem.reason
                )
        self.unresolved = problems
        return before != self._addresses

    async def follow(self, on_change: Callable[[], object]) -> None:
        while True:
            await asyncio.sleep(RESOLVE_EVERY_S)
            if await self.resolve():
                on_change()

    async def _look_up(self, url: NovaUrl, where: str) -> Problem | None:
        host = url.host
        if url.address is not None:
            return None
        known = self._addresses.get(host, ())
        kept = "requests go to its last addresses" if known else "no request can be sent there"
        try:
            found = await self.resolver(host)
        except OSError as error:
            return Problem(where, f"the name {host} cannot be resolved: {error}", kept)
        if not found:
            return Problem(where, f"the name {host} has no address", kept)
        # Sort the addresses, so that a mere shuffle does not count as a change.
        self._addresses[host] = tuple(
            sorted(found[:_MAX_ADDRESSES], key=lambda a: (a.version, int(a)))
        )
        return None

    def _backend(self, name: str, one: EndpointSetSettings) -> NovaBackend:
        servers: dict[tuple[IpAddress, int], NovaServer] = {}
        for endpoint in one.endpoints:
            literal, port = endpoint.url.address, endpoint.url.port
            addresses = (literal,) if literal else self._addresses.get(endpoint.url.host, ())
            for address in addresses:
                server = NovaServer(address, port, int(endpoint.secret == "next"))  # noqa: S105 - which one, not what
                servers.setdefault((address, port), server)
        host = one.host or one.endpoints[0].url.authority
        # The loopback exists from the first step of a secret's replacement to the last, so no step removes it while in
        # use.
        loopback = one.next_secret_file is not None and len(servers) > 1
        return NovaBackend(name, tuple(servers.values()), host, self._tls[name], loopback)


def _read_tls(
    name: str, one: EndpointSetSettings, joined_file: Path
) -> tuple[NovaTls | None, bytes | None]:
    """Return the TLS parameters of a set, and the content for `joined_file`.

    If our certificate and its key are in two files, the content joins them: HAProxy reads both from one file.

    Raises:
        ConfigUnreadable: A file is missing, which would fail HAProxy's whole configuration.
        SecretUnreadable: The key cannot be read, or others may read it.
    """
    files = {"ca_file": one.ca_file, "client_cert_file": one.client_cert_file}
    certificates = [
        b"" if path is None else _read_file(path, f"nova.endpoint_sets.{name}.{key}")
        for key, path in files.items()
    ]
    contents: str | None = None
    client, joined = one.client_cert_file, None
    if any(certificates):
        digests = b"".join(hashlib.sha256(each).digest() for each in certificates)
        contents = hashlib.sha256(digests).hexdigest()[:16]
    if one.client_key_file is not None:
        key = read_secret(one.client_key_file)
        client, joined = joined_file, b"\n".join((certificates[1].rstrip(), key.strip(), b""))
    first = one.endpoints[0].url
    if first.scheme == "http":
        return None, joined
    ca = "@system-ca" if one.ca_file is None else str(one.ca_file)
    shown = None if client is None else str(client)
    return NovaTls(one.server_name or first.host, ca, one.verify, shown, contents), joined


def read_signing_secret(path: Path) -> bytes:
    """Read the signing secret in `path`, which must equal Nova's.

    Raises:
        SecretUnreadable: See `read_secret`; or Nova cannot have such a secret.
    """
    secret = read_secret(path).strip()
    fault = find_secret_fault(secret)
    if fault is None:
        return secret
    raise SecretUnreadable(
        f"the secret {path} {fault}",
        hint="put the value of Nova's `[neutron] metadata_proxy_shared_secret` into it, and nothing else",
    )


def _endpoint_set(name: str, one: EndpointSetSettings) -> EndpointSet:
    following = None if one.next_secret_file is None else read_signing_secret(one.next_secret_file)
    networks, projects = frozenset(one.networks), frozenset(one.projects)
    return EndpointSet(name, read_signing_secret(one.secret_file), following, networks, projects)


def _read_file(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigUnreadable(
            f"cannot read {path}: {error.strerror}", problems=[Problem(where, "cannot be read")]
        ) from error


_TEXTS: Final = ("pxname", "svname", "type", "status", "last_chk", "check_status")
_COLUMNS: Final = frozenset((*_TEXTS, "stot", "hrsp_2xx", "econ", "eresp"))
_SERVER: Final = "2"


@dataclass(frozen=True, slots=True)
class NovaEndpointReport:
    """Address of one of Nova's metadata APIs, as HAProxy sees it.

    Attributes:
        requests: Requests that the running worker has sent there.
    """

    endpoint_set: str
    endpoint: str
    up: bool
    reason: str = ""
    requests: int = 0
    failures: int = 0


@dataclass(slots=True)
class NovaWatch(Part):
    """Reader of HAProxy's counters for Nova, at intervals.

    If Nova refuses our signature, it answers 403 to every request of its guests. That is logged once, and again only
    after it has recovered in between.

    Attributes:
        refused: Number of answers 403 by endpoint set, since the controller knows the set.
    """

    impact: ClassVar = Impact.HARMS
    haproxy: Haproxy
    sets: Callable[[], Iterable[str]]
    endpoints: tuple[NovaEndpointReport, ...] = ()
    refused: WorkerTotals[str] = field(default_factory=WorkerTotals)
    _good: WorkerTotals[str] = field(default_factory=WorkerTotals)
    _refusing: set[str] = field(default_factory=set)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def problems(self) -> tuple[Problem, ...]:
        """Return endpoint sets whose Nova refuses our signature now, and sets without an answering endpoint."""
        answering = {one.endpoint_set for one in self.endpoints if one.up}
        silent = {one.endpoint_set for one in self.endpoints} - answering
        return (*map(_refused, sorted(self._refusing)), *map(_silent, sorted(silent)))

    async def report(self) -> Mapping[str, object]:
        await self.refresh()
        return {"nova": self.endpoints}

    def nova_endpoint_up(self) -> Annotated[By, "gauge", "endpoint_set", "endpoint"]:
        """1 while HAProxy considers the endpoint of Nova up."""
        return {(one.endpoint_set, one.endpoint): one.up for one in self.endpoints}

    def nova_endpoint_failures(self) -> Annotated[By, "counter", "endpoint_set", "endpoint"]:
        """Failed connections to the endpoint of Nova, and requests without a timely and complete answer."""
        return {(one.endpoint_set, one.endpoint): one.failures for one in self.endpoints}

    def nova_refused(self) -> Annotated[By, "counter", "endpoint_set"]:
        """Answers 403 from Nova, by endpoint set: Nova refuses the signature, most likely for another secret."""
        if self.refused.worker is None:
            return None
        return {**dict.fromkeys(self.sets(), 0), **self.refused.totals}

    async def refresh(self) -> None:
        """Read the counters once; if HAProxy does not answer, the last report stays."""
        # A late answer of another call has lower counts, which would be subtracted from the sums.
        async with self._lock:
            names = sorted(self.sets())
            if not names or (worker := self.haproxy.worker) is None:
                self.endpoints = ()
                return
            master = self.haproxy.master
            try:
                rows = await master.read_stat(worker, _COLUMNS)
                refused = {
                    name: await master.read_number(worker, refused_counter(name)) for name in names
                }
            except (DataplaneError, WorkerEnded):
                return
            self.take(worker, rows, refused)

    def take(
        self, worker: int, rows: Iterable[Mapping[str, str]], refused: Mapping[str, int | None]
    ) -> None:
        """Evaluate one worker's rows of `show stat`, and its number of answers 403 by endpoint set."""
        # Errors that a worker counted before the controller started may be over.
        earlier = self.refused.worker is None
        counted = {one: count for one, count in refused.items() if count is not None}
        more = self.refused.add(worker, counted)
        found: dict[tuple[str, str], NovaEndpointReport] = {}
        good: Counter[str] = Counter()
        for row in rows:
            endpoint = row["svname"]
            name = set_of_server(row["pxname"], endpoint)
            if name is None or row["type"] != _SERVER:
                continue
            good[name] += parse_count(row, "hrsp_2xx")
            # A set has several backends: one for each way in which its requests are checked and forwarded.
            found[name, endpoint] = _endpoint(name, row, found.get((name, endpoint)))
        self.endpoints = tuple(found.values())
        well = self._good.add(worker, good)
        log = structlog.get_logger()
        for name in refused:
            if earlier and well[name] > 0:
                continue
            if more[name] > 0 and name not in self._refusing:
                self._refusing.add(name)
                hint = _refused(name).hint
                log.warning("nova refuses our signature", endpoint_set=name, hint=hint)
            elif more[name] <= 0 and well[name] > 0 and name in self._refusing:
                self._refusing.discard(name)
                log.info("nova takes our signature again", endpoint_set=name)


def _endpoint(
    name: str, row: Mapping[str, str], before: NovaEndpointReport | None
) -> NovaEndpointReport:
    requests = parse_count(row, "stot")
    failures = parse_count(row, "econ") + parse_count(row, "eresp")
    if before is not None:
        return replace(
            before, requests=before.requests + requests, failures=before.failures + failures
        )
    up = row["status"].startswith("UP")
    words = () if up else (row["check_status"].lstrip("* "), row["last_chk"])
    reason = " ".join(word for word in words if word)
    up = up or row["status"].startswith("no check")
    return NovaEndpointReport(name, row["svname"], up, reason, requests, failures)


def _refused(name: str) -> Problem:
    return Problem(
        f"nova.endpoint_sets.{name}.secret_file",
        "Nova refuses our signature (403): its guests get no metadata",
        "put the secret of Nova's `[neutron] metadata_proxy_shared_secret` into the file, then run `imdsproxy reload`",
    )


def _silent(name: str) -> Problem:
    return Problem(
        f"nova.endpoint_sets.{name}.endpoints",
        "no endpoint answers: its guests get 503",
        "start nova-api-metadata, or correct the URLs",
    )
