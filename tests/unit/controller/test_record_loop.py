"""From what sources say to what every worker answers, with the disk and HAProxy as they may be."""

import asyncio
import errno
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from imdsproxy.controller.compiler import CompiledIndex, RecordCompiler
from imdsproxy.controller.record_loop import RecordLoop
from imdsproxy.controller.rule_sets import RuleSets
from imdsproxy.controller.token_keys import TokenKeys
from imdsproxy.documents.compiled import CompiledRecord, compile_instance
from imdsproxy.documents.store import PasswordStore
from imdsproxy.errors import HostRefused, RuntimeUnavailable, host_refused
from imdsproxy.fleet.guests import FLEET
from imdsproxy.haproxy import records as records_on_disk
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.records import RecordApplier
from imdsproxy.haproxy.rules.maps import parse_map
from imdsproxy.model import policy
from imdsproxy.model.entities import (
    Instance,
    InstanceId,
    MacAddress,
    NamespaceListener,
    Network,
    NetworkId,
    Port,
    Scope,
)
from imdsproxy.model.identity import Learned
from imdsproxy.model.inventory import Inventory
from imdsproxy.model.observation import AddressKey, Observation
from imdsproxy.model.path_rules import PathRules, PathWord, render_set, set_id
from imdsproxy.model.tokens import CURRENT, TokenKey, render_key_map
from imdsproxy.network.anti_spoofing.hop_limits import HopLimits
from imdsproxy.nova.routing import EndpointSet, NovaRouting
from support.fake_haproxy import FakeHaproxy
from support.fake_mac_filters import no_hop_limits, no_mac_filters
from support.hand_clock import HandClock
from support.record_files import LoggedFiles
from support.tasks import background, until

_RED = NetworkId("red")
_NETWORK = Network(_RED, NamespaceListener("red"))
_OLD = InstanceId("old")


class Rig:
    def __init__(self, directory: Path, second: str = "b") -> None:
        layout = Layout(directory, directory)
        self.base, self.overlay = layout.base_map, layout.overlay_map
        maps = (self.base, self.overlay, layout.path_rules_map, layout.token_keys_map)
        self.haproxy = FakeHaproxy(layout.master_socket, maps)
        passwords = PasswordStore(directory / "passwords")
        self.files = LoggedFiles(directory / "documents", passwords, None)
        self.applied: list[set[AddressKey] | None] = []
        self.networks: list[frozenset[NetworkId]] = []
        self.inventory = Inventory(["a", second])
        index = CompiledIndex(directory / "compiled.sqlite")
        self.applier, self.clock = RecordApplier(layout), HandClock()
        self.keys = TokenKeys(layout, keys=(TokenKey(b"o" * 32),))
        self.keys.load()
        self.keys.preload()
        self.sets = self.begin_sets()
        self.loop = RecordLoop(
            self.inventory,
            self.applier,
            RecordCompiler(self.inventory, self.files, index),
            self.clock,
            self.networks.append,
            lambda keys: self.applied.append(None if keys is None else set(keys)),
            no_mac_filters(self.inventory),
            no_hop_limits(),
            self.sets,
            self.keys,
        )

    def begin_sets(self) -> RuleSets:
        """As a controller has them that starts now."""
        sets = RuleSets(self.applier, self.clock)
        sets.load()
        return sets

    def have_sets(self, *rules: PathRules) -> None:
        """All workers, and the disk, have these and no others."""
        wanted = {key: value for one in rules for key, value in render_set(one).items()}
        assert parse_map(self.sets.path.read_text())[1] == wanted
        for worker in self.haproxy.all():
            assert dict(worker.maps[str(self.sets.path)]) == wanted

    def keys_of(self, name: str) -> set[frozenset[str]]:
        """What workers have of the keys of an instance, draining ones too, and a worker that starts now."""
        path = str(self.keys.layout.token_keys_map)
        workers = [*self.haproxy.all(), self.haproxy.fork()]
        return {
            frozenset(key for key, _ in worker.maps[path] if key.endswith(f"|{name}"))
            for worker in workers
        }

    def report(
        self,
        *instances: Instance,
        source: str = "a",
        network: Network = _NETWORK,
        in_sync: bool = True,
    ) -> int:
        """A source reports all that it has; the ticket."""
        networks, records = {_RED: network}, {one.id: one for one in instances}
        return self.loop.observe(
            Observation(source, full=True, networks=networks, instances=records, in_sync=in_sync)
        )

    async def say(self, *instances: Instance, source: str = "a", in_sync: bool = True) -> None:
        """A source reports all that it has, and that is in force."""
        await self.loop.tickets.wait(self.report(*instances, source=source, in_sync=in_sync))

    def told(self, address: str) -> str | None:
        (worker,) = self.haproxy.workers
        return worker.lookup(self.overlay, self.base, f"red/{address}")


@asynccontextmanager
async def _rig(directory: Path, second: str = "b") -> AsyncIterator[Rig]:
    rig = Rig(directory, second)
    rig.applier.write_all({})
    await rig.haproxy.start()
    rig.applier.trust(await rig.applier.master.read_processes())
    try:
        async with background(rig.loop.run()):
            yield rig
    finally:
        await rig.haproxy.close()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with _rig(tmp_path) as found:
        yield found


def _instance(name: str, *addresses: str, hostname: str = "h") -> Instance:
    ports = (Port(_RED, None, tuple(IPv4Address(one) for one in addresses)),)
    return Instance(InstanceId(name), name, hostname, ports=ports)


def _value(instance: Instance) -> str:
    return f"{instance.id}|{compile_instance(instance, {_RED: _NETWORK}).revision}"


async def test_an_acknowledged_instance_is_on_disk_and_in_haproxy_until_it_is_removed(
    rig: Rig,
) -> None:
    web = _instance("web", "10.0.0.5")
    await rig.say(web)
    assert rig.told("10.0.0.5") == _value(web)
    assert rig.files.content(web.id) == compile_instance(web, {_RED: _NETWORK}).content
    assert {(_RED, IPv4Address("10.0.0.5"))} in rig.applied
    assert rig.networks == [frozenset({_RED})]
    assert rig.loop.rounds.within()[math.inf] == 1
    after = _instance("web", "10.0.0.5", "10.0.0.6", hostname="new")
    await rig.say(after)
    assert rig.told("10.0.0.5") == rig.told("10.0.0.6") == _value(after)
    rig.files.log.clear()
    await rig.say()
    assert rig.told("10.0.0.5") is None
    assert rig.files.log == ["remove web"]
    assert rig.loop.compiler.revisions == {}


async def test_nothing_is_swept_before_every_source_has_told_all(rig: Rig) -> None:
    await rig.applier.apply({"red/10.0.0.9": "old|1"})
    rig.files.apply(_OLD, CompiledRecord("1", b"old"))
    await rig.say(_instance("web", "10.0.0.5"))
    await rig.loop.tickets.wait(rig.loop.resync())
    assert rig.told("10.0.0.9") == "old|1"
    assert _OLD in set(rig.files.instances())
    await rig.say(source="b")
    assert rig.told("10.0.0.9") is None
    assert _OLD not in set(rig.files.instances())
    assert rig.told("10.0.0.5") is not None


async def test_a_full_disk_leaves_the_record_in_force_until_there_is_room(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imdsproxy.controller.record_loop._RETRY_LAST_S", 0.3)
    before = _instance("web", "10.0.0.5")
    await rig.say(before)
    rig.files.refuse = {before.id}
    await rig.say(_instance("web", "10.0.0.5", hostname="new"), _instance("db", "10.0.0.6"))
    assert rig.told("10.0.0.5") == _value(before)
    assert rig.told("10.0.0.6") is not None
    assert rig.loop.compiler.failures[before.id].hint == "make room"
    rig.files.refuse = set()
    # It is tried again without any report.
    await until(lambda: rig.told("10.0.0.5") != _value(before))
    assert rig.told("10.0.0.5") == _value(_instance("web", "10.0.0.5", hostname="new"))
    assert rig.loop.compiler.failures == {}


async def test_changed_names_are_logged_when_they_come_and_not_at_a_start(tmp_path: Path) -> None:
    web = replace(_instance("web", "10.0.0.5"), tags=(("a b", "c"),))
    with capture_logs() as logs:
        async with _rig(tmp_path) as rig:
            await rig.say()
            await rig.say(source="b")
            await rig.say(web)
            await rig.say(replace(web, hostname="new"))
        again = Rig(tmp_path)
        again.report(web)
        again.report(source="b")
        await again.loop.compile_all()
    event = "guests see other names than the record has"
    assert [log["instance"] for log in logs if log["event"] == event] == ["web"]


async def test_a_silent_master_is_tried_again_until_it_has_everything(rig: Rig) -> None:
    await rig.say(_instance("web", "10.0.0.5"))
    rig.haproxy.stop_answering_after = 0
    rig.loop.observe(Observation("a", instances={InstanceId("db"): _instance("db", "10.0.0.6")}))
    await until(lambda: rig.loop.failure)
    waiting = asyncio.create_task(rig.loop.tickets.wait(rig.loop.tickets.given))
    await asyncio.sleep(0)
    assert not waiting.done()
    rig.haproxy.stop_answering_after = None
    await waiting
    assert rig.told("10.0.0.6") is not None
    assert rig.loop.failure is None


@pytest.mark.parametrize("everything", [False, True])
async def test_a_learned_address_follows_its_instance_and_goes_with_it(
    rig: Rig, *, everything: bool
) -> None:
    await rig.say(_instance("web", "10.0.0.5"))
    key = (_RED, IPv6Address("fe80::1234"))
    ticket = rig.loop.learn(key, Learned(InstanceId("web"), 0))
    await rig.loop.tickets.wait(ticket)
    assert rig.told("fe80::1234") == _value(_instance("web", "10.0.0.5"))
    after = _instance("web", "10.0.0.5", hostname="new")
    await rig.say(after)
    assert rig.told("fe80::1234") == _value(after)
    await rig.loop.tickets.wait(rig.loop.forget(key))
    assert rig.told("fe80::1234") is None
    await rig.loop.tickets.wait(rig.loop.learn(key, Learned(InstanceId("web"), 0)))
    if everything:
        rig.loop.resync()
    await rig.say()
    assert rig.told("fe80::1234") is None
    assert rig.loop.learned == {}


async def test_every_address_of_an_instance_whose_source_has_expired_is_withheld_also_one_of_before_a_restart(
    rig: Rig,
) -> None:
    web, other = _instance("web", "10.0.0.5"), _instance("db", "10.0.0.6")
    await rig.say(web)
    await rig.say(other, source="b")
    key = (_RED, IPv6Address("fe80::1234"))
    await rig.loop.tickets.wait(rig.loop.learn(key, Learned(web.id, 0)))
    # As a controller that was started again: HAProxy knows more than it does.
    rig.loop.learned.clear()
    addresses = ("10.0.0.5", "fe80::1234")
    expired = Observation("a", in_sync=False, expired=True)
    await rig.loop.tickets.wait(rig.loop.observe(expired))
    assert [rig.told(one) for one in (*addresses, "10.0.0.6")] == ["!", "!", _value(other)]
    assert rig.loop.keep_of_last_run({"x": _value(web), "y": _value(other)}) == {"y": _value(other)}
    await rig.loop.tickets.wait(rig.loop.observe(Observation("a")))
    assert [rig.told(one) for one in addresses] == [_value(web), None]


async def test_a_start_compiles_only_what_is_not_on_disk_as_it_should_be(tmp_path: Path) -> None:
    web, db = _instance("web", "10.0.0.5"), _instance("db", "10.0.0.6")
    other = replace(db, hostname="other")
    for instances, log in (
        ([web, db], ["write web", "write db"]),
        ([web, other], ["write db"]),
        ([web], ["remove db"]),
        ([web, other], ["write db"]),
        ([web, other], []),
    ):
        rig = Rig(tmp_path)
        for source in ("a", "b"):
            rig.report(*instances, source=source)
        records = await rig.loop.compile_all()
        assert sorted(rig.files.log) == sorted(log)
        assert sorted(records.values()) == sorted(map(_value, instances))


async def test_others_work_while_very_many_records_are_compiled(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    many = [
        _instance(f"i{number}", f"10.0.{number // 250}.{number % 250}") for number in range(1_000)
    ]
    rig.report(*many)
    turns = 0
    compiling = asyncio.create_task(rig.loop.compile_all())
    while not compiling.done():
        await asyncio.sleep(0)
        turns += 1
    assert len(compiling.result()) == 1_000
    assert turns >= 10


@pytest.mark.parametrize("hostname", ["h", "another"])
async def test_an_instance_that_comes_back_while_others_are_compiled_has_its_record_and_no_older_one(
    rig: Rig, hostname: str
) -> None:
    many = [_instance(f"i{number}", f"10.0.0.{number}") for number in range(1, 250)]
    await rig.say(_instance("back", "10.0.9.9"), *many)
    after = _instance("back", "10.0.9.9", hostname=hostname)
    changed = [replace(one, hostname="other") for one in many]
    written, read = 0, list[str | None]()

    def come_back_with_the_last(_: InstanceId) -> None:
        nonlocal written
        written += 1
        if written == len(changed):
            rig.loop.observe(Observation("a", full=False, instances={after.id: after}))

    rig.files.after = come_back_with_the_last
    rig.loop.on_applied = lambda _: read.append(rig.told("10.0.9.9"))
    await rig.say(*changed)
    await rig.loop.tickets.wait(rig.loop.resync())
    assert rig.told("10.0.9.9") == _value(after)
    assert set(read) <= {None, _value(after)}
    assert "remove back" not in rig.files.log


_RULES = (("/latest/user-data", PathWord.DENY),)


async def test_no_record_refers_to_path_rules_that_haproxy_does_not_have(rig: Rig) -> None:
    await rig.say(_instance("web", "10.0.0.5"))
    before = rig.told("10.0.0.5")
    rig.haproxy.commands.clear()
    rig.loop.policies = lambda: policy.PolicyBook(host=policy.PolicyRules(paths=_RULES))
    rig.haproxy.stop_answering_after = 2
    ticket = rig.loop.resync()
    await until(lambda: rig.loop.failure)
    assert rig.told("10.0.0.5") == before
    rig.haproxy.stop_answering_after = None
    await rig.loop.tickets.wait(ticket)
    maps = [line.split()[-1 if "commit" in line else 2] for _, line in rig.haproxy.commands]
    assert maps.index(str(rig.overlay)) > maps.index(str(rig.sets.path))
    in_force = rig.loop.policies().fold(policy.PolicyPlace("red", None, "web")).policy
    word = policy.render_policy_word(in_force, policy.OperatorOverride(), None)
    assert rig.told("10.0.0.5") == f"{word}|{before}"


async def test_a_haproxy_that_is_yet_to_start_finds_the_path_rules_of_all_records(
    tmp_path: Path,
) -> None:
    rig = Rig(tmp_path)
    rig.loop.policies = lambda: policy.PolicyBook(host=policy.PolicyRules(paths=_RULES))
    web = _instance("web", "10.0.0.5")
    rig.report(web)
    assert policy.rule_set_of((await rig.loop.compile_all())["red/10.0.0.5"]) == set_id(_RULES)
    assert parse_map(rig.sets.path.read_text())[1] == render_set(_RULES)


@pytest.mark.parametrize("in_sync", [True, False])
async def test_an_address_that_goes_among_very_many_is_unknown_when_that_is_acknowledged(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, *, in_sync: bool
) -> None:
    monkeypatch.setattr("imdsproxy.controller.record_loop._MANY", 10)
    many = [_instance(f"i{number}", f"10.0.0.{number}") for number in range(1, 50)]
    if in_sync:
        await rig.say(source="b")
    await rig.say(*many)
    assert rig.told("10.0.0.7") is not None
    rig.report(*(replace(one, hostname="other") for one in many if one.name not in {"i7", "i8"}))
    ticket = rig.loop.observe(
        Observation("a", instances_removed=(InstanceId("i9"),), in_sync=False)
    )
    await rig.loop.tickets.wait(ticket)
    assert [rig.told(f"10.0.0.{number}") for number in (7, 8, 9)] == [None] * 3
    assert rig.told("10.0.0.10") == _value(replace(many[9], hostname="other"))


async def test_a_hop_limit_that_a_part_of_a_round_counts_on_is_settled_with_the_round(
    rig: Rig,
) -> None:
    class Losing(HopLimits):
        """The rule is lost while a round goes on."""

        def __init__(self) -> None:
            self.asked = 0
            self.armed: list[tuple[frozenset[NetworkId], bool]] = []

        def restrict(self, wanted: dict[str, str | None]) -> frozenset[NetworkId]:
            self.asked += bool(wanted)
            return frozenset({_RED} if self.asked == 1 else ())

        def commit(self, armed: frozenset[NetworkId], *, complete: bool) -> None:
            self.armed.append((armed, complete))

    rig.loop.hop_limits = hops = Losing()
    await rig.say(*(_instance(f"i{number}", f"10.0.0.{number}") for number in range(1, 250)))
    assert hops.asked > 1
    assert hops.armed == [(frozenset({_RED}), False)]


async def test_a_fresh_start_looks_at_each_record_once_and_leaves_none_that_nobody_has(
    tmp_path: Path,
) -> None:
    rig = Rig(tmp_path)
    rig.files.apply(_OLD, CompiledRecord("1", b"old"))
    for source in ("a", "b"):
        rig.report(_instance("web", "10.0.0.5"), source=source)
    rig.applier.write_all(await rig.loop.compile_all())
    assert rig.files.log == ["write old", "write web", "remove old"]
    looked = rig.loop.looked
    async with background(rig.loop.run()):
        await rig.haproxy.start()
        await rig.loop.tickets.wait(rig.loop.tickets.given)
    assert rig.loop.looked == looked
    await rig.haproxy.close()


async def test_instances_that_went_are_reported_also_those_that_went_while_no_controller_ran(
    tmp_path: Path,
) -> None:
    gone: list[str] = []
    here: list[str] = []
    rig = Rig(tmp_path)
    rig.loop.on_gone, rig.loop.on_here = gone.extend, here.extend
    rig.files.apply(_OLD, CompiledRecord("1", b"old"))
    for source in ("a", "b"):
        rig.report(_instance("web", "10.0.0.5"), source=source)
    rig.applier.write_all(await rig.loop.compile_all())
    assert (gone, set(here)) == (["old"], {"web"})
    here.clear()
    rig.report(source="a")
    assert gone == ["old"]
    rig.report(source="b")
    assert (gone, here) == (["old", "web"], [])
    here.clear()
    # Neutron's ids stand for one instance for ever, and hubs see to a fleet's.
    for source, defers in (("fleet", False), ("neutron", True)):
        one = _instance(f"of-{source}", "10.0.0.6")
        rig.loop.observe(Observation(source, instances={one.id: one}, defers=defers))
    assert here == []


async def test_an_instance_that_went_while_no_controller_ran_is_reported_also_where_haproxy_ran_on(
    rig: Rig,
) -> None:
    gone: list[str] = []
    saved: list[list[str]] = []
    rig.loop.on_gone, rig.loop.save = gone.extend, lambda: saved.append([*gone])
    rig.files.apply(_OLD, CompiledRecord("1", b"old"))
    for source in ("a", "b"):
        await rig.say(_instance("web", "10.0.0.5"), source=source)
    assert gone == ["old"]
    assert ["old"] in saved
    assert rig.files.log[-1] == "remove old"


async def test_no_record_is_in_force_before_it_is_saved_whose_tokens_have_ended(rig: Rig) -> None:
    class Full:
        def save(self) -> None:
            raise HostRefused("No space left on device")

    rig.loop.save = Full().save
    ticket = rig.report(_instance("web", "10.0.0.5"))
    await until(lambda: rig.loop.failure is not None)
    assert rig.told("10.0.0.5") is None
    rig.loop.save = lambda: None
    await rig.loop.tickets.wait(ticket)
    assert rig.told("10.0.0.5") is not None


@pytest.mark.parametrize("reload", [False, True])
async def test_a_resync_mends_what_somebody_changed_behind_our_back(
    rig: Rig,
    reload: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    await rig.say(_instance("web", "10.0.0.5"))
    await rig.say(source="b")
    if reload:
        rig.haproxy.workers = [rig.haproxy.fork()]
    rig.applier.state.overlay["red/10.0.0.77"] = "ghost|1"
    await rig.loop.tickets.wait(rig.loop.resync())
    assert rig.applier.state.lookup("red/10.0.0.77") is None
    assert rig.told("10.0.0.5") is not None


async def test_an_address_behind_a_router_falls_with_the_one_in_its_network_and_has_the_routers_policy(
    rig: Rig,
) -> None:
    router = Network(NetworkId("router"), NamespaceListener("router"), scope=Scope.ROUTER)
    strict = replace(router, policy=policy.PolicyRules(tokens=policy.TokenMode.REQUIRED))
    address = IPv4Address("10.0.0.5")
    await rig.say(_instance("web", "10.0.0.5"))
    rig.loop.observe(Observation("test", networks={router.id: router}))
    learned = Learned(InstanceId("web"), 0, via=(_RED, address))
    await rig.loop.tickets.wait(rig.loop.learn((router.id, address), learned))
    plain = _value(_instance("web", "10.0.0.5"))
    for others, there in (((_instance("db", "10.0.0.5"),), False), ((), True)):
        await rig.say(*others, source="b")
        # Two that disagree are a conflict; the record stays on disk.
        assert rig.told("10.0.0.5") == (plain if there else "!")
        record = rig.applier.state.effective().get("router/10.0.0.5")
        assert (record == plain) == there
    ticket = rig.loop.observe(Observation("test", networks={router.id: strict}))
    await rig.loop.tickets.wait(ticket)
    assert rig.applier.state.effective()["router/10.0.0.5"] == f"+1troo---::0:64|{plain}"
    assert rig.told("10.0.0.5") == plain


async def test_all_addresses_of_a_network_are_looked_at_again_those_that_were_learned_too(
    rig: Rig,
) -> None:
    await rig.say(_instance("web", "10.0.0.5"))
    known, found = ((_RED, IPv4Address(one)) for one in ("10.0.0.5", "10.0.0.9"))
    await rig.loop.tickets.wait(rig.loop.learn(found, Learned(InstanceId("web"), 1e9)))
    rig.applied.clear()
    rig.loop.touch_networks({NetworkId("blue")})
    assert not rig.loop._work.addresses
    rig.loop.touch_networks({_RED})
    await rig.loop.tickets.wait(rig.loop.tickets.given)
    assert rig.applied == [{known, found}]


_WEB = replace(
    _instance("web", "10.0.0.5"), policy=policy.PolicyRules(tokens=policy.TokenMode.REQUIRED)
)
_DB = _instance("db", "10.0.0.6")
_CLOSED = policy.PolicyRules(endpoint=False)


def _start(directory: Path, *instances: Instance, network: Network = _NETWORK) -> Rig:
    """A loop that keeps its maps, and sources that have reported."""
    rig = Rig(directory)
    rig.report(*(instances or (_WEB, _DB)), network=network)
    rig.report(source="b", network=network)
    return rig


async def _run_once(rig: Rig) -> Rig:
    """A run from its start to its stop."""
    rig.applier.write_all(await rig.loop.compile_all())
    async with background(rig.loop.run()):
        await rig.haproxy.start()
        await rig.loop.tickets.wait(rig.loop.tickets.given)
    await rig.haproxy.close()
    rig.loop.settle()
    return rig


async def test_a_start_takes_maps_and_macs_of_the_last_run_where_it_would_make_them_again(
    tmp_path: Path,
) -> None:
    mac = MacAddress("fa:16:3e:00:00:05")
    web = replace(_WEB, ports=(replace(_WEB.ports[0], mac=mac),))
    last = await _run_once(_start(tmp_path, web, _DB))
    # As after a reboot.
    last.base.unlink()
    last.overlay.unlink()
    rig = _start(tmp_path, _DB, web)
    assert await rig.loop.reuse_maps()
    assert rig.applier.state.effective() == last.applier.state.effective()
    assert _value(web) in (rig.applier.state.lookup("red/10.0.0.5") or "")
    assert rig.files.log == []
    right: dict[AddressKey, MacAddress | None] = {(_RED, IPv4Address("10.0.0.5")): mac}
    assert rig.loop.mac_filters.differing(right) == {}


def _with(
    *instances: Instance, network: Network = _NETWORK, change: Callable[[Rig], object] = id
) -> Callable[[Path], Rig]:
    """A start with these records, changed."""

    def start(directory: Path) -> Rig:
        rig = _start(directory, *instances, network=network)
        change(rig)
        return rig

    return start


def _edit_map(rig: Rig) -> None:
    kept = rig.base.parent / "maps" / rig.base.name
    kept.write_text(kept.read_text().replace("web|", "wax|"))


def _set_nova(rig: Rig) -> None:
    rig.loop.routing = lambda: NovaRouting((EndpointSet("default", b"secret"),))


def _learn(rig: Rig) -> None:
    rig.loop.learned[_RED, IPv4Address("10.0.0.9")] = Learned(_WEB.id, 1e9)


_LOST = Observation("b", networks={_RED: _NETWORK}, in_sync=False)
_IN_CONFLICT = _with(_WEB, _DB, _instance("more", "10.0.0.6"))
_ANEW: dict[str, tuple[Callable[[Path], Rig], Callable[[Path], Rig]]] = {
    "address": (_start, _with(_instance("web", "10.0.0.7"), _DB)),
    "document": (_start, _with(replace(_WEB, hostname="other"), _DB)),
    "user-data": (_start, _with(replace(_WEB, user_data=b"#!"), _DB)),
    "policy": (_start, _with(replace(_WEB, policy=_CLOSED), _DB)),
    "id": (_start, _with(replace(_WEB, id=InstanceId("wab")), _DB)),
    "one less": (_start, _with(_WEB)),
    "network": (_start, _with(network=replace(_NETWORK, policy=_CLOSED))),
    "host's policy": (
        _start,
        _with(
            change=lambda rig: setattr(
                rig.loop, "policies", lambda: policy.PolicyBook(host=_CLOSED)
            )
        ),
    ),
    "region": (
        _start,
        _with(change=lambda rig: setattr(rig.loop.compiler, "region", lambda: "eu")),
    ),
    "map edited": (_start, _with(change=_edit_map)),
    "map removed": (_start, _with(change=lambda rig: (rig.base.parent / "maps/base.map").unlink())),
    "not in sync": (_start, _with(change=lambda rig: rig.loop.observe(_LOST))),
    "nova, with its signatures": (_with(change=_set_nova), _with(change=_set_nova)),
    "a learned address": (_with(change=_learn), _start),
    "a record not written": (_with(change=lambda rig: rig.files.refuse.add(_WEB.id)), _start),
    "a conflict": (_IN_CONFLICT, _IN_CONFLICT),
}


@pytest.mark.parametrize("case", _ANEW)
async def test_a_start_makes_the_maps_anew_where_anything_is_not_as_it_was(
    tmp_path: Path, case: str
) -> None:
    first, second = _ANEW[case]
    await _run_once(first(tmp_path))
    assert not await second(tmp_path).loop.reuse_maps()
    assert "nova" not in case or not (tmp_path / "maps").exists()


async def test_a_start_makes_the_maps_anew_after_a_stop_in_the_middle_of_a_round(
    tmp_path: Path,
) -> None:
    async with _rig(tmp_path) as rig:
        await rig.say(source="b")
        await rig.say(_WEB, _DB)
        moved = _instance("web", "10.0.0.7")
        records = {one.id: one for one in (moved, _DB)}
        rig.loop.observe(Observation("a", full=True, networks={_RED: _NETWORK}, instances=records))
        while rig.files.content(_WEB.id) == compile_instance(_WEB, {_RED: _NETWORK}).content:
            await asyncio.sleep(0)
        assert rig.applier.state.lookup("red/10.0.0.7") is None
        rig.loop.settle()
    assert not await _start(tmp_path, moved, _DB).loop.reuse_maps()


async def test_a_stop_goes_on_where_the_maps_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise host_refused(f"write {path}", PermissionError(errno.EACCES, "denied"))

    monkeypatch.setattr(records_on_disk, "ensure_directory", refuse)
    await _run_once(_start(tmp_path))
    assert not await _start(tmp_path).loop.reuse_maps()


# Sets of path rules

_ONE: PathRules = (("/latest/user-data", PathWord.DENY),)
_TWO: PathRules = (("/", PathWord.REQUIRED),)


def _sets(*rules: PathRules) -> dict[str, PathRules]:
    return {set_id(one): one for one in rules}


def _record(rules: PathRules) -> str:
    return f"{policy.render_policy_word(policy.Policy(paths=rules), policy.OperatorOverride(), None)}|web|r1"


async def test_a_new_set_is_on_disk_and_in_every_worker_draining_ones_too_and_sent_once(
    rig: Rig,
) -> None:
    rig.have_sets()
    for sweep in (False, True):
        await rig.sets.ensure({}, sweep=sweep)
    assert rig.haproxy.commands == []
    await rig.applier.master.send_reload()
    assert len(rig.haproxy.all()) == 2
    await rig.sets.ensure(_sets(_ONE), sweep=False)
    rig.have_sets(_ONE)
    await rig.sets.ensure(_sets(_TWO), sweep=False)
    rig.have_sets(_ONE, _TWO)
    sent = len(rig.haproxy.commands)
    await rig.sets.ensure(_sets(_ONE, _TWO), sweep=False)
    assert len(rig.haproxy.commands) == sent


async def test_a_set_goes_when_no_record_has_referred_to_it_for_a_minute(rig: Rig) -> None:
    await rig.sets.ensure(_sets(_ONE, _TWO), sweep=False)
    await rig.applier.apply({"red/10.0.0.5": _record(_ONE), "red/10.0.0.6": _record(_TWO)})
    rig.clock.time += 3600
    await rig.sets.ensure({}, sweep=True)
    await rig.applier.apply({"red/10.0.0.6": None})
    # A request that has looked the record up before may be under way.
    rig.clock.time += 59
    await rig.sets.ensure({}, sweep=True)
    rig.have_sets(_ONE, _TWO)
    rig.clock.time += 1
    await rig.sets.ensure({}, sweep=True)
    rig.have_sets(_ONE)


async def test_what_an_earlier_controller_left_stays_and_a_haproxy_that_is_yet_to_start_finds_all(
    rig: Rig,
) -> None:
    await rig.sets.ensure(_sets(_ONE), sweep=False)
    await rig.applier.apply({"red/10.0.0.5": _record(_ONE)})
    for preloaded in (False, True):
        later, sent = rig.begin_sets(), len(rig.haproxy.commands)
        rig.clock.time += 3600
        if preloaded:
            later.preload(_sets(_TWO))
        await later.ensure(_sets(_TWO), sweep=not preloaded)
        rig.have_sets(_ONE, _TWO)
        assert (len(rig.haproxy.commands) == sent) == preloaded


async def test_a_worker_that_may_have_missed_a_change_of_sets_gets_it_again(rig: Rig) -> None:
    for wanted, sweep in ((_sets(_ONE), False), ({}, True)):
        rig.haproxy.stop_answering_after = 1
        with pytest.raises(RuntimeUnavailable):
            await rig.sets.ensure(wanted, sweep=sweep)
        rig.haproxy.stop_answering_after = None
        await rig.sets.ensure(_sets(_ONE), sweep=False)
        rig.have_sets(_ONE)
        rig.clock.time += 3600


async def test_a_worker_that_another_program_has_started_gets_sets_before_its_records(
    rig: Rig,
) -> None:
    await rig.sets.ensure(_sets(_ONE), sweep=False)
    stranger = rig.haproxy.fork()
    stranger.maps[str(rig.sets.path)] = []
    rig.haproxy.workers.append(stranger)
    await rig.applier.apply({"red/10.0.0.5": _record(_ONE)})
    rig.have_sets(_ONE)
    paths = [line.split()[2] for pid, line in rig.haproxy.commands if pid == stranger.pid]
    assert paths.index(str(rig.sets.path)) < paths.index(str(rig.overlay))


def test_a_file_of_sets_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "path-rules.map").write_bytes(b"\xff\xfe")
    with pytest.raises(HostRefused, match="path-rules"):
        Rig(tmp_path)


# Keys of a fleet's instances

_OWNER = InstanceId("web")
_FIRST, _SECOND = (TokenKey(letter * 32) for letter in (b"1", b"2"))


def _names(*keys: TokenKey) -> set[frozenset[str]]:
    """The entries of web's keys."""
    return {frozenset({f"{CURRENT}|web", *(f"{key.kid}|web" for key in keys)})}


@pytest.fixture
async def of_fleet(tmp_path: Path) -> AsyncIterator[Rig]:
    """A rig with the source `fleet`; both sources have reported that they have nothing."""
    async with _rig(tmp_path, FLEET) as found:
        await found.say()
        await found.say(source=FLEET)
        yield found


async def test_an_instances_keys_are_in_every_worker_before_its_record_and_until_it_has_gone(
    of_fleet: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = of_fleet
    await rig.applier.master.send_reload()
    rig.applier.trust(await rig.applier.master.read_processes())
    seen: list[bool] = []
    answer = FakeHaproxy._answer

    def look(haproxy: FakeHaproxy, text: str) -> str | None:
        found = answer(haproxy, text)
        served = any(
            worker.lookup(rig.overlay, rig.base, "red/10.0.0.5") for worker in haproxy.all()
        )
        seen.append(served)
        assert not served or rig.keys_of("web") == _names(_FIRST)
        return found

    monkeypatch.setattr(FakeHaproxy, "_answer", look)
    rig.keys.of_instances = {_OWNER: (_FIRST,)}
    await rig.say(_instance("web", "10.0.0.5"), source=FLEET)
    assert rig.keys_of("web") == _names(_FIRST)
    rig.keys.of_instances = {}
    # A round begins before the source publishes what has gone.
    await rig.loop.tickets.wait(rig.loop.wake())
    await rig.say(source=FLEET)
    assert rig.keys_of("web") == {frozenset()}
    assert set(seen) == {True, False}


async def test_an_instance_that_leaves_the_fleet_and_is_another_sources_loses_the_fleets_keys(
    of_fleet: Rig,
) -> None:
    of_fleet.keys.of_instances = {_OWNER: (_FIRST,)}
    await of_fleet.say(_instance("web", "10.0.0.5"), source=FLEET)
    of_fleet.keys.of_instances = {}
    of_fleet.report(_instance("web", "10.0.0.5"))
    await of_fleet.say(source=FLEET)
    assert of_fleet.keys_of("web") == {frozenset()}
    assert of_fleet.told("10.0.0.5") is not None


async def test_a_key_that_takes_the_place_of_another_is_known_when_that_is_acknowledged(
    rig: Rig,
) -> None:
    await rig.say(_instance("web", "10.0.0.5"))
    await rig.say(source="b")
    async with background(rig.keys.run(rig.applier)):
        rig.keys.send()
        await rig.keys.confirmed()
    for keys in ((_FIRST,), (_FIRST, _SECOND), (_SECOND, _FIRST), (_SECOND,)):
        rig.keys.of_instances = {_OWNER: keys}
        rig.haproxy.commands.clear()
        await rig.loop.tickets.wait(rig.loop.wake())
        assert rig.keys_of("web") == _names(*keys)
        # By single entries: a host of a fleet has thousands.
        assert not [line for _, line in rig.haproxy.commands if line.startswith("prepare")]
        (worker,) = rig.haproxy.workers
        table = dict(worker.maps[str(rig.keys.layout.token_keys_map)])
        assert table == render_key_map(rig.keys.keys, rig.keys.of_instances)


async def test_a_silent_worker_gets_keys_and_record_once_it_answers(rig: Rig) -> None:
    await rig.say()
    await rig.say(source="b")
    for after in range(3):
        rig.haproxy.stop_answering_after = after
        keys = (_FIRST, _SECOND)[after % 2 :]
        rig.keys.of_instances = {_OWNER: keys}
        ticket = rig.report(_instance("web", "10.0.0.5", hostname=f"h{after}"))
        await until(lambda: rig.loop.failure)
        rig.haproxy.stop_answering_after = None
        await rig.loop.tickets.wait(ticket)
        assert rig.keys_of("web") == _names(*keys)
        assert rig.told("10.0.0.5") is not None


async def test_keys_that_an_earlier_controller_left_stay_until_every_source_has_told_all(
    tmp_path: Path,
) -> None:
    before = TokenKeys(
        Layout(tmp_path, tmp_path), keys=(_SECOND,), of_instances={_OWNER: (_FIRST,)}
    )
    before.preload()
    async with _rig(tmp_path) as rig:
        await rig.say()
        await rig.loop.tickets.wait(rig.loop.resync())
        assert rig.keys_of("web") == _names(_FIRST)
        await rig.say(source="b")
        assert rig.keys_of("web") == {frozenset()}


async def test_a_haproxy_that_is_yet_to_start_finds_the_keys_of_all_instances(
    tmp_path: Path,
) -> None:
    rig = Rig(tmp_path)
    rig.keys.of_instances = {_OWNER: (_FIRST, _SECOND)}
    rig.report(_instance("web", "10.0.0.5"))
    await rig.loop.compile_all()
    assert parse_map(rig.keys.layout.token_keys_map.read_text())[1] == render_key_map(
        rig.keys.keys, rig.keys.of_instances
    )


def test_a_map_of_keys_that_is_damaged_is_made_again(tmp_path: Path) -> None:
    layout = Layout(tmp_path, tmp_path)
    for damaged in (b"\xff", b"aaaaaaaa|web x\n", b"aaaaaaaa|web AAAA\n"):
        layout.token_keys_map.write_bytes(damaged)
        keys = TokenKeys(layout, keys=(_FIRST,))
        keys.load()
        keys.preload()
        found = parse_map(layout.token_keys_map.read_text())[1]
        assert found == render_key_map((_FIRST,))
