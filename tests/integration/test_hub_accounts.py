"""Accounts of a hub and of its HAProxy: what root gives to them, and what they may do."""

import asyncio
import pwd
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from imdsproxy.config.hub import HubSettings
from imdsproxy.host.account import Account, account_of
from imdsproxy.host.files import read_secret
from imdsproxy.hub.accounts import Accounts, fill_places, give_places
from imdsproxy.hub.front import FrontProcess
from imdsproxy.hub.pki.files import (
    FleetFiles,
    HubNames,
    add_envelope_key,
    begin_rotation,
    init_fleet,
    switch_rotation,
)
from support.patience import patience

pytestmark = pytest.mark.root


@pytest.fixture
def accounts() -> Accounts:
    return Accounts(account_of("nobody", "hub.user"), account_of("daemon", "hub.haproxy_user"))


@pytest.fixture
def settings() -> Iterator[HubSettings]:
    """Settings of a hub whose directories any account finds, as those of a package."""
    with tempfile.TemporaryDirectory(prefix="imdst-") as name:
        place = Path(name)
        place.chmod(0o711)
        places = {one: str(place / one) for one in ("directory", "runtime_dir", "state_dir")}
        made = HubSettings.model_validate(places)
        names = HubNames("hub-1", ("127.0.0.1",))
        init_fleet(FleetFiles(made.directory), None, names, datetime.now(UTC))
        yield made


def _owner(path: Path) -> str:
    status = path.lstat()
    return pwd.getpwuid(status.st_uid).pw_name


def test_a_fleets_files_become_the_hubs_and_stay_its_when_root_changes_them(
    settings: HubSettings, accounts: Accounts
) -> None:
    settings.state_dir.mkdir()
    (settings.state_dir / "journal.sqlite").write_bytes(b"")
    give_places(settings, accounts)
    files, now = FleetFiles(settings.directory), datetime.now(UTC)
    begin_rotation(files, now)
    switch_rotation(files, now)
    add_envelope_key(files)
    files.load_authority()
    own = [*settings.directory.iterdir(), *settings.state_dir.iterdir()]
    assert {path.name: _owner(path) for path in own} == {
        **dict.fromkeys(("ca.crt", "ca.key", "hub.pem", "envelope.key"), "nobody"),
        "operator.pem": "root",
        "journal.sqlite": "nobody",
    }
    # Commands of operators on this machine go by it.
    read_secret(files.operator)
    assert oct(settings.directory.stat().st_mode)[-4:] == "0700"


def test_root_gives_the_hub_no_file_by_a_link(
    settings: HubSettings, accounts: Accounts, tmp_path: Path
) -> None:
    roots, linked = tmp_path / "roots", tmp_path / "linked"
    files = FleetFiles(settings.directory)
    for path in (roots, linked):
        path.write_text("secret")
    give_places(settings, accounts)
    for path in (files.next_key, files.envelope_key):
        path.unlink(missing_ok=True)
    files.next_key.symlink_to(roots)
    files.envelope_key.hardlink_to(linked)
    (settings.state_dir / "journal.sqlite").symlink_to(roots)
    give_places(settings, accounts)
    assert [_owner(path) for path in (roots, linked)] == ["root", "root"]


def test_haproxy_reads_the_hubs_certificate_and_no_key_of_the_fleet(
    settings: HubSettings, accounts: Accounts
) -> None:
    places = give_places(settings, accounts)
    fill_places(places, FleetFiles(settings.directory), accounts)
    assert accounts.haproxy is not None

    def reads(path: Path) -> bool:
        ran = subprocess.run(
            ("/bin/cat", str(path)),
            user=accounts.haproxy.user if accounts.haproxy else None,
            group=accounts.haproxy.group if accounts.haproxy else None,
            extra_groups=[],
            capture_output=True,
            check=False,
        )
        return ran.returncode == 0

    assert [reads(path) for path in (places.certificate, places.authority)] == [True, True]
    assert not any(reads(path) for path in settings.directory.iterdir())


@pytest.mark.parametrize(("low_port", "rights"), [(False, 0), (True, 1 << 10)])
async def test_haproxy_has_another_account_and_no_right_but_to_a_low_port(
    accounts: Accounts, *, low_port: bool, rights: int
) -> None:
    show = ("/bin/sh", "-c", "id -un >&2; sed -n 's/^CapEff:.//p' /proc/self/status >&2")
    process = FrontProcess(show, accounts.haproxy, low_port=low_port)
    words = await process.begin()
    async with asyncio.timeout(10 * patience()):
        assert await process.wait() == 0
        assert (await words.read()).decode().split() == ["daemon", f"{rights:016x}"]
    process.close()


@pytest.mark.parametrize("account", [None, "daemon"])
async def test_haproxy_ends_when_the_hub_closes_the_pipe(account: str | None) -> None:
    taken: Account | None = None if account is None else account_of(account, "hub.haproxy_user")
    process = FrontProcess(("sleep", "1000"), taken, low_port=False)
    await process.begin()
    process.close()
    async with asyncio.timeout(10 * patience()):
        assert await process.wait() == 128 + 9
    never = FrontProcess(("sleep", "1000"), taken, low_port=False)
    async with asyncio.timeout(10 * patience()):
        await never.stop()
        assert await never.wait() == 0
