"""Site of script/demo --identity: a fleet whose hubs sign, Keystone, OpenBao, and guests of two projects.

Keystone and OpenBao are on a machine of the operator's network. On each host each network has a router, which
translates addresses of guests: the services cannot tell the guests apart by their addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from imdsproxy.fleet.members import IDENTITY_PATH
from imdsproxy.sources.fleet.client import HubClient
from support.fleet_member import Member
from support.fleet_world import FleetWorld, fleet_world
from support.guest import Guest, inside
from support.identity.fleet import Signers
from support.identity.keystone import Keystone, open_keystone, run_openstack
from support.identity.openbao import OpenBao, open_openbao
from support.lab import batch, ip, run, within
from support.pinned_venv import pinned_venv

__all__ = ["AUDIENCES", "NETWORKS", "Site", "Tenant", "open_site"]

AUDIENCES: Final = ("keystone", "openbao")
NETWORKS: Final = ("blue", "red")

_SERVICES: Final = "10.250.0.60"
_FIRST_ROUTER: Final = 101
_NUMBER: Final = 5
_ROLE: Final = "vm"
_TOKEN_URL: Final = "http://169.254.169.254/openstack/latest/oauth2/token"  # noqa: S105 - its place
_MASQUERADE: Final = """
table ip nat {
  chain postrouting {
    type nat hook postrouting priority 100
    oifname "eth0" masquerade
  }
}
"""
_READ_SCRIPT: Final = r"""
session=$(curl -sf -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' http://169.254.169.254/latest/api/token)
token=$(curl -sf -X PUT -H "X-aws-ec2-metadata-token: $session" -H 'X-imdsproxy-audience: openbao' \
    http://169.254.169.254/latest/api/identity)
export BAO_TOKEN=$(printf %s "$token" | bao write -field=token auth/jwt/login role=vm jwt=-)
bao kv get -field=password secret/$1/db
"""


@dataclass(slots=True)
class Tenant:
    """Project with one guest.

    Attributes:
        project: The project's id in Keystone.
        password: The project's secret in OpenBao.
        hosts: Where the guest has run, in order.
    """

    instance: str
    network: str
    name: str
    project: str
    password: str
    guest: Guest
    hosts: list[str]


@dataclass(slots=True)
class Site:
    """All machines."""

    world: FleetWorld
    signers: Signers
    keystone: Keystone
    bao: OpenBao
    directory: Path
    _routers: int = field(default=0)

    def add_host(self, name: str) -> None:
        """Add a host with both networks, and a router in each of them."""
        host = self.world.add_host(name, networks=NETWORKS)
        for network in NETWORKS:
            router = host.lab.namespace(f"{network}-router")
            self.world.etcd.plug(router, f"10.250.0.{_FIRST_ROUTER + self._routers}")
            self._routers += 1
            ip(
                *("-n", host.lab.host, "link", "add", f"{network}-r", "master", network),
                *("type", "veth", "peer", "name", "inner", "netns", router),
            )
            batch(host.lab.host, [f"link set {network}-r up"])
            batch(router, ["link set inner up", "address add 10.0.0.1/24 dev inner"])
            inside(router, lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1"))
            run(*within(router), "nft", "-f", "-", stdin=_MASQUERADE)

    def add_tenant(self, name: str, instance: str, network: str, host: str) -> Tenant:
        """Make a project in Keystone, its secret in OpenBao, and the machine of its guest."""
        project, password = self.keystone.add_project(name), f"{name}-s3cret"
        self.bao.write(f"secret/data/{project}/db", data={"password": password})
        guest = self._start_guest(instance, network, host)
        return Tenant(instance, network, name, project, password, guest, [host])

    def admit(self, *tenants: Tenant) -> None:
        """Have OpenBao admit the guests of these projects, each to the secrets of its own project."""
        self.bao.trust(self.signers.issuer)
        projects = [one.project for one in tenants]
        self.bao.admit(_ROLE, audience="openbao", projects=projects)

    def migrate(self, tenant: Tenant, host: str) -> None:
        """Have a guest run on another host from now on."""
        tenant.guest = self._start_guest(tenant.instance, tenant.network, host)
        tenant.hosts.append(host)

    def _start_guest(self, instance: str, network: str, host: str) -> Guest:
        guest = self.world.hosts[host].lab.guest(network, _NUMBER, name=instance)
        batch(guest.namespace, ["route add default via 10.0.0.1"])
        return guest

    # What guests do

    def show_files(self, tenant: Tenant) -> tuple[str, str]:
        """Return all that a guest has: its `clouds.yaml`, and its script that reads a secret of OpenBao."""
        return self._write_clouds(tenant, tenant).read_text(), _READ_SCRIPT

    def _write_clouds(self, tenant: Tenant, wanted: Tenant) -> Path:
        clouds = self.directory / f"{tenant.instance}.yaml"
        self.keystone.write_clouds(clouds, project=wanted.project, token_url=_TOKEN_URL)
        return clouds

    def issue_token(self, tenant: Tenant, wanted: Tenant) -> str:
        """Return what stock openstackclient gets in a guest, for a project: a token, or why there is none."""
        clouds = self._write_clouds(tenant, wanted)
        ran = run_openstack(tenant.guest.namespace, clouds, "token", "issue", "-f", "json")
        if ran.returncode:
            return _refusal(ran.stderr, r"HTTP \d+")
        project = json.loads(ran.stdout)["project_id"]
        return f"a token of {wanted.name if project == wanted.project else project}"

    def read_secret(self, tenant: Tenant, wanted: Tenant) -> str:
        """Return the secret of a project that a guest reads with curl and `bao`, or why there is none."""
        programs = pinned_venv("identity") / "bin"
        ran = subprocess.run(
            (*within(tenant.guest.namespace), "bash", "-c", _READ_SCRIPT, "bash", wanted.project),
            env={
                "BAO_ADDR": self.bao.url,
                "HOME": str(self.directory),
                "PATH": f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if ran.returncode:
            return _refusal(ran.stderr, r"Code: \d+")
        return ran.stdout

    def log_in(self, tenant: Tenant, token: str) -> str:
        """Return the secret of a guest's own project, read over HTTP alone."""
        bao = replace(self.bao, namespace=tenant.guest.namespace)
        login = bao.login(_ROLE, token)
        found = bao.read(f"secret/data/{tenant.project}/db", token=login.token)
        return str(found["data"]["data"]["password"])

    def request_as_host(self, host: str, tenant: Tenant) -> str:
        """Return what a hub answers to a host that requests a token for a guest."""
        member = Member.of_host(self.world, self.world.hosts[host])
        wanted = {
            "instance": tenant.instance,
            "network": tenant.network,
            "audience": "openbao",
            "nonce": None,
        }
        (url, *_) = (hub.url for hub in self.world.hubs if hub.process and not hub.process.poll())
        with self.world.etcd.entered():
            status, body = asyncio.run(
                HubClient(member.files, 5).request(
                    "POST", url, IDENTITY_PATH, body=json.dumps({"tokens": [wanted]}).encode()
                )
            )
        shape: dict[str, Any] = json.loads(body)
        (answer,) = shape["answers"] if status == 200 else ({},)  # noqa: PLR2004
        return "a token" if "token" in answer else f"refused: {answer.get('refused', status)}"


def _refusal(text: str, pattern: str) -> str:
    """Return the code of a refusal in a program's output, else all that the program printed."""
    found = re.search(pattern, text)
    return f"failed: {' '.join(text.split())}" if found is None else f"refused: {found[0]}"


@contextlib.contextmanager
def open_site(directory: Path) -> Iterator[Site]:
    """Start etcd, two hubs with a signer each, Keystone behind Apache, and OpenBao.

    Args:
        directory: For certificates and guests' files.
    """
    signers = Signers(directory)
    identity = {"enabled": True, "user": "daemon"}
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(fleet_world(beside_hub=signers, identity=identity))
        services = world.etcd.lab.namespace("services")
        world.etcd.plug(services, _SERVICES)
        bao = stack.enter_context(open_openbao(services, directory, address=_SERVICES))
        keystone = stack.enter_context(open_keystone(services, _SERVICES, signers.issuer))
        yield Site(world, signers, keystone, bao, directory)
