"""Genuine Nova and Neutron on loopback, for tests; and Neutron's own metadata agent as an oracle."""

import contextlib
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from support.openstack.install import environments
from support.openstack.neutron_rest import Answer, NeutronClient, ask
from support.openstack.processes import (
    Place,
    agent_server,
    compute_server,
    neutron_server,
    nova_server,
)
from support.openstack.servers import Server, free_port
from support.openstack.settings import render_clouds
from support.openstack.table import INSTANCES, Instance, Lookup, Seed, lookups_of
from support.openstack.template import fill
from support.recorder import signature_of


@dataclass(slots=True, kw_only=True)
class OpenStack:
    """A lab that runs.

    Attributes:
        nova, neutron: The metadata API and the REST API; `start`, `stop`, `kill` are theirs.
        compute: Nova's own API; it runs once a test has started it.
        rest: Neutron's REST API.
        lookups: The table of truth.
        created: The ports that tests have made.
    """

    place: Place
    seed: Seed = field(repr=False)
    nova: Server
    nova_url: str
    secret: str
    neutron: Server
    rest: NeutronClient
    agent: Server
    compute: Server
    compute_url: str
    lookups: tuple[Lookup, ...] = field(repr=False)
    created: list[str] = field(default_factory=list, init=False)

    @property
    def servers(self) -> dict[str, Server]:
        return {
            "neutron": self.neutron,
            "nova": self.nova,
            "agent": self.agent,
            "compute": self.compute,
        }

    @property
    def neutron_url(self) -> str:
        return self.rest.url

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
        uuid: str,
        project_id: str,
        target: str,
        method: str = "GET",
        *,
        body: bytes | None = None,
        headers: Iterable[tuple[str, str]] = (),
        secret: str | None = None,
    ) -> Answer:
        """Asks Nova directly, as an agent does, rightly signed.

        Args:
            target: Path and query, as they are to be on the wire.
            headers: Beside the four of an agent.
            secret: Another than Nova's.
        """
        signed = (
            ("X-Forwarded-For", "10.0.0.5"),
            ("X-Instance-ID", uuid),
            ("X-Tenant-ID", project_id),
            ("X-Instance-ID-Signature", signature_of(secret or self.secret, uuid)),
        )
        return ask(
            self.nova_url,
            method,
            target,
            headers=(*signed, *headers),
            body=body,
            namespace=self.place.namespace,
        )

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

    def heal(self) -> None:
        """Everything runs again that a test has ended, and the ports are gone that it made."""
        self.neutron.start()
        self.nova.start()
        for ident in tuple(self.created):
            self.delete_port(ident)


@contextlib.contextmanager
def open_openstack(
    directory: Path | None = None, *, namespace: str = "", broker: str = ""
) -> Iterator[OpenStack]:
    """A lab of its own; all of its servers have ended afterwards.

    The first of a checkout installs Nova and Neutron, which needs the network and a minute; others take seconds.

    Args:
        directory: Where it lives, and finds what another has left there; by default a new one, which goes at the end.
        namespace: In which network namespace its servers run; the machine's own by default.
        broker: A message broker's URL, for agents of Neutron's.
    """
    with contextlib.ExitStack() as stack:
        if directory is None:
            made = stack.enter_context(tempfile.TemporaryDirectory(prefix="imdst-openstack-"))
            directory = Path(made)
        place = Place(directory, environments(), namespace, broker)
        seed = fill(place)
        secret = secrets.token_hex(16)
        ports = [stack.enter_context(free_port()).getsockname()[1] for _ in range(3)]
        neutron_url, nova_url, compute_url = (f"http://127.0.0.1:{port}" for port in ports)
        place.write_nova(neutron_port=ports[0], secret=secret)
        lab = OpenStack(
            place=place,
            seed=seed,
            nova=nova_server(place, port=ports[1]),
            nova_url=nova_url,
            secret=secret,
            neutron=neutron_server(place, port=ports[0]),
            rest=NeutronClient(neutron_url, namespace),
            agent=agent_server(place, nova_port=ports[1], secret=secret),
            compute=compute_server(place, port=ports[2]),
            compute_url=compute_url,
            lookups=lookups_of(seed),
        )
        for file, text in (
            (lab.secret_file, secret),
            (lab.clouds_yaml, render_clouds(neutron_url=neutron_url)),
        ):
            file.write_text(text)
            file.chmod(0o600)
        for server in lab.servers.values():
            stack.callback(server.stop)
        for server in (lab.neutron, lab.nova):
            server.launch()
        lab.heal()
        yield lab


if __name__ == "__main__":
    # What is made once is made.
    with open_openstack():
        pass
