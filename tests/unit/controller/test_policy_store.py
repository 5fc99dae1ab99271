"""What operators did about instances, and the keys of session tokens: on disk before it counts, and read or refused."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import cast

import pytest

from imdsproxy.config.schema import Settings
from imdsproxy.controller.policy_store import FleetChange, PolicyStore, read_overrides
from imdsproxy.controller.token_keys import TokenKeys
from imdsproxy.errors import HostRefused, RuntimeUnavailable, SecretUnreadable
from imdsproxy.fleet.guests import FleetPolicies
from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.records import RecordApplier, write_table
from imdsproxy.host.files import write_atomic
from imdsproxy.model.entities import InstanceId
from imdsproxy.model.policy import FleetRules, OperatorOverride, PolicyBook, PolicyRules, TokenMode
from imdsproxy.model.retired import Overrides
from imdsproxy.model.tokens import (
    TTL_LIMIT_S,
    TokenKey,
    parse_token_keys,
    render_key_map,
    render_token_keys,
)
from support.full_disk import full_disk
from support.hand_clock import HandClock
from support.tasks import background, until

_WEB, _DB = InstanceId("web"), InstanceId("db")


def _open(directory: Path, clock: HandClock | None = None) -> PolicyStore:
    store = PolicyStore(TokenKeys(Layout(directory, directory)), clock or HandClock())
    store.open(Settings())
    return store


def test_what_operators_did_outlives_a_restart_and_what_cannot_be_written_has_not_happened(
    tmp_path: Path,
) -> None:
    assert _open(tmp_path).revoke(_WEB) == OperatorOverride(1, 0)
    store = _open(tmp_path)
    assert store.reopen(_WEB, 1_700_000_000) == OperatorOverride(1, 1_700_000_000)
    with full_disk(), pytest.raises(HostRefused, match="No space"):
        store.revoke(_WEB)
    with full_disk(), pytest.raises(HostRefused, match="No space"):
        store.reopen(_WEB, 1)
    expected = Overrides({_WEB: OperatorOverride(1, 1_700_000_000)})
    assert store.overrides == _open(tmp_path).overrides == expected


def test_no_token_of_an_instance_that_went_is_good_for_one_that_comes_under_its_id(
    tmp_path: Path,
) -> None:
    store = _open(tmp_path)
    store.revoke(_WEB)
    store.depart({_WEB, _DB})
    with full_disk(), pytest.raises(HostRefused, match="No space"):
        store.save()
    store.save()
    # No controller need run all the time between.
    store = _open(tmp_path)
    store.arrive({_WEB, InstanceId("new")})
    assert store.book().override(_WEB) == OperatorOverride(2)
    store.save()
    store = _open(tmp_path)
    assert store.departed.keys() == {_DB}
    assert store.book().override(_WEB) == OperatorOverride(2)
    assert store.book().override("new") == OperatorOverride(0)
    # An instance that changes while it is here goes on with its tokens.
    store.arrive({_WEB})
    assert store.book().override(_WEB) == OperatorOverride(2)


def test_an_instance_that_went_is_forgotten_once_its_last_token_has_ended(tmp_path: Path) -> None:
    clock = HandClock(pace=1)
    store = _open(tmp_path, clock)
    store.depart({_WEB})
    clock.time += TTL_LIMIT_S + 1
    store.depart({_DB})
    store.save()
    assert _open(tmp_path, clock).departed.keys() == {_DB}


def test_the_file_of_a_host_whose_instances_come_and_go_does_not_grow(tmp_path: Path) -> None:
    store = _open(tmp_path)
    store.overrides = Overrides({f"gone-{number}": OperatorOverride(1) for number in range(5_000)})
    store.revoke(_WEB, here={_WEB, "other"})
    assert (tmp_path / "overrides.json").stat().st_size < 20_000
    assert _open(tmp_path).overrides == store.overrides
    assert store.book().override(_WEB) == OperatorOverride(1)
    # A token of any epoch that it had stays bad.
    assert store.book().override("gone-7").epoch > 1
    # Before all sources have reported, nobody is gone.
    store.overrides = Overrides({f"late-{number}": OperatorOverride(1) for number in range(5_000)})
    store.revoke(_WEB, here=None)
    assert len(store.overrides) == 5_001


def test_a_retired_instance_of_a_fleet_has_the_fleets_epoch(tmp_path: Path) -> None:
    store = _open(tmp_path)
    store.overrides = Overrides({f"gone-{number}": OperatorOverride(1) for number in range(1_001)})
    store.revoke(_WEB, here=())
    keys = {InstanceId("gone-7"): (TokenKey(b"f" * 32),)}
    change = store.take_fleet(FleetPolicies(keys=keys))
    assert change.overrides == {"gone-7"}
    assert store.book().override("gone-7").epoch == 0
    assert store.take_fleet(FleetPolicies()).overrides == {"gone-7"}
    assert store.book().override("gone-7").epoch > 1


def _text(instances: object, version: object = 2, retired: object = (0, "")) -> bytes:
    return json.dumps({"format": version, "instances": instances, "retired": retired}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"{}",
        _text({}, 1),
        _text({}, retired=None),
        _text({}, retired=[-1, ""]),
        _text({}, retired=[1, "AAAA"]),
        _text({}, retired=[1, "?"]),
        _text([]),
        _text({"web": 1}),
        _text({"web": [1]}),
        _text({"web": [1, 2, 3]}),
        _text({"web": ["1", 0]}),
        _text({"web": [True, 0]}),
        _text({"web": [-1, 0]}),
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_refused_by_name_with_what_helps(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "overrides.json"
    path.write_bytes(data)
    with pytest.raises(HostRefused) as refused:
        _open(tmp_path)
    assert refused.value.message.startswith(f"{path} is damaged: ")
    assert "together with the token keys" in refused.value.hint


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "overrides.json").mkdir()
    with pytest.raises(HostRefused, match=r"^cannot read .*overrides\.json: Is a directory$"):
        read_overrides(tmp_path / "overrides.json")


# A fleet

_REQUIRED = PolicyRules(tokens=TokenMode.REQUIRED)
_KEYS = {_WEB: (TokenKey(b"f" * 32),)}


def test_what_differs_of_what_a_fleet_says_is_reported_and_it_takes_the_place_of_what_was_before(
    tmp_path: Path,
) -> None:
    store = _open(tmp_path)
    store.revoke(_WEB)
    assert not store.take_fleet(FleetPolicies())
    rules, overrides = FleetRules(host=_REQUIRED), {"web": OperatorOverride(4)}
    steps = (
        (FleetPolicies(rules), FleetChange(rules=True), OperatorOverride(1)),
        (FleetPolicies(rules, keys=_KEYS), FleetChange(overrides=frozenset({_WEB}), keys=True), OperatorOverride(0)),
        (FleetPolicies(rules, overrides, _KEYS), FleetChange(overrides=frozenset({_WEB})), OperatorOverride(4)),
        (FleetPolicies(FleetRules(), overrides, _KEYS), FleetChange(rules=True), OperatorOverride(4)),
        (FleetPolicies(), FleetChange(overrides=frozenset({_WEB}), keys=True), OperatorOverride(1)),
    )  # fmt: skip
    for fleet, change, override in steps:
        assert store.take_fleet(fleet) == change
        assert not store.take_fleet(fleet)
        assert store.book() == PolicyBook(overrides=store.book().overrides, fleet=fleet.rules)
        assert store.book().override("web") == override
        assert store.keys.of_instances == fleet.keys
        assert store.is_of_fleet(_WEB) is bool(fleet.keys)
    assert _KEYS[_WEB][0].text not in repr(store)


# The keys


@dataclass
class Rig:
    """Keys over a directory, with bytes that are known for random ones."""

    directory: Path
    numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def __post_init__(self) -> None:
        layout = Layout(self.directory, self.directory)
        self.keys = TokenKeys(layout, lambda size: next(self.numbers).to_bytes(size, "big"))

    def put(self, name: str, *numbers: int) -> Path:
        path, keys = self.directory / name, [_key(number) for number in numbers]
        write_atomic(path, render_token_keys(keys).encode(), mode=0o600)
        return path

    def on_disk(self) -> tuple[TokenKey, ...]:
        return parse_token_keys((self.directory / "token-keys").read_text())


def _key(number: int) -> TokenKey:
    return TokenKey(number.to_bytes(32, "big"))


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_the_first_key_is_made_once_and_found_again(rig: Rig) -> None:
    assert rig.keys.read(None)
    assert rig.keys.keys == rig.on_disk() == (_key(1),)
    assert not rig.keys.read(None)
    again = Rig(rig.directory)
    assert again.keys.read(None)
    assert again.keys.keys == (_key(1),)
    assert _key(1).text not in repr(rig.keys)
    assert repr(_key(1).secret) not in repr(rig.keys)


def test_a_file_that_settings_name_has_to_be_there(rig: Rig) -> None:
    with pytest.raises(SecretUnreadable):
        rig.keys.read(rig.directory / "shared")
    assert list(rig.directory.iterdir()) == []
    assert rig.keys.read(rig.put("shared", 7, 8))
    assert rig.keys.keys == (_key(7), _key(8))
    assert rig.keys.path == rig.keys.shared == rig.directory / "shared"


@pytest.mark.parametrize(
    ("data", "mode"),
    [(b"nonsense\n", 0o600), (b"\xff\n", 0o600), (render_token_keys([_key(1)]).encode(), 0o644)],
)
def test_what_cannot_be_used_leaves_what_is_in_force(rig: Rig, data: bytes, mode: int) -> None:
    rig.keys.read(None)
    path = rig.directory / "token-keys"
    path.write_bytes(data)
    path.chmod(mode)
    for use in (lambda: rig.keys.read(None), rig.keys.rotate):
        with pytest.raises(SecretUnreadable) as refused:
            use()
        assert "nonsense" not in str(refused.value)
    assert rig.keys.keys == (_key(1),)
    assert path.read_bytes() == data


def test_rotation_puts_a_fresh_key_first_and_keeps_the_two_that_the_file_has_or_changes_nothing(
    rig: Rig,
) -> None:
    rig.keys.read(None)
    assert rig.keys.shared is None
    rig.put("token-keys", 9, 1)
    for number, kept in ((2, (9, 1)), (3, (2, 9))):
        assert rig.keys.rotate() == _key(number)
        assert rig.keys.keys == rig.on_disk() == (_key(number), *map(_key, kept))
    with full_disk(), pytest.raises(HostRefused):
        rig.keys.rotate()
    assert rig.keys.keys == rig.on_disk() == (_key(3), _key(2), _key(9))


@dataclass
class Workers:
    """Stands for `RecordApplier`: what workers were given, and how often they will not take it."""

    deaf: int = 0
    given: list[Mapping[str, str]] = field(default_factory=list)

    async def apply_table(
        self, path: Path, entries: Mapping[str, str], *, secret: bool, single: bool
    ) -> None:
        assert single
        write_table(path, entries, secret=secret)
        if self.deaf:
            self.deaf -= 1
            raise RuntimeUnavailable("HAProxy does not answer", hint="wait")
        self.given.append(entries)


async def test_workers_get_the_keys_at_the_start_and_at_each_change(rig: Rig) -> None:
    rig.keys.read(None)
    workers = Workers()
    async with background(rig.keys.run(cast("RecordApplier", workers))):
        await rig.keys.confirmed()
        rig.keys.rotate()
        rig.keys.send()
        await rig.keys.confirmed()
        # Nothing has changed.
        rig.keys.read(None)
        await rig.keys.confirmed()
        rig.keys.read(rig.put("shared", 7))
        await rig.keys.confirmed()
    wanted = [(_key(1),), (_key(2), _key(1)), (_key(7),)]
    assert workers.given == [render_key_map(keys) for keys in wanted]
    map_file = rig.directory / "token-keys.map"
    assert _key(7).text in map_file.read_text()
    for path in (map_file, rig.directory / "token-keys"):
        assert path.stat().st_mode & 0o777 == 0o600


async def test_workers_that_do_not_take_them_get_them_again_and_it_is_reported_meanwhile(
    rig: Rig,
) -> None:
    rig.keys.read(None)
    workers = Workers(deaf=2)
    async with background(rig.keys.run(cast("RecordApplier", workers))):
        await until(lambda: "HAProxy does not answer" in str(rig.keys.failure))
        rig.keys.rotate()
        rig.keys.send()
        await rig.keys.confirmed()
    assert rig.keys.failure is None
    assert workers.given == [render_key_map([_key(2), _key(1)])]
