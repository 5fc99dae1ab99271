"""Identity tokens on a host: the two processes, and the rotation of the host's keys."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

import httpcore
import structlog

from imdsproxy.config.schema import Settings
from imdsproxy.controller.cached_keys import CachedKeys
from imdsproxy.controller.companion import Companion
from imdsproxy.controller.identity_files import IdentityFiles
from imdsproxy.controller.identity_plans import end_outdated, spell_rules
from imdsproxy.controller.issuer_documents import IssuerDocuments, find_key_ids
from imdsproxy.controller.key_file import SIGNER_USER, find_key_error
from imdsproxy.controller.subjects import IdentityReport, Subjects
from imdsproxy.errors import (
    ConfigInvalid,
    DataplaneError,
    HostRefused,
    ImdsproxyError,
    Problem,
    RequestRefused,
    SourceUnavailable,
)
from imdsproxy.haproxy.launch import kill_process
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.records import RecordApplier
from imdsproxy.host.account import Account, find_account
from imdsproxy.host.clock import Clock
from imdsproxy.host.http import Unanswered, ask
from imdsproxy.issuer.documents import render_documents
from imdsproxy.issuer.ring import parse_ring
from imdsproxy.issuer.rotation import Pace, ends_tokens, plan_rotation
from imdsproxy.issuer.serve import Plan
from imdsproxy.reconcile.part import By, Count, Gauge, Impact, Part
from imdsproxy.reconcile.reconciler import Reconciler
from imdsproxy.sources.fleet.client import HostFiles

_PATIENCE_S: Final = 5.0
_LIMITS: Final = dict.fromkeys(("connect", "read", "write", "pool"), _PATIENCE_S)
_EVERY_S: Final = 5.0
_log: Final = structlog.get_logger()


def find_identity_account(settings: Settings) -> Account | None:
    return find_account(settings.identity.user, None, "identity.user")


def plan_service(settings: Settings) -> Plan:
    layout, account = Layout.of(settings), find_identity_account(settings)
    haproxy = find_account(None, settings.haproxy.group, "haproxy.group")
    return Plan(
        socket=str(layout.identity_socket),
        pid_file=str(layout.identity_pid),
        log_level=settings.log.level,
        log_format=settings.log.format,
        user=None if account is None else account.user,
        group=None if account is None else account.group,
        clients=-1 if haproxy is None else haproxy.group,
        subjects=str(layout.subjects),
        signer="" if in_fleet(settings) else str(layout.signer_socket),
        fleet=str(layout.identity_files) if in_fleet(settings) else "",
        openstack_audience=settings.identity.openstack_audience,
    )


def in_fleet(settings: Settings) -> bool:
    """Return whether the hubs of a fleet sign for this host's guests."""
    return settings.sources.fleet.enabled


def plan_signer(settings: Settings, *, hub: bool) -> Plan:
    """Plan the process that has the keys: of this host, or of a fleet beside a hub."""
    layout, identity = Layout.of(settings), settings.identity
    if hub and identity.key_file is not None:
        reason = "the signers of a fleet share keys of their own"
        raise ConfigInvalid(
            "this hub's signer takes no key of the operator",
            problems=[Problem("identity.key_file", reason, "remove it")],
        )
    account = find_account(identity.signer_user, None, SIGNER_USER)
    clients = find_identity_account(settings)
    if hub:
        clients = find_account(settings.hub.user, None, "hub.user")
    return Plan(
        socket=str(layout.signer_socket),
        pid_file=str(layout.signer_pid),
        log_level=settings.log.level,
        log_format=settings.log.format,
        user=None if account is None else account.user,
        group=None if account is None else account.group,
        clients=-1 if clients is None else clients.group,
        subjects="" if hub else str(layout.subjects),
        managers=() if clients is None or not hub else (clients.user,),
        keys=str(layout.signing_keys),
        key_file="" if identity.key_file is None else str(identity.key_file),
        issuer=identity.issuer or "",
        trust_domain=identity.domain,
        algorithm=identity.algorithm,
        audiences={
            name: {
                "lifetime_s": one.lifetime_s,
                "subject": one.subject,
                "proven": one.placement == "proven",
            }
            for name, one in identity.audiences.items()
        },
    )


@dataclass(slots=True)
class IdentityHost(Part):
    """Identity tokens on this host.

    Args:
        subjects: Subjects of this host's guests; `None` if identity tokens are off.
        pace: Times of a rotation of keys.
        forget: Removes the tokens that HAProxy keeps.
        fleet: Files for the hubs, which sign in this host's place; `None` without a fleet.
        key_file: File of the operator's keys; `None` if the signer makes its keys.
        find_key_error: Returns why the signer cannot use this file.
        plans: Settings of the process that answers guests, and of the signer.
        rules: Settings that tokens depend on (`identity_plans.spell_rules`).
    """

    impact: ClassVar = Impact.HARMS

    layout: Layout
    subjects: Subjects | None
    documents: IssuerDocuments
    service: Companion
    signer: Companion
    pace: Pace
    clock: Clock
    forget: Callable[[], Awaitable[object]]
    fleet: IdentityFiles | None = None
    key_file: Path | None = None
    find_key_error: Callable[[], ImdsproxyError | None] = lambda: None
    plans: tuple[Plan, ...] = ()
    rules: str = ""
    _unsigned: Problem | None = None
    _key: Problem | None = None
    _state: Mapping[str, Any] = field(default_factory=dict)
    _signing_key: str | None = None
    _cached: CachedKeys = field(init=False)
    _keys_known: asyncio.Event = field(default_factory=asyncio.Event)
    _reads: Reconciler = field(
        default_factory=partial(
            Reconciler,
            "identity",
            "issuer's keys not read",
            0.2,
            5.0,
            retried=(SourceUnavailable, DataplaneError),
        )
    )

    def __post_init__(self) -> None:
        self._cached = CachedKeys(self.layout.cached_keys, self.rules)

    def problems(self) -> tuple[Problem | None, ...]:
        failures = self.service.failure, self.signer.failure, self._reads.failure
        return (*failures, self.documents.problem, self._unsigned, self._key)

    async def run(self) -> None:
        for companion, plan in zip((self.service, self.signer), self.plans, strict=False):
            if companion.needed:
                end_outdated(companion.read().parent, plan)
        await asyncio.gather(
            self._run_service(),
            self.signer.run(),
            self._follow_keys(),
            self._follow_fleet(),
            self._follow_state(),
        )

    async def _run_service(self) -> None:
        if self.signer.needed and not self.documents.current:
            # If the signer's key changed before its first reading, tokens of the old key would be kept.
            await self._keys_known.wait()
        await self.service.run()

    async def _follow_state(self) -> None:
        while self.service.needed:
            await asyncio.sleep(_EVERY_S)
            await self.refresh()
            self.documents.follow_certificate()

    async def refresh(self) -> None:
        """Ask the process that answers guests for its counts, and whether it gets tokens."""
        if not self.service.needed:
            return
        self._key = None
        if self.signer.failure is not None and (error := self.find_key_error()) is not None:
            # The reason would be in the signer's journal only.
            self._key = Problem("identity.key_file", error.message, error.hint)
        try:
            async with httpcore.AsyncConnectionPool(uds=str(self.layout.identity_socket)) as pool:
                status, data = await ask(pool, "GET", "http://identity/state", _LIMITS)
            self._state = json.loads(data) if status == HTTPStatus.OK else {}
            failure = self._state["failure"]
        except (Unanswered, ValueError, KeyError) as error:
            failure = f"its process does not answer: {error}"
        self._unsigned = None
        if failure is not None:
            hint = "journalctl -u imdsproxy-identity -u imdsproxy-signer"
            self._unsigned = Problem("identity", f"guests get no identity tokens: {failure}", hint)

    async def report(self) -> Mapping[str, object]:
        if not self.service.needed:
            return {}
        pids = (self.service.read().parent, self.signer.read().parent)
        state = self._state
        report = IdentityReport(
            self.documents.issuer,
            self._signing_key,
            tuple(pid for pid in pids if pid is not None),
            state.get("held", 0),
            state.get("given", {}),
            state.get("refused", {}),
        )
        return {"identity": report}

    def identity_tokens_held(self) -> Gauge:
        """Identity tokens that this host holds; no series if the settings give none."""
        return self._state.get("held") if self.service.needed else None

    def identity_tokens(self) -> Annotated[By, "counter", "origin"]:
        """Identity tokens given by the process behind HAProxy, by origin: `held`, or `new`."""
        return self._state.get("given", {}) if self.service.needed else None

    def identity_refusals(self) -> Annotated[By, "counter", "reason"]:
        """Identity tokens refused, by reason."""
        return self._state.get("refused", {}) if self.service.needed else None

    def identity_answers(self) -> Count:
        """Answers of the signer or of a hub to requests for identity tokens; a request may be for several tokens."""
        return self._state.get("answers") if self.service.needed else None

    def identity_answer_seconds(self) -> Count:
        """Seconds that these answers took."""
        return self._state.get("answered_s") if self.service.needed else None

    def identity_failing(self) -> Gauge:
        """1 while guests get no new identity tokens; `imdsproxy status` has the reason."""
        failures = self.service.failure, self.signer.failure, self._unsigned
        return float(any(failures)) if self.service.needed else None

    async def _follow_fleet(self) -> None:
        while self.fleet is not None:
            await self._reads.attempt(self.fleet.copy)
            await asyncio.sleep(_EVERY_S)

    async def _follow_keys(self) -> None:
        while self.signer.needed:
            await self._reads.attempt(self.read_keys)
            await asyncio.sleep(_EVERY_S)

    async def read_keys(self) -> None:
        """Read the public keys from the signer; write and publish changed documents.

        If a key that signed is gone, or settings have changed, tokens that this host holds are worth nothing, and are
        forgotten: also if the controller was killed after it had published the keys.

        Raises:
            SourceUnavailable: The signer does not answer.
            DataplaneError: A file cannot be written, or HAProxy keeps tokens of a key that is gone.
        """
        shape = await self._rotate(await self.ask({"keys": None}))
        ring = parse_ring(json.dumps(shape["ring"]).encode())
        documents = render_documents(self.documents.issuer, shape["keys"], ring.sequence)
        self._signing_key = ring.signing
        before = self._cached.read(next(iter(find_key_ids(self.documents.current)), None))
        if documents != self.documents.current:
            self.documents.publish(documents)
        self._keys_known.set()
        if ends_tokens(before, ring, self.pace, self._now()):
            if (pid := self.service.read().parent) is not None:
                # The supervisor starts it again, without a token.
                kill_process(pid)
            await self.forget()
        self._cached.write(ring)

    async def ask(self, question: Mapping[str, object]) -> dict[str, Any]:
        """Send one request about keys to the signer; raise `SourceUnavailable`."""
        return await ask_signer(self.layout.signer_socket, question)

    async def _rotate(self, shape: dict[str, Any]) -> dict[str, Any]:
        """Carry out the steps of a rotation that are due; return the signer's newest answer."""
        ring = parse_ring(json.dumps(shape["ring"]).encode())
        planned = plan_rotation(ring, self.pace, self._now())
        if planned == ring:
            return shape
        if planned.signing != ring.signing:
            shape = await self.ask({"change": {"promote": planned.signing}})
            _log.info("another key signs identity tokens", key=planned.signing)
        gone = {one.id for one in ring.entries} - {one.id for one in planned.entries}
        if gone:
            shape = await self.ask({"change": {"drop": sorted(gone)}})
            _log.info("old keys of identity tokens removed", keys=sorted(gone))
        return shape

    def _now(self) -> int:
        return int(self.clock.now().timestamp())

    async def rotate(self, *, compromised: bool) -> None:
        """Begin a rotation; or, if the key is compromised, replace all keys at once and forget all tokens.

        Raises:
            RequestRefused: The operator gives the keys.
            SourceUnavailable: The signer does not answer.
            DataplaneError: A file cannot be written, or HAProxy keeps tokens of the old key.
        """
        if self.key_file is not None:
            place = (
                f"only a new key in {self.key_file}"
                if compromised
                else (f"a new key in {self.key_file}, in front of the old key")
            )
            raise RequestRefused(
                "the issuer's key is the operator's (identity.key_file), so imdsproxy makes no other",
                hint=f"write {place}; then restart the signer: systemctl restart imdsproxy-signer",
            )
        await self.ask({"change": "replace" if compromised else "add"})
        await self.read_keys()


async def ask_signer(socket: Path, question: Mapping[str, object]) -> dict[str, Any]:
    """Send one request about keys to the signer and return its answer.

    Raises:
        SourceUnavailable: The signer does not answer, or refuses.
    """
    try:
        async with asyncio.timeout(_PATIENCE_S):
            reader, writer = await asyncio.open_unix_connection(str(socket))
            try:
                writer.write(json.dumps(question).encode() + b"\n")
                line = await reader.readline()
            finally:
                writer.close()
        shape = json.loads(line)
    except (OSError, ValueError, TimeoutError) as error:
        raise SourceUnavailable(
            f"the signer of identity tokens does not answer: {error}",
            hint="journalctl -u imdsproxy-signer",
        ) from error
    if "keys" not in shape:
        raise SourceUnavailable("the signer of identity tokens refused", hint="see its log")
    found: dict[str, Any] = shape
    return found


def _plan_both(settings: Settings) -> tuple[Plan, ...]:
    try:
        return plan_service(settings), plan_signer(settings, hub=False)
    except HostRefused:
        # An account does not exist: the process that needs it ends with the reason.
        return ()


def build_identity(
    settings: Settings,
    layout: Layout,
    companions: tuple[Companion, Companion],
    *,
    touch: Callable[..., object],
    clock: Clock,
    applier: RecordApplier,
) -> IdentityHost:
    """Return the part for identity tokens; raise `HostRefused` if the subjects' directory cannot be made.

    Args:
        companions: Supervisors of the process that answers guests, and of the signer.
        touch: Requests a round of the listeners, which renders HAProxy's configuration; gets the reason and networks.
    """
    identity = settings.identity
    documents = IssuerDocuments(
        identity.issuer or "",
        identity.static_dir or layout.public_documents,
        partial(touch, "issuer's documents changed", ()),
    )
    subjects = fleet = None
    if identity.enabled:
        account = find_identity_account(settings)
        group = -1 if account is None else account.group
        subjects = Subjects(layout.subjects, group)
        subjects.open()
        if in_fleet(settings):
            wanted = settings.sources.fleet
            files = HostFiles.configured(wanted, layout.state)
            fleet = IdentityFiles(layout.identity_files, files, tuple(wanted.hubs), group)
    host = IdentityHost(
        layout,
        subjects,
        documents,
        *companions,
        pace=Pace(identity.longest_cache_s, identity.longest_life_s),
        clock=clock,
        forget=partial(applier.apply_table, layout.identity_map, {}),
        fleet=fleet,
        key_file=identity.key_file,
        find_key_error=partial(find_key_error, identity),
        plans=_plan_both(settings),
        rules=spell_rules(identity),
    )
    if identity.enabled:
        documents.load()
    return host
