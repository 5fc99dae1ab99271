"""Instances and networks for tests of documents, and a way to ask for what they get."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from hashlib import blake2b
from ipaddress import ip_address, ip_network
from typing import cast

from imdsproxy.documents.compiled import Blob, CompiledRecord, compile_instance, parse_compiled
from imdsproxy.documents.dialects.respond import Answer, DocumentTree, respond
from imdsproxy.model.entities import (
    Instance,
    InstanceId,
    MacAddress,
    NamespaceListener,
    Network,
    NetworkId,
    Port,
    SshKey,
    Subnet,
)

BLUE = Network(
    NetworkId("blue"),
    NamespaceListener("blue"),
    mtu=1450,
    subnets=(
        Subnet(ip_network("10.0.0.0/24"), ip_address("10.0.0.1"), (ip_address("10.0.0.2"),)),
        Subnet(ip_network("2001:db8::/64"), ip_address("2001:db8::1"), ()),
    ),
)
BARE = Network(NetworkId("bare"), NamespaceListener("bare"))
NETWORKS = {network.id: network for network in (BLUE, BARE)}

SEED = bytes(range(256)) * 2


def port(
    mac: str | None = "fa:16:3e:00:00:01",
    addresses: Iterable[str] = ("10.0.0.5", "2001:db8::5"),
    *,
    network: Network = BLUE,
) -> Port:
    return Port(
        network.id,
        None if mac is None else MacAddress(mac),
        tuple(ip_address(address) for address in addresses),
    )


GUEST = Instance(
    InstanceId("0b57f5a4-6ff8-4ef5-8f1c-6b8d94bbd18d"),
    name="web",
    hostname="web.example.org",
    project="p1",
    ports=(port(),),
    ssh_keys=(SshKey("alice", "ssh-ed25519 AAAAC3 alice@example.org"),),
    tags=(("role", "web"), ("tier", "1")),
    user_data=b"#!/bin/sh\necho hello\n",
    availability_zone="eu-north-1b",
    instance_type="m1.small",
)


def guest(**changes: object) -> Instance:
    return replace(GUEST, **changes)  # type: ignore[arg-type] # each test names real fields


def compiled(instance: Instance) -> CompiledRecord:
    return compile_instance(instance, NETWORKS, None)


def with_head(old: bytes, new: bytes) -> bytes:
    """The compiled `GUEST` with something else in its head, whose checksum is right."""
    rest = compiled(GUEST).content.partition(b'","')[2]
    assert old in rest
    rest = rest.replace(old, new)
    line = b'","' + rest[: rest.index(b"\n") + 1]
    revision = blake2b(line, digest_size=8).hexdigest().encode()
    return b'{"revision":"' + revision + b'","' + rest


class Guest:
    """A guest with its record, its password, and a fixed random seed."""

    def __init__(
        self,
        instance: Instance = GUEST,
        networks: Mapping[NetworkId, Network] = NETWORKS,
        *,
        region: str | None = None,
    ) -> None:
        self.content = compile_instance(instance, networks, region).content
        self.tree = DocumentTree(parse_compiled(self.content))
        self.password: bytes | None = None

    def ask(self, path: str | bytes, method: str = "GET", body: bytes = b"") -> Answer:
        raw = path if isinstance(path, bytes) else path.encode()
        return respond(
            method, raw, body, self.tree, random_seed=lambda: SEED, password=lambda: self.password
        )

    def read(self, path: str | bytes) -> bytes:
        """The body of a document that must be there."""
        response = self.ask(path)
        assert response.status == 200, (path, response.status)
        if isinstance(response.body, Blob):
            blob = response.body
            return self.content[blob.offset : blob.offset + blob.length]
        return response.body

    def text(self, path: str) -> str:
        return self.read(path).decode()

    def lines(self, path: str) -> list[str]:
        text = self.text(path)
        return text.split("\n") if text else []

    def json(self, path: str) -> dict[str, object]:
        return cast("dict[str, object]", json.loads(self.read(path)))

    def status(self, path: str | bytes, method: str = "GET") -> int:
        return self.ask(path, method).status


def header(response: Answer, name: bytes) -> bytes | None:
    return dict(response.headers).get(name)
