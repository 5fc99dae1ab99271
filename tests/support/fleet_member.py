"""A host of a fleet without a daemon: certificate and stream are genuine, and the test decides what the host says."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from imdsproxy.fleet.layout import HostId, HostState, StoredHost, host_key, render_host
from imdsproxy.fleet.members import Invitation, spell_serial
from imdsproxy.fleet.stream import (
    STREAM_PATH,
    UPGRADE,
    Batch,
    Bye,
    FromHub,
    Hello,
    parse_from_hub,
    render_line,
)
from imdsproxy.host.certificates import make_key, render_certificate, render_key
from imdsproxy.sources.fleet.client import HostFiles, HubClient
from imdsproxy.sources.fleet.membership import join, renew_if_due
from support.fleet_world import FleetHost, FleetWorld
from support.patience import patience

_UPGRADE = f"Connection: Upgrade\r\nUpgrade: {UPGRADE}\r\n\r\n"


@dataclass
class Member:
    """One host.

    Attributes:
        world: Its fleet.
        name: Its name.
        files: What `imdsproxy fleet join` wrote.
    """

    world: FleetWorld
    name: str
    files: HostFiles

    @classmethod
    def joined(cls, world: FleetWorld, invitation: Invitation, place: str = "") -> Member:
        """A host that has joined with an invitation; its files are in `place`, or are named after it."""
        files = HostFiles.of(world.directory / f"{place or invitation.host}.member")
        with world.etcd.entered():
            join(invitation, files)
        return cls(world, invitation.host, files)

    @classmethod
    def written(cls, world: FleetWorld, name: str) -> Member:
        """A host that is written into etcd by another program than a hub, with any name."""
        files, key = HostFiles.of(Path(world.directory) / f"{name}.written"), make_key()
        signed = world.files.load_authority().certify_host(
            key.public_key(), name, datetime.now(UTC)
        )
        files.certificate.parent.mkdir()
        files.certificate.write_bytes(render_key(key) + render_certificate(signed))
        files.certificate.chmod(0o600)
        files.authority.write_bytes(world.files.ca_certificate.read_bytes())
        stored = StoredHost(HostState.ENROLLED, (spell_serial(signed.serial_number),))
        world.write({host_key(HostId(name)): render_host(stored)})
        return cls(world, name, files)

    @classmethod
    def of_host(cls, world: FleetWorld, host: FleetHost) -> Member:
        """The machine of a host that has a daemon, as one who has captured it."""
        hubs, authority = host.daemon.directory / "hubs", world.files.ca_certificate
        return cls(world, host.name, HostFiles(hubs, host.certificate, host.key, authority))

    @contextlib.contextmanager
    def connected(self, url: str) -> Iterator[ssl.SSLSocket]:
        """A connection that has asked for the stream."""
        address, port = url.removeprefix("https://").split(":")
        with self.world.etcd.entered():
            sock = socket.create_connection((address, int(port)), timeout=10 * patience())
        with self.files.context().wrap_socket(sock, server_hostname=address) as stream:
            stream.sendall(f"GET {STREAM_PATH} HTTP/1.1\r\nHost: hub\r\n{_UPGRADE}".encode())
            yield stream

    @contextlib.contextmanager
    def begun(self, url: str) -> Iterator[ssl.SSLSocket]:
        """A stream that the hub has taken."""
        with self.connected(url) as stream:
            assert stream.recv(65_536).startswith(b"HTTP/1.1 101 ")
            yield stream

    def is_admitted(self, url: str) -> bool:
        """Whether a hub takes the host's certificate."""
        with self.connected(url) as stream:
            head = stream.recv(65_536)
        assert head.startswith((b"HTTP/1.1 101 ", b"HTTP/1.1 403 ")), head
        return head.startswith(b"HTTP/1.1 101 ")

    def say(self, url: str, hello: Hello) -> FromHub:
        """What a hub answers to a hello: the last part of all items, or why it ends the stream."""
        with self.connected(url) as stream:
            stream.sendall(render_line(hello))
            found = b""
            while chunk := stream.recv(65_536):
                found += chunk
                for line in found.partition(b"\r\n\r\n")[2].split(b"\n")[:-1]:
                    match parse_from_hub(line):
                        case Bye() as bye:
                            return bye
                        case Batch(more=False) as batch:
                            return batch
                        case _:
                            pass
        raise AssertionError(found)

    def renew(self, url: str) -> None:
        """Get the next certificate, as after twenty days."""
        later = datetime.now(UTC) + timedelta(days=21)
        client = HubClient(self.files, 10 * patience())
        with self.world.etcd.entered():
            assert asyncio.run(renew_if_due(self.files, client, [url], later))
