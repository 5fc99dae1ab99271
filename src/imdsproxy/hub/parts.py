"""Parts of a hub, made in one order."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from random import Random, SystemRandom
from typing import Any, Final

from imdsproxy.config.hub import EtcdSettings, HubSettings
from imdsproxy.config.schema import Settings
from imdsproxy.errors import (
    SourceUnavailable,
)
from imdsproxy.fleet import codec, layout
from imdsproxy.fleet.layout import HostId
from imdsproxy.fleet.members import admits_host
from imdsproxy.haproxy.layout import Layout
from imdsproxy.host.clock import Clock
from imdsproxy.host.files import read_secret
from imdsproxy.hub.hosts.cloud import open_cloud
from imdsproxy.hub.hosts.in_force import Peers
from imdsproxy.hub.hosts.issuer import FleetIssuer, explain_unsigned
from imdsproxy.hub.hosts.sealed import TokenKeyRing, password_item
from imdsproxy.hub.hosts.streams import Streams
from imdsproxy.hub.pki.authority import Authority
from imdsproxy.hub.pki.files import (
    FleetFiles,
    HubNames,
    read_hub_names,
    refuse_shared_authority,
)
from imdsproxy.hub.replica import Replica
from imdsproxy.hub.store.envelope import COPY_KEY, Envelope
from imdsproxy.hub.store.etcd import Etcd, open_tls
from imdsproxy.hub.store.journal import FILE, Journal
from imdsproxy.hub.store.restores import Restores
from imdsproxy.hub.store.state import FleetState
from imdsproxy.issuer.local_signer import SignerClient
from imdsproxy.issuer.rotation import Pace
from imdsproxy.reconcile.reconciler import Reconciler

_LONGEST_S: Final = 60.0
_SHOWN_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Hub:
    """Parts of a hub, which its routes use. `url` is the URL at which others reach the hub."""

    settings: HubSettings
    files: FleetFiles
    names: HubNames
    url: str
    authority: Authority
    envelope: Envelope
    token_keys: TokenKeyRing
    etcd: Etcd
    state: FleetState
    streams: Streams
    replica: Replica
    clock: Clock
    random: Random
    issuer: FleetIssuer | None = None
    loops: dict[str, Reconciler] = field(default_factory=dict)

    async def keep(
        self,
        name: str,
        work: Callable[[], Coroutine[Any, Any, None]],
        final: tuple[type[Exception], ...] = (),
    ) -> None:
        """Run a loop until it returns or is cancelled; report exceptions except `final` ones, and start it again.

        A loop may get a value that it cannot handle, or have a fault. Neither the hub nor its hosts may fail because of
        one loop.
        """
        self.loops[name] = Reconciler(
            name,
            "loop failed",
            1.0,
            _LONGEST_S,
            retried=Exception,
            final=final,
            settled_s=_LONGEST_S,
            jitter=partial(self.random.uniform, 0.5, 1.0),
            clock=self.clock.monotonic,
        )
        await self.loops[name].attempt(work)

    def loop_failures(self) -> dict[str, str]:
        """Return loops that failed within the last hour, with time and reason of the last failure."""
        now, failures = self.clock.monotonic(), dict[str, str]()
        for name, one in self.loops.items():
            if one.failure is not None and (age_s := now - one.failed_at) < _SHOWN_S:
                at = f"{self.clock.now() - timedelta(seconds=age_s):%Y-%m-%d %H:%M:%S UTC}"
                why = codec.plain(one.failure.reason)
                failures[name] = f"failed at {at}, and was restarted: {why}"
        return failures

    def problems(self) -> dict[str, str]:
        """Return the problems of this hub itself by their subject."""
        found = {f"loop {name}": why for name, why in self.loop_failures().items()}
        return found if self.issuer is None else found | self.issuer.problems()

    def unsigned(self) -> str | None:
        """Return the reason why this hub can sign no identity token; `None` if it can, or if its settings give none."""
        if self.issuer is None or self.issuer.problem is None:
            return None
        return explain_unsigned(codec.plain(self.issuer.problem))

    def unready(self) -> str | None:
        return explain_unready(self.state, self.envelope)


def explain_unready(state: FleetState, envelope: Envelope) -> str | None:
    """Return the reason why a hub may not serve hosts, though it has read etcd; `None` if it may.

    A hub could neither send unreadable values nor distinguish them from absent values.
    """
    if not state.meta.fleet:
        why = state.problems.get(layout.META, "it is not there")
        return f"{layout.META} names no fleet: {why}; put back an older revision of this key"
    missing = envelope.missing()
    return None if missing is None else f"{missing}: {COPY_KEY}"


def open_etcd(settings: EtcdSettings, clock: Clock) -> Etcd:
    """Create the client of etcd; raise `SecretUnreadable`, or `SourceUnavailable` for a file for TLS."""
    tls = None
    if settings.ca_file is not None:
        try:
            tls = open_tls(settings.ca_file, settings.certificate_file, settings.key_file)
        except OSError as error:
            raise SourceUnavailable(
                f"the files for TLS to etcd cannot be used: {error}",
                hint="hub.etcd.ca_file, certificate_file, key_file: PEM files that this account can read",
            ) from error
    password = ""
    if settings.password_file is not None:
        password = read_secret(settings.password_file).decode().strip()
    return Etcd(
        settings.endpoints,
        tls=tls,
        user=settings.user,
        password=password,
        random=SystemRandom(),
        clock=clock,
    )


def build_hub(whole: Settings, clock: Clock) -> Hub:
    """Read the fleet's files, and create the parts of the hub; raise `ConfigError`, and the errors of `open_etcd`."""
    settings, identity = whole.hub, whole.identity
    files = FleetFiles(settings.directory)
    authority, opening = files.load_authority(), files.load_envelope()
    names = read_hub_names(files.load_hub())
    if settings.etcd.ca_file is not None:
        refuse_shared_authority(authority, settings.etcd.ca_file)
    port = settings.listen[0].rpartition(":")[2]
    address = names.addresses[0]
    url = settings.url or f"https://{f'[{address}]' if ':' in address else address}:{port}"
    token_keys = TokenKeyRing(opening)
    state = FleetState(token_keys.item_of, token_keys.problem, partial(password_item, opening))
    envelope = replace(opening, chosen=state.sealing)

    def is_admitted(host: HostId, serial: str) -> bool:
        return admits_host(state.host(host), serial)

    etcd = open_etcd(settings.etcd, clock)
    name = settings.name or names.name
    journal = Journal(settings.state_dir / FILE)
    restores = Restores(etcd, state, name, journal, clock)
    streams = Streams(
        state,
        clock,
        is_admitted,
        restores.suspect,
        restores.raise_overrides,
        partial(explain_unready, state, envelope),
    )
    replica = Replica(etcd, state, streams, name, url, clock, SystemRandom(), restores)
    issuer = None
    if identity.enabled and identity.issuer is not None:
        signer = SignerClient(Layout.of(whole).signer_socket)
        pace = Pace(identity.longest_cache_s, identity.longest_life_s)
        peers = Peers(state, name, clock, (files.hub, files.ca_certificate))
        cloud = None
        if identity.openstack.enabled:
            cloud = open_cloud(identity.openstack, clock.monotonic)
        issuer = FleetIssuer(identity.issuer, signer, state, clock, pace, peers.doubt_clock, cloud)
    return Hub(
        settings=settings,
        files=files,
        names=names,
        url=url,
        authority=authority,
        envelope=envelope,
        token_keys=token_keys,
        etcd=etcd,
        state=state,
        streams=streams,
        replica=replica,
        clock=clock,
        random=SystemRandom(),
        issuer=issuer,
    )
