"""Genuine Nova and Neutron on loopback, for tests; and Neutron's own metadata agent as an oracle."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from support.openstack.front import FrontWriter
from support.openstack.install import environments
from support.openstack.neutron_rest import Answer, NeutronClient, Refused, ask
from support.openstack.processes import Place, agent_server, neutron_server, nova_server
from support.openstack.servers import Server, free_port
from support.openstack.settings import render_clouds
from support.openstack.table import INSTANCES, Instance, Lookup, Port, Seed, lookups_of
from support.openstack.template import fill

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
        nova, neutron: The servers; `stop`, `kill`, `pause`, `resume`, `restart` are theirs.
        rest: Neutron's REST API.
        lookups: The table of truth.
        secret_file: The secret alone, as imdsproxy reads it.
        clouds_yaml: For openstacksdk; the cloud is named `lab`.
        front: Writes the HAProxy configurations of Neutron's agents.
    """

    place: Place
    seed: Seed = field(repr=False)
    nova: Nova
    neutron: Server
    neutron_url: str
    rest: NeutronClient
    lookups: tuple[Lookup, ...] = field(repr=False)
    agent: Server
    secret_file: Path
    clouds_yaml: Path
    front: FrontWriter
    created: list[str] = field(default_factory=list, init=False)
    instances: Mapping[str, Instance] = field(
        default_factory=lambda: {one.name: one for one in INSTANCES}, repr=False
    )

    @property
    def nova_url(self) -> str:
        return self.nova.url

    @property
    def secret(self) -> str:
        return self.nova.secret

    def lookup(self, name: str) -> Lookup:
        """The row with that name, one of `LOOKUP_NAMES`."""
        return next(row for row in self.lookups if row.name == name)

    def ports_of(self, instance: Instance) -> tuple[Port, ...]:
        wanted = (instance.uuid, instance.project_id)
        return tuple(
            one for one in self.seed.ports if (one.plan.device_id, one.plan.project_id) == wanted
        )

    def ask_nova(
        self,
        instance: Instance | str,
        project_id: str | None = None,
        path: str = "/latest/meta-data/",
        method: str = "GET",
        *,
        body: bytes | None = None,
        headers: Iterable[tuple[str, str]] = (),
        address: str = "10.0.0.5",
        secret: str | None = None,
        url: str | None = None,
    ) -> Answer:
        """Asks Nova directly, as an agent does, rightly signed.

        Args:
            instance: It, or the uuid of one that there may not be.
            project_id: The instance's, if not given.
            path: Path and query, as they are to be on the wire.
            headers: Beside the four of an agent.
            secret, url: Of another Nova than the first.
        """
        uuid = instance if isinstance(instance, str) else instance.uuid
        if project_id is None:
            project_id = "" if isinstance(instance, str) else instance.project_id
        key = (self.secret if secret is None else secret).encode()
        signed = (
            ("X-Forwarded-For", address),
            ("X-Instance-ID", uuid),
            ("X-Tenant-ID", project_id),
            ("X-Instance-ID-Signature", hmac.new(key, uuid.encode(), hashlib.sha256).hexdigest()),
        )
        return ask(url or self.nova_url, method, path, headers=(*signed, *headers), body=body)

    def ask_agent(
        self,
        path: str,
        method: str = "GET",
        *,
        headers: Iterable[tuple[str, str]],
        body: bytes | None = None,
    ) -> Answer:
        """Asks Neutron's own metadata agent, as the HAProxy of a namespace does.

        Args:
            headers: Beside Host; the agent wants X-Forwarded-For and one scope (see `Lookup.scope_header`).

        Raises:
            http.client.HTTPException: It closed the connection instead of answering, as it does with nonsense.
        """
        socket = self.start_agent()
        return ask(f"unix:{socket}", method, path, headers=headers, body=body)

    def create_port(
        self, network: str, *addresses: str, device_id: str, project_id: str, **attributes: object
    ) -> dict[str, Any]:
        """A new port as an instance's; Neutron's answer. It goes with the test that made it.

        Args:
            network: Name of the network, as in the table.
            addresses: Which ones; Neutron chooses if there are none.
            attributes: More, `__` for a colon.
        """
        if addresses:
            attributes["fixed_ips"] = [{"ip_address": address} for address in addresses]
        made = self.rest.create(
            "port",
            network_id=self.seed.networks[network],
            device_id=device_id,
            device_owner="compute:nova",
            project_id=project_id,
            binding__host_id="lab",
            **attributes,
        )
        self.created.append(made["id"])
        return made

    def update_port(self, ident: str, **attributes: object) -> dict[str, Any]:
        return self.rest.update("port", ident, **attributes)

    def delete_port(self, ident: str) -> None:
        self.rest.delete("port", ident)
        if ident in self.created:
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

    def start_agent(self) -> Path:
        """Starts Neutron's own metadata agent, if it does not run; its unix socket."""
        if not self.agent.running:
            self.place.agent_socket.unlink(missing_ok=True)
            self.agent.start()
        return self.place.agent_socket

    @contextlib.contextmanager
    def another_nova(
        self,
        *,
        secret: str | None = None,
        cache_s: int = _NOVA_CACHE_S,
    ) -> Iterator[Nova]:
        """One more metadata API on the same databases.

        Args:
            secret: Another than the first one's.
            cache_s: For how long it keeps an instance's documents; 0 is not at all.
        """
        with contextlib.ExitStack() as stack:
            nova = _nova(
                self.place,
                stack,
                name=f"nova-{secrets.token_hex(3)}",
                neutron_url=self.neutron_url,
                secret=self.secret if secret is None else secret,
                cache_s=cache_s,
            )
            nova.server.start()
            yield nova

    def heal(self) -> None:
        """Everything runs again that a test has ended or paused, and the ports are gone that it made."""
        for server in (self.neutron, self.nova.server, self.agent):
            server.resume()
        for server in (self.neutron, self.nova.server):
            if not server.running:
                server.start()
        for ident in tuple(self.created):
            try:
                self.delete_port(ident)
            except Refused as refused:
                # The test has deleted it by other means.
                if refused.answer.status != HTTPStatus.NOT_FOUND:
                    raise
                self.created.remove(ident)


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
        installed = environments()
        stack.callback(installed.made.release)
        if directory is None:
            made = stack.enter_context(tempfile.TemporaryDirectory(prefix="imdst-openstack-"))
            directory = Path(made)
        place = Place(directory, installed)
        seed = fill(place)
        secret = secrets.token_hex(16)
        holder = stack.enter_context(free_port())
        port = holder.getsockname()[1]
        neutron_url = f"http://127.0.0.1:{port}"
        neutron = neutron_server(place, port=port)
        stack.callback(neutron.stop)
        neutron.launch()
        nova = _nova(
            place, stack, name="nova", neutron_url=neutron_url, secret=secret, cache_s=nova_cache_s
        )
        nova.server.launch()
        neutron.wait_up()
        nova.server.wait_up()
        agent = agent_server(place, nova_port=int(nova.url.rpartition(":")[2]), secret=secret)
        stack.callback(agent.stop)
        front = FrontWriter(place)
        stack.callback(front.close)
        secret_file, clouds = place.path / "secret", place.path / "clouds.yaml"
        secret_file.write_text(secret)
        clouds.write_text(render_clouds(neutron_url=neutron_url))
        for file in (secret_file, clouds):
            file.chmod(0o600)
        yield OpenStack(
            place=place,
            seed=seed,
            nova=nova,
            neutron=neutron,
            neutron_url=neutron_url,
            rest=NeutronClient(neutron_url),
            lookups=lookups_of(seed),
            agent=agent,
            secret_file=secret_file,
            clouds_yaml=clouds,
            front=front,
        )


def _nova(
    place: Place,
    stack: contextlib.ExitStack,
    *,
    name: str,
    neutron_url: str,
    secret: str,
    cache_s: int,
) -> Nova:
    holder = stack.enter_context(free_port())
    port = holder.getsockname()[1]
    neutron_port = int(neutron_url.rpartition(":")[2])
    place.write_nova(name, neutron_port=neutron_port, secret=secret, cache_s=cache_s)
    server = nova_server(place, name, port=port)
    stack.callback(server.stop)
    return Nova(server, f"http://127.0.0.1:{port}", secret)


if __name__ == "__main__":
    # What is made once is made.
    with open_openstack():
        pass
