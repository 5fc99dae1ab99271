"""Genuine Nova and Neutron on loopback, for tests; and Neutron's own metadata agent as an oracle."""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support.openstack.front import FrontWriter
from support.openstack.install import environments
from support.openstack.neutron_rest import Answer, NeutronClient, ask
from support.openstack.processes import Place, agent_server, neutron_server, nova_server
from support.openstack.servers import Server, free_port
from support.openstack.settings import render_clouds
from support.openstack.table import INSTANCES, Instance, Lookup, Seed, lookups_of
from support.openstack.template import fill
from support.recorder import signature_of

_NOVA_CACHE_S: Final = 15


@dataclass(frozen=True, slots=True)
class Nova:
    """One metadata API, with the secret that it expects."""

    server: Server
    url: str
    secret: str


@dataclass(slots=True, kw_only=True)
class OpenStack:
    """A lab that runs.

    Attributes:
        nova, neutron: The servers; `start`, `stop`, `kill` are theirs.
        rest: Neutron's REST API.
        front: Writes the HAProxy configurations of Neutron's agents.
        lookups: The table of truth.
        created: The ports that tests have made.
    """

    place: Place
    seed: Seed = field(repr=False)
    nova: Nova
    neutron: Server
    rest: NeutronClient
    agent: Server
    front: FrontWriter
    lookups: tuple[Lookup, ...] = field(repr=False)
    created: list[str] = field(default_factory=list, init=False)

    @property
    def servers(self) -> dict[str, Server]:
        return {"neutron": self.neutron, "nova": self.nova.server, "agent": self.agent}

    @property
    def nova_url(self) -> str:
        return self.nova.url

    @property
    def neutron_url(self) -> str:
        return self.rest.url

    @property
    def secret(self) -> str:
        return self.nova.secret

    @property
    def secret_file(self) -> Path:
        """The secret alone, as imdsproxy reads it."""
        return self.place.path / "secret"

    @property
    def clouds_yaml(self) -> Path:
        """For openstacksdk; the cloud is named `lab`."""
        return self.place.path / "clouds.yaml"

    @property
    def instances(self) -> Mapping[str, Instance]:
        return {one.name: one for one in INSTANCES}

    def lookup(self, name: str) -> Lookup:
        """The row with that name, one of `LOOKUP_NAMES`."""
        return next(row for row in self.lookups if row.name == name)

    def ask_nova(
        self,
        instance: Instance | str,
        project_id: str | None = None,
        path: str = "/latest/meta-data/",
        method: str = "GET",
        *,
        body: bytes | None = None,
        headers: Iterable[tuple[str, str]] = (),
        nova: Nova | None = None,
        secret: str | None = None,
    ) -> Answer:
        """Asks Nova directly, as an agent does, rightly signed.

        Args:
            instance: It, or the uuid of one that there may not be.
            project_id: The instance's, if not given.
            path: Path and query, as they are to be on the wire.
            headers: Beside the four of an agent.
            nova: Another than the first.
            secret: Another than that Nova's.
        """
        nova = nova or self.nova
        uuid = instance if isinstance(instance, str) else instance.uuid
        if project_id is None:
            project_id = "" if isinstance(instance, str) else instance.project_id
        signed = (
            ("X-Forwarded-For", "10.0.0.5"),
            ("X-Instance-ID", uuid),
            ("X-Tenant-ID", project_id),
            ("X-Instance-ID-Signature", signature_of(secret or nova.secret, uuid)),
        )
        return ask(nova.url, method, path, headers=(*signed, *headers), body=body)

    def ask_agent(self, path: str, scope: tuple[str, str], address: str) -> Answer:
        """Asks Neutron's own metadata agent, as the HAProxy of a namespace does.

        Args:
            scope: The header that says where (see `Lookup.scope_header`).

        Raises:
            http.client.HTTPException: It closed the connection instead of answering, as it does with nonsense.
        """
        self.agent.start()
        headers = (scope, ("X-Forwarded-For", address))
        return ask(f"unix:{self.place.agent_socket}", "GET", path, headers=headers)

    def create_port(self, network: str, address: str, owner: Instance) -> str:
        """A new port as an instance's; its id. It goes with the test that made it.

        Args:
            network: Name of the network, as in the table.
        """
        made = self.rest.create(
            "port",
            network_id=self.seed.networks[network],
            fixed_ips=[{"ip_address": address}],
            device_id=owner.uuid,
            device_owner="compute:nova",
            project_id=owner.project_id,
            binding__host_id="lab",
        )
        self.created.append(made["id"])
        return str(made["id"])

    def delete_port(self, ident: str) -> None:
        self.rest.delete("port", ident)
        self.created.remove(ident)

    def forget_password(self, instance: Instance) -> None:
        """Takes away what the instance has posted as its password; Nova notices when its cache is over."""
        with contextlib.closing(
            sqlite3.connect(self.place.path / "db" / "nova_cell1.sqlite")
        ) as base:
            base.execute(
                "DELETE FROM instance_system_metadata WHERE instance_uuid = ? AND key LIKE 'password%'",
                (instance.uuid,),
            )
            base.commit()

    @contextlib.contextmanager
    def another_nova(
        self, *, secret: str | None = None, cache_s: int = _NOVA_CACHE_S
    ) -> Iterator[Nova]:
        """One more metadata API on the same databases.

        Args:
            secret: Another than the first one's.
            cache_s: For how long it keeps an instance's documents; 0 is not at all.
        """
        name = f"nova-{secrets.token_hex(3)}"
        with contextlib.ExitStack() as stack:
            nova = _nova(
                self.place,
                stack,
                name,
                self.rest.url,
                secret=secret or self.secret,
                cache_s=cache_s,
            )
            nova.server.start()
            yield nova

    def heal(self) -> None:
        """Everything runs again that a test has ended, and the ports are gone that it made."""
        self.neutron.start()
        self.nova.server.start()
        for ident in tuple(self.created):
            self.delete_port(ident)


@contextlib.contextmanager
def open_openstack(
    directory: Path | None = None, *, nova_cache_s: int = _NOVA_CACHE_S
) -> Iterator[OpenStack]:
    """A lab of its own; all of its servers have ended afterwards.

    The first of a checkout installs Nova and Neutron, which needs the network and a minute; others take seconds.

    Args:
        directory: Where it lives, and finds what another has left there; by default a new one, which goes at the end.
        nova_cache_s: For how long Nova keeps an instance's documents.
    """
    with contextlib.ExitStack() as stack:
        if directory is None:
            made = stack.enter_context(tempfile.TemporaryDirectory(prefix="imdst-openstack-"))
            directory = Path(made)
        place = Place(directory, environments())
        seed = fill(place)
        secret = secrets.token_hex(16)
        port = stack.enter_context(free_port()).getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        neutron = neutron_server(place, port=port)
        stack.callback(neutron.stop)
        neutron.launch()
        nova = _nova(place, stack, "nova", url, secret=secret, cache_s=nova_cache_s)
        nova.server.start()
        neutron.start()
        agent = agent_server(place, nova_port=int(nova.url.rpartition(":")[2]), secret=secret)
        stack.callback(agent.stop)
        front = FrontWriter(place)
        stack.callback(front.close)
        lab = OpenStack(
            place=place,
            seed=seed,
            nova=nova,
            neutron=neutron,
            rest=NeutronClient(url),
            agent=agent,
            front=front,
            lookups=lookups_of(seed),
        )
        for file, text in (
            (lab.secret_file, secret),
            (lab.clouds_yaml, render_clouds(neutron_url=url)),
        ):
            file.write_text(text)
            file.chmod(0o600)
        yield lab


def _nova(
    place: Place,
    stack: contextlib.ExitStack,
    name: str,
    neutron_url: str,
    *,
    secret: str,
    cache_s: int,
) -> Nova:
    port = stack.enter_context(free_port()).getsockname()[1]
    neutron_port = int(neutron_url.rpartition(":")[2])
    place.write_nova(name, neutron_port=neutron_port, secret=secret, cache_s=cache_s)
    server = nova_server(place, name, port=port)
    stack.callback(server.stop)
    return Nova(server, f"http://127.0.0.1:{port}", secret)


if __name__ == "__main__":
    # What is made once is made.
    with open_openstack():
        pass
