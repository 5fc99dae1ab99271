"""The admin API on a real unix socket: its services over a real store, and a HAProxy with a fake master."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

from fastapi import FastAPI
from structlog.testing import capture_logs

from imdsproxy.api import routes, status
from imdsproxy.api.app import admin_app
from imdsproxy.api.client import AdminClient
from imdsproxy.api.status import StatusReport, report_status
from imdsproxy.config.changes import SettingChange, SettingsReload
from imdsproxy.controller import build
from imdsproxy.controller.fleet import FleetHost
from imdsproxy.controller.parts import Parts
from imdsproxy.controller.policy_store import PolicyStore
from imdsproxy.controller.record_loop import RecordLoop
from imdsproxy.controller.token_counting import TokenCounting
from imdsproxy.controller.token_report import InstanceTokens, TokenReport, TokenVerdict
from imdsproxy.documents.dialects.respond import Answer
from imdsproxy.documents.http import Send, send_answer, serve
from imdsproxy.documents.resolver_app import GuestRequest
from imdsproxy.documents.store import PasswordStore
from imdsproxy.errors import Problem
from imdsproxy.fleet.guests import FleetPolicies
from imdsproxy.haproxy.launch import Launcher
from imdsproxy.haproxy.process import Haproxy
from imdsproxy.haproxy.records import write_table
from imdsproxy.host.servers import open_unix_socket
from imdsproxy.host.state import NamespaceRef, ObservedHost
from imdsproxy.model.entities import (
    METADATA_IPV4,
    Instance,
    InstanceId,
    IpAddress,
    MacAddress,
    Network,
    NetworkId,
)
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import Observation
from imdsproxy.model.tokens import render_key_map
from imdsproxy.model.wire import MapRecord
from imdsproxy.network.anti_spoofing.hop_limits import HopLimits
from imdsproxy.network.anti_spoofing.mac_filters import MacFilters
from imdsproxy.network.listeners.plan import ListenerPlan
from imdsproxy.network.planned import Endpoint, NotServed, NotServedCode
from imdsproxy.reconcile.part import Part
from imdsproxy.reconcile.reconciler import Tickets
from support.controllers import StillClock, make_controller
from support.fake_haproxy import FakeHaproxy, FakeLauncher
from support.fake_mac_filters import no_hop_limits, no_mac_filters

NETWORK: dict[str, object] = {"id": "blue", "listener": {"namespace": "blue"}}
INSTANCE: dict[str, object] = {
    "id": "web-1",
    "name": "web-1",
    "ports": [{"network": "blue", "mac": "52:54:00:12:34:56", "addresses": ["10.0.0.5"]}],
}


@dataclass
class Listeners(Part):
    """A listener loop whose rounds end at once: all networks are served but those that a test leaves out."""

    inventory: Inventory
    not_served: dict[str, NotServed] = field(default_factory=dict)
    unapplied: list[Problem] = field(default_factory=list)
    tickets: Tickets = field(default_factory=Tickets)
    seen: ObservedHost = field(default_factory=ObservedHost)
    now: ObservedHost = field(default_factory=ObservedHost)
    rounds: int = 0
    failure: Problem | None = None
    working: bool = False
    unix: Part = field(default_factory=Part)
    hop_limits: HopLimits = field(default_factory=no_hop_limits)
    haproxy: Haproxy | None = None

    def problems(self) -> list[Problem]:
        return self.unapplied

    async def report(self) -> Mapping[str, object]:
        return {"serving": len(self.inventory.networks) - len(self.not_served)}

    @property
    def last_plan(self) -> ListenerPlan:
        served = self.inventory.networks.keys() - self.not_served.keys()
        ref = NamespaceRef("x", 1)
        return ListenerPlan(
            tuple(Endpoint(one, METADATA_IPV4, 80, None, ref) for one in sorted(served))
        )

    def degraded(self) -> tuple[NotServed, ...]:
        return tuple(self.not_served.values())

    @property
    def host(self) -> Listeners:
        return self

    def render(self) -> str:
        return "global\n  maxconn 200\n"

    async def look_at(self, networks: Iterable[Network]) -> ObservedHost:
        del networks
        return self.now


async def _no_neighbour(_network: Network, _address: IpAddress) -> MacAddress | None:
    return None


@dataclass
class AdminServer:
    """A served API: change what is behind it, ask through `client`, or name `socket` to the CLI.

    Attributes:
        parts: The parts that the routes use.
        status: Fields of the status report that differ from the usual ones.
        answers: What HAProxy answers to a found guest, by target; everything else is 404.
        reloads: What `reload` was asked for, in order: whether settings may be dropped.
        stopped: What `stop` was asked for: whether the data plane ends too.
        failure: Raised by `status` and `reload`.
    """

    parts: Parts
    socket: Path
    inventory: Inventory
    records: RecordLoop
    listeners: Listeners
    haproxy: FakeHaproxy
    policy_store: PolicyStore
    passwords: PasswordStore
    loop: asyncio.AbstractEventLoop
    status: dict[str, Any] = field(default_factory=dict)
    token_report: TokenReport = field(default_factory=lambda: TokenReport(0.0, (), (), 0))
    answers: dict[str, Answer] = field(default_factory=dict)
    pending: tuple[str, ...] = ()
    reloads: list[bool] = field(default_factory=list)
    stopped: list[bool] = field(default_factory=list)
    failure: Exception | None = None

    def use(self, **parts: Any) -> None:
        """Serve with other parts."""
        self.parts = replace(self.parts, **parts)
        vars(self.parts)["forward"] = self.forward
        make_app().state.parts = self.parts

    @property
    def unapplied(self) -> list[Problem]:
        return self.listeners.unapplied

    @property
    def client(self) -> AdminClient:
        return AdminClient(self.socket, timeout_s=20)

    @property
    def networks(self) -> Mapping[NetworkId, Network]:
        return self.inventory.networks

    @property
    def instances(self) -> Mapping[InstanceId, Instance]:
        return self.inventory.instances

    def instance_record(self, name: str) -> Any:
        """As the API shows it."""
        return self.client.get(f"/v1/instances/{name}")["record"]

    def leave_out(
        self,
        network: str,
        reason: str,
        hint: str = "",
        code: NotServedCode = NotServedCode.PORT_BUSY,
    ) -> None:
        self.listeners.not_served[network] = NotServed(NetworkId(network), None, code, reason, hint)

    def answer(self, target: str, body: bytes, *headers: tuple[bytes, bytes]) -> None:
        self.answers[target] = Answer(200, headers, body)

    async def forward(self, _: MapRecord, request: GuestRequest, send: Send) -> None:
        missing = Answer(404, ((b"content-type", b"text/plain"),), b"")
        await send_answer(self.answers.get(request.target.decode(), missing), send)

    def claim_twice(self, *instances: Instance) -> None:
        """A second source has these too."""
        told = {one.id: one for one in instances}
        self._observe(Observation("file", full=True, instances=told))

    def take_fleet(self, fleet: FleetPolicies) -> None:
        """A fleet says all that it says of guests, and that is in force."""

        async def take() -> None:
            one = self.parts
            host = FleetHost(
                one.inventory,
                one.policy_store,
                one.records,
                one.listeners,
                one.watchdog,
                one.probe,
                self.socket,
            )
            await self.records.tickets.wait(host.take_policies(fleet))

        asyncio.run_coroutine_threadsafe(take(), self.loop).result(20)

    def _observe(self, observation: Observation) -> None:
        async def observe() -> None:
            await self.records.tickets.wait(self.records.observe(observation))

        asyncio.run_coroutine_threadsafe(observe(), self.loop).result(20)

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def report(self, controller: Any) -> StatusReport:
        """Of this server's records and networks, and else of the usual parts."""
        self._fail()
        return replace(await report_status(controller), **self.status)

    async def reload(self, _controller: object, *, allow_dropped: bool) -> SettingsReload:
        self._fail()
        self.reloads.append(allow_dropped)
        return SettingsReload(
            changes=(
                SettingChange("resolver.hold_s", 5.0, 2.0, "live"),
                SettingChange("admin.mode", "0660", "0600", "restart"),
            ),
            restart_needed=("admin.mode",),
            pending=self.pending,
        )

    def end(self, *, data_plane: bool) -> None:
        self.stopped.append(data_plane)
        self.socket.unlink(missing_ok=True)

    async def count_tokens(self, *_: object) -> TokenReport:
        verdict = TokenVerdict("host", "", "no", "1 guest reads without a token: web", 1)
        return replace(self.token_report, verdicts=self.token_report.verdicts or (verdict,))

    async def count_tokens_of(self, *asked: object) -> InstanceTokens:
        verdict = TokenVerdict("instance", str(asked[-1]), "yes", "no guest has read", 0)
        return InstanceTokens(0.0, 1, verdict, (), ())


@contextlib.asynccontextmanager
async def _served(directory: Path) -> AsyncIterator[AdminServer]:
    files = directory / "records"
    files.mkdir()
    sources = {"file": {"enabled": True, "directory": files}}
    with (
        patch.object(build, "build_filters", _no_filters),
        make_controller(directory, StillClock(), sources=sources) as controller,
    ):
        async with _serve(directory, controller) as server:
            yield server


def _no_filters(
    _layout: object, _host: object, inventory: Inventory, _clock: object, _touch: object
) -> tuple[MacFilters, HopLimits]:
    return no_mac_filters(inventory), no_hop_limits()


@contextlib.asynccontextmanager
async def _serve(directory: Path, controller: Parts) -> AsyncIterator[AdminServer]:
    layout, records, haproxy = controller.layout, controller.records, controller.haproxy
    applier, keys = records.applier, controller.policy_store.keys
    layout.passwords.mkdir(exist_ok=True)
    write_table(layout.token_keys_map, render_key_map(keys.keys), secret=True)
    applier.write_all({})
    fake = FakeHaproxy(
        layout.master_socket, (layout.base_map, layout.overlay_map, layout.token_keys_map)
    )
    await fake.start()
    haproxy.launcher = cast("Launcher", FakeLauncher(fake, applier.master, layout.config))
    await haproxy.adopt()
    listeners = Listeners(controller.inventory, haproxy=haproxy)
    controller.lookup.read_neighbour = _no_neighbour
    controller.watching.apply = _nothing
    controller.probe.problem = None
    server = AdminServer(
        controller,
        directory / "admin.sock",
        controller.inventory,
        records,
        listeners,
        fake,
        controller.policy_store,
        controller.passwords,
        asyncio.get_running_loop(),
    )
    server.use(listeners=listeners, ending=SimpleNamespace(request=server.end))
    store = controller.sources.writable
    assert store is not None

    app = make_app()
    listener = open_unix_socket(server.socket, mode=0o600)
    records.observe(Observation("file", full=True))
    work: Collection[asyncio.Task[None]] = [
        asyncio.create_task(one)
        for one in (
            records.run(),
            store.run(records.observe),
            keys.run(applier),
            controller.watching.run(),
            serve(app, listener),
        )
    ]
    try:
        async with asyncio.timeout(20):
            await records.in_sync.wait()
            await records.tickets.wait(records.tickets.given)
        with (
            patch.object(status, "report_status", server.report),
            patch.object(routes, "reload_settings", server.reload),
            patch.object(TokenCounting, "report_tokens", server.count_tokens),
            patch.object(TokenCounting, "report_instance", server.count_tokens_of),
        ):
            yield server
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        records.compiler.index.close()
        await fake.close()
        listener.close()
        server.socket.unlink(missing_ok=True)


@functools.cache
def make_app() -> FastAPI:
    """Made once: that takes longer than most tests."""
    return admin_app(None)


async def _nothing() -> None:
    """What watching wants is in force at once."""


@contextlib.contextmanager
def admin_server(directory: Path) -> Iterator[AdminServer]:
    """Serve in a thread of its own until the context ends; nothing is left behind."""
    home = directory / "daemon"
    home.mkdir()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    served = _served(home)
    try:
        with capture_logs():  # the output is the command's alone
            yield asyncio.run_coroutine_threadsafe(served.__aenter__(), loop).result(30)
    finally:
        ending = asyncio.run_coroutine_threadsafe(served.__aexit__(None, None, None), loop)
        ending.result(30)
        asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()
