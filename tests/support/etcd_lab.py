"""A genuine etcd: Debian's, each member in a namespace of its own, on one bridge with the lab's host.

The code of a test runs in the host's namespace while it is in `EtcdLab.entered`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

from imdsproxy.host.clock import Clock
from imdsproxy.host.namespaces import NamespaceDirectory, NamespaceThread
from imdsproxy.hub.store.etcd import Etcd, open_tls
from imdsproxy.hub.store.etcd_messages import MemberStatus, parse_status
from support.certificates import Authority, Certificate, make_authority
from support.lab import Lab, batch, cut, plug, run, until, within
from support.reaper import reap, reap_at_the_end

BRIDGE: Final = "imdst-etcd"
_HOST: Final = "10.250.0.254"
_GRPC, _HTTP, _PEERS = 2379, 2378, 2380


@dataclass(frozen=True, slots=True)
class Member:
    """A member, running or not."""

    number: int
    namespace: str
    data: Path

    @property
    def name(self) -> str:
        return f"m{self.number}"

    @property
    def address(self) -> str:
        return f"10.250.0.{self.number}"

    @property
    def peer_url(self) -> str:
        return f"http://{self.address}:{_PEERS}"


@dataclass(slots=True)
class EtcdLab:
    """Starts, stops, partitions and restores members.

    Args:
        size: How many members.
        tls: Whether clients use TLS, and show a certificate.
        flags: Further ones of etcd.
    """

    size: int = 3
    tls: bool = True
    flags: Sequence[str] = ()
    lab: Lab = field(default_factory=Lab)
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="imdst-etcd-")))
    members: list[Member] = field(default_factory=list)
    _processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    _authority: Authority | None = None
    _client: Certificate | None = None

    def __post_init__(self) -> None:
        reap_at_the_end(directory=self.directory)
        if self.tls:
            self._authority = make_authority(self.directory, "etcd-ca")
            addresses = [f"IP:10.250.0.{number}" for number in range(1, self.size + 1)]
            # The worst name that it can have: etcd takes some requests for the user of this name.
            self._authority.issue("server", names=addresses, subject="/CN=root")
            self._client = self._authority.issue("hub", names=["DNS:hub"], subject="/")
        lines = [f"link add {BRIDGE} type bridge", f"link set {BRIDGE} up"]
        batch(self.lab.host, [*lines, f"address add {_HOST}/24 dev {BRIDGE}"])
        for number in range(1, self.size + 1):
            namespace = self.lab.namespace(f"m{number}")
            self.plug(namespace, f"10.250.0.{number}")
            self.members.append(Member(number, namespace, self.directory / f"m{number}.etcd"))
        self.start(*self.members)

    def plug(self, namespace: str, address: str) -> None:
        """Connect a namespace with the members: another hub's, or a member's."""
        outer = f"e{address.rpartition('.')[2]}"
        plug(self.lab.host, outer, namespace, bridge=BRIDGE)
        batch(namespace, ["link set eth0 up", f"address add {address}/24 dev eth0"])

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Sockets that this thread opens in the block are in the host's namespace."""
        thread = NamespaceThread(NamespaceDirectory())
        with contextlib.closing(thread), thread.inside(self.lab.host):
            yield

    # Clients

    @property
    def endpoints(self) -> list[str]:
        """Of the members' JSON gateways."""
        return [self.endpoint(one) for one in self.members]

    def endpoint(self, member: Member, port: int = _HTTP) -> str:
        return f"{'https' if self.tls else 'http'}://{member.address}:{port}"

    @property
    def context(self) -> ssl.SSLContext | None:
        """A client's side of TLS."""
        if self._authority is None or self._client is None:
            return None
        return open_tls(self._authority.ca_file, self._client.certificate, self._client.key)

    def context_of(self, name: str, subject: str) -> ssl.SSLContext:
        """A client's side of TLS, with another certificate."""
        assert self._authority is not None
        made = self._authority.issue(name, names=["DNS:hub"], subject=subject)
        return open_tls(self._authority.ca_file, made.certificate, made.key)

    def client(self, *members: Member, **options: Any) -> Etcd:
        """A client of these members, else of all."""
        urls = [self.endpoint(one) for one in members or self.members]
        order = Random(7)  # noqa: S311
        return Etcd(urls, random=order, clock=Clock(), **({"tls": self.context} | options))

    def ctl(self, *words: str, member: Member | None = None, user: str = "") -> str:
        """Run etcdctl, at this member or the first; `user` with its password, `NAME:PASSWORD`."""
        options = self._options(member)
        if user:
            options.append(f"--user={user}")
        return run(*within(self.lab.host), "etcdctl", *options, *words)

    def _options(self, member: Member | None) -> list[str]:
        options = [f"--endpoints={self.endpoint(member or self.members[0], _GRPC)}"]
        if self._authority is not None and self._client is not None:
            options += [
                f"--cacert={self._authority.ca_file}",
                f"--cert={self._client.certificate}",
                f"--key={self._client.key}",
            ]
        return options

    # Members

    def start(self, *members: Member) -> None:
        """Start members, and wait until each of them knows a leader."""
        for member in members:
            self._start(member)
        for member in members:
            until(lambda: self.healthy(member), within_s=30, what=f"{member.name} is healthy")  # noqa: B023

    def _start(self, member: Member) -> None:
        client, http = self.endpoint(member, _GRPC), self.endpoint(member)
        words = [
            f"--name={member.name}",
            f"--data-dir={member.data}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-client-http-urls={http}",
            f"--listen-peer-urls={member.peer_url}",
            f"--initial-advertise-peer-urls={member.peer_url}",
            f"--initial-cluster={self._cluster}",
            "--heartbeat-interval=50",
            "--election-timeout=500",
            "--unsafe-no-fsync",
            "--log-level=warn",
            f"--log-outputs={self.directory / member.name}.log",
            *self.flags,
        ]
        if self._authority is not None:
            words += [
                f"--cert-file={self.directory / 'server.crt'}",
                f"--key-file={self.directory / 'server.key'}",
                f"--trusted-ca-file={self._authority.ca_file}",
                "--client-cert-auth",
            ]
        self._processes[member.number] = subprocess.Popen(
            (*within(member.namespace), "etcd", *words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @property
    def _cluster(self) -> str:
        return ",".join(f"{one.name}={one.peer_url}" for one in self.members)

    def healthy(self, member: Member) -> bool:
        """Whether a member answers, and knows a leader."""
        try:
            return self.status(member).leader != 0
        except OSError:
            return False

    def status(self, member: Member) -> MemberStatus:
        """What a member says of itself; raises `OSError`."""
        url = self.endpoint(member)
        with (
            self.entered(),
            urllib.request.urlopen(  # noqa: S310
                f"{url}/v3/maintenance/status", data=b"{}", timeout=2, context=self.context
            ) as answer,
        ):
            return parse_status(url, json.load(answer))

    def kill(self, *members: Member) -> None:
        """End members at once, as a machine that loses power."""
        for member in members:
            process = self._processes.pop(member.number)
            process.kill()
            process.wait()

    @contextlib.contextmanager
    def killed(self, *members: Member) -> Iterator[None]:
        """Members are gone during the block."""
        self.kill(*members)
        try:
            self._elected(*members)
            yield
        finally:
            self.start(*members)

    @contextlib.contextmanager
    def paused(self, *members: Member) -> Iterator[None]:
        """Members hang during the block, with their connections open."""
        for member in members:
            self._processes[member.number].send_signal(signal.SIGSTOP)
        try:
            self._elected(*members)
            yield
        finally:
            for member in members:
                self._processes[member.number].send_signal(signal.SIGCONT)
            until(lambda: all(self.healthy(one) for one in members), within_s=30)

    @contextlib.contextmanager
    def partitioned(self, member: Member, *, clients: bool = False) -> Iterator[None]:
        """A member reaches no other one during the block; with `clients`, it is those that it does not reach."""
        ports = f"{{ {_GRPC}, {_HTTP} }}" if clients else str(_PEERS)
        # Members learn of it at once: else they would wait for longer and longer when it is over.
        verdict = "drop" if clients else "reject with tcp reset"
        try:
            with cut(member.namespace, ports, verdict):
                if not clients:
                    self._elected(member)
                yield
        finally:
            until(lambda: self.healthy(member), within_s=30)

    def leader(self) -> Member:
        """The member that leads."""
        found = self._leader(self.members)
        assert found is not None
        return found

    def move_leader(self) -> None:
        """Have another member lead."""
        leader = self.leader()
        other = next(one for one in self.members if one is not leader)
        self.ctl("move-leader", f"{self.status(other).id:x}", member=leader)

    def _leader(self, members: Sequence[Member]) -> Member | None:
        """The one of these that leads all of them."""
        try:
            found = [self.status(one) for one in members]
        except OSError:
            return None
        leaders = {one.leader for one in found}
        if len(leaders) > 1:
            return None
        return next(
            (one for one, status in zip(members, found, strict=True) if status.id in leaders), None
        )

    def _elected(self, *without: Member) -> None:
        """Wait until the others have chosen a leader, where they can."""
        rest = [one for one in self.members if one not in without]
        if len(rest) > len(self.members) // 2:
            until(lambda: self._leader(rest), within_s=30, what="a leader is chosen")

    def restore(self, snapshot: Path, *options: str) -> None:
        """Have all members begin anew from a snapshot, as an operator does it."""
        self.kill(*self.members)
        for member in self.members:
            shutil.rmtree(member.data)
            run(
                *("etcdutl", "snapshot", "restore", str(snapshot), f"--data-dir={member.data}"),
                *(f"--name={member.name}", f"--initial-cluster={self._cluster}"),
                *(f"--initial-advertise-peer-urls={member.peer_url}", *options),
            )
        self.start(*self.members)

    def close(self) -> None:
        """End it, and remove what it has written."""
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
        self.lab.close()
        reap([self.directory])


@contextlib.contextmanager
def etcd_lab(size: int = 3, *, tls: bool = True, flags: Sequence[str] = ()) -> Iterator[EtcdLab]:
    """An etcd that is gone at the end."""
    made = EtcdLab(size, tls, flags)
    try:
        yield made
    finally:
        made.close()
