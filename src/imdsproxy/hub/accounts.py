"""Accounts of a hub: its own, and another for HAProxy in front of the hub, which cannot read the fleet's keys.

A hub that root starts takes its account before any communication. HAProxy's process exists by then.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from imdsproxy.config.hub import HubSettings
from imdsproxy.config.identity import IdentitySettings
from imdsproxy.errors import refusing
from imdsproxy.host.account import Account, account_of
from imdsproxy.host.files import (
    Owner,
    apply_owner_and_mode,
    ensure_directory,
    read_secret,
    write_atomic,
)
from imdsproxy.host.owned_files import give_files, opened_regular
from imdsproxy.hub.pki.files import FleetFiles

_SHARED: Final = 0o640


@dataclass(frozen=True, slots=True)
class Accounts:
    """Accounts that a hub and its HAProxy take; `None` for the present one."""

    hub: Account | None = None
    haproxy: Account | None = None

    @property
    def shared(self) -> Owner | None:
        """Owner of files that HAProxy may read, for the hub that writes them."""
        return None if self.haproxy is None else (-1, self.haproxy.group)

    def assume(self) -> None:
        """Switch to the hub's account permanently, with the group of HAProxy's account; raise `OSError`."""
        if self.hub is not None:
            self.hub.assume(() if self.haproxy is None else (self.haproxy.group,))


def find_accounts(settings: HubSettings) -> Accounts:
    """Look up the accounts of the settings, `None` for a process that is not root's; raise `HostRefused`."""
    if os.geteuid() != 0:
        return Accounts()
    hub = None if settings.user is None else account_of(settings.user, "hub.user")
    if settings.haproxy_user is None:
        return Accounts(hub, hub)
    return Accounts(hub, account_of(settings.haproxy_user, "hub.haproxy_user"))


@dataclass(frozen=True, slots=True)
class Places:
    """Paths below `hub.runtime_dir` that a hub shares with its HAProxy."""

    directory: Path

    @property
    def shared(self) -> Path:
        """Directory of files that HAProxy reads."""
        return self.directory / "front"

    @property
    def config(self) -> Path:
        return self.shared / "haproxy.cfg"

    @property
    def certificate(self) -> Path:
        """Copy of the hub's certificate and key."""
        return self.shared / "hub.pem"

    @property
    def authority(self) -> Path:
        return self.shared / "ca.crt"

    @property
    def issuer_certificate(self) -> Path:
        """Copy of the certificate and key for the issuer's documents."""
        return self.shared / "issuer.pem"

    @property
    def control(self) -> Path:
        """Socket on which HAProxy takes commands, in a directory that both write."""
        return self.directory / "control/haproxy.sock"

    @property
    def stream_socket(self) -> Path:
        return self.directory / "stream.sock"

    @property
    def api_socket(self) -> Path:
        return self.directory / "api.sock"


def give_places(settings: HubSettings, accounts: Accounts) -> Places:
    """Create the directories of a hub, and as root give them to the hub's account; raise `HostRefused`."""
    places, owner = Places(settings.runtime_dir), accounts.shared
    if accounts.hub is not None:
        owner = accounts.hub.user, (accounts.haproxy or accounts.hub).group
        files, hub = FleetFiles(settings.directory), (accounts.hub.user, accounts.hub.group)
        # If there is no fleet, the hub reports that when it reads the files.
        if settings.directory.is_dir():
            give_files(settings.directory, files.of_hub, hub)
        with (
            refusing(f"have the hub read {files.operator}"),
            opened_regular(files.operator) as file,
        ):
            if file is not None:
                apply_owner_and_mode(file, _SHARED, (-1, accounts.hub.group))
        ensure_directory(settings.state_dir, mode=0o700)
        give_files(settings.state_dir, settings.state_dir.iterdir(), hub)
    ensure_directory(places.directory, mode=0o710, owner=owner)
    return places


def read_certificate(identity: IdentitySettings) -> bytes | None:
    """Read the certificate and key for the issuer's documents, as root; raise `SecretUnreadable`."""
    if not identity.enabled or identity.listen is None or identity.certificate is None:
        return None
    return read_secret(identity.certificate)


def fill_places(
    places: Places, files: FleetFiles, accounts: Accounts, issuer_certificate: bytes | None = None
) -> None:
    """Write the files that HAProxy reads: certificates with their keys, and the fleet's CAs; raise `HostRefused`."""
    owner = accounts.shared
    ensure_directory(places.shared, mode=0o750, owner=owner)
    ensure_directory(places.control.parent, mode=0o770, owner=owner)
    copies = [
        (places.certificate, files.hub.read_bytes()),
        (places.authority, files.ca_certificate.read_bytes()),
    ]
    if issuer_certificate is not None:
        copies.append((places.issuer_certificate, issuer_certificate))
    for path, content in copies:
        write_atomic(path, content, mode=_SHARED, owner=owner)
