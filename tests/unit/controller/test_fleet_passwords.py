"""Passwords on a host of a fleet: posted here or elsewhere, without a hub, and cleared."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from imdsproxy.controller.fleet_passwords import FleetPasswords
from imdsproxy.documents.store import PasswordStore
from imdsproxy.errors import SourceRefused, SourceUnavailable
from imdsproxy.fleet.guests import CLEARED
from imdsproxy.model.entities import InstanceId

WEB, DB = InstanceId("web"), InstanceId("db")


@dataclass
class Host:
    """A host whose hub is there or not, and takes passwords or not."""

    store: PasswordStore
    sent: list[tuple[InstanceId, bytes]] = field(default_factory=list)
    failure: Exception | None = None

    async def send(self, instance: InstanceId, password: bytes) -> None:
        if self.failure is not None:
            raise self.failure
        self.sent.append((instance, password))

    def passwords(self) -> FleetPasswords:
        return FleetPasswords(self.store, None)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    directory = tmp_path / "passwords"
    directory.mkdir()
    return Host(PasswordStore(directory))


async def test_what_a_guest_posts_is_sent_once_and_again_when_no_hub_was_there(host: Host) -> None:
    passwords = host.passwords()
    await passwords.take({WEB: None})
    assert host.store.keep(WEB, b"p")
    assert host.store.keep(DB, b"of another source")
    host.failure = SourceUnavailable("no hub")
    with pytest.raises(SourceUnavailable):
        await passwords.look(host.send)
    host.failure = None
    await passwords.look(host.send)
    await passwords.look(host.send)
    assert host.sent == [(WEB, b"p")]
    # As the fleet has it, also after a restart.
    await passwords.take({WEB: b"p"})
    again = host.passwords()
    await again.take({WEB: b"p"})
    await again.look(host.send)
    assert host.sent == [(WEB, b"p")]


async def test_a_refused_password_is_not_sent_again_until_the_fleet_has_another(host: Host) -> None:
    passwords = host.passwords()
    await passwords.take({WEB: None})
    host.store.keep(WEB, b"later")
    host.failure = SourceRefused("it has another one")
    await passwords.look(host.send)
    host.failure = None
    await passwords.look(host.send)
    assert host.sent == []
    await passwords.take({WEB: b"first"})
    assert host.store.read(WEB) == b"first"
    assert not host.store.keep(WEB, b"later")


async def test_a_password_that_is_cleared_goes_and_the_guest_may_post_another(host: Host) -> None:
    passwords = host.passwords()
    await passwords.take({WEB: b"p"})
    assert host.store.read(WEB) == b"p"
    with pytest.raises(SourceRefused, match="a fleet's"):
        await passwords.forget(WEB)
    await passwords.take({WEB: CLEARED})
    assert host.store.read(WEB) is None
    await passwords.look(host.send)
    host.store.keep(WEB, b"q")
    await passwords.look(host.send)
    assert host.sent == [(WEB, b"q")]


async def test_a_password_that_was_cleared_while_the_host_was_down_does_not_come_back(
    host: Host,
) -> None:
    await host.passwords().take({WEB: b"p"})
    # A new process: first what its disk has, then what the hub sends.
    passwords = host.passwords()
    await passwords.take({WEB: b"p"})
    await passwords.take({WEB: CLEARED})
    await passwords.look(host.send)
    assert host.store.read(WEB) is None
    assert host.sent == []
