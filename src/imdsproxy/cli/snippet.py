"""`imdsproxy snippet`: what a hypervisor must show a guest so that it asks."""

from __future__ import annotations

import socket as sockets
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from imdsproxy.cli import completers, options
from imdsproxy.core.model import Dialect, Upstream
from imdsproxy.core.snippets.plan import Target
from imdsproxy.errors import RequestRefused

if TYPE_CHECKING:
    from collections.abc import Mapping

    from imdsproxy.cli.admin_client import AdminClient
    from imdsproxy.core.model import Instance, IpAddress, Network, Port
    from imdsproxy.core.snippets.plan import Guest, Nic, Snippet

InstanceName: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="INSTANCE", help="The instance's id or name.", autocompletion=completers.instances
    ),
]
For: TypeAlias = Annotated[
    Target,
    typer.Option(
        "--for",
        metavar="|".join(Target),
        help="The hypervisor to write it for.",
        show_default=False,
    ),
]
WantedDialect: TypeAlias = Annotated[
    Dialect | None,
    typer.Option(
        "--dialect",
        metavar="|".join(Dialect),
        help="Which documents the guest is to ask for; without it openstack, nocloud for Incus, "
        "or what the instance has.",
        show_default=False,
    ),
]


@options.command
def snippet(
    run: options.Invocation,
    instance: InstanceName,
    target: For,
    *,
    dialect: WantedDialect = None,
) -> None:
    """The SMBIOS, NIC and route that make a stock image ask for this instance's metadata."""
    from imdsproxy.core.snippets.targets import render_snippet, render_text  # noqa: PLC0415 - `--help`

    guest = _guest(run.daemon(), instance)
    made = render_snippet(guest, target, _dialect(guest, instance, target, dialect))
    if run.output.as_json:
        run.output.json(_shape(instance, made))
    else:
        run.output.text(render_text(made))


def _dialect(guest: Guest, instance: str, target: Target, wanted: Dialect | None) -> Dialect:
    from imdsproxy.core.snippets.plan import choose_dialect  # noqa: PLC0415 - `--help` need not load it

    had = ", ".join(sorted(guest.dialects)) or "none"
    if wanted is not None and wanted not in guest.dialects:
        raise RequestRefused(
            f"instance {instance} has no {wanted} documents (it has: {had})",
            hint="omit --dialect, or turn it on with `imdsproxy instance set`",
        )
    chosen = wanted or choose_dialect(target, guest.dialects)
    if chosen is None:
        raise RequestRefused(
            f"instance {instance} has no documents to ask for",
            hint=f"`imdsproxy instance set {instance} --openstack` turns a dialect on",
        )
    return chosen


def _guest(daemon: AdminClient, name: str) -> Guest:
    from imdsproxy.cli.record_files import read_instance  # noqa: PLC0415 - `--help` need not load it
    from imdsproxy.core.snippets.plan import Guest  # noqa: PLC0415 - as above

    instance = read_instance(daemon, name)
    nics = [_nic(daemon, port) for port in instance.ports]
    return Guest(instance.name, instance.uuid, _dialects(instance), tuple(nics))


def _dialects(instance: Instance) -> frozenset[Dialect]:
    if instance.upstream is Upstream.NOVA:
        return frozenset({Dialect.OPENSTACK, Dialect.EC2})
    return instance.dialects


def _nic(daemon: AdminClient, port: Port) -> Nic:
    from imdsproxy.cli.record_files import read_network  # noqa: PLC0415 - `--help` need not load it
    from imdsproxy.core.snippets.plan import Nic, plan_route  # noqa: PLC0415 - as above

    network = read_network(daemon, port.network)
    return Nic(port.network, port.mac, _bridge(network), plan_route(network, _host_has))


def _bridge(network: Network) -> str | None:
    from imdsproxy.core.model import BridgeListener, InterfaceListener  # noqa: PLC0415 - `--help`

    match network.listener:
        case BridgeListener(bridge):
            return bridge
        case InterfaceListener(device):
            return device
        case _:
            return None


def _host_has(address: IpAddress) -> bool:
    """Whether an address is this host's own: only those can be bound."""
    family = sockets.AF_INET6 if address.version == 6 else sockets.AF_INET  # noqa: PLR2004
    with sockets.socket(family, sockets.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True


def _shape(instance: str, made: Snippet) -> Mapping[str, object]:
    return {
        "instance": instance,
        "for": made.target.value,
        "dialect": made.dialect.value,
        "parts": [
            {"kind": part.kind, "place": part.place, "text": part.text} for part in made.parts
        ],
    }
