"""`imdsproxy snippet`: what a hypervisor must show a guest so that it asks."""

from __future__ import annotations

import socket as sockets
from dataclasses import asdict
from typing import Annotated

from imdsproxy.cli import options
from imdsproxy.cli.admin_client import AdminClient, path_to
from imdsproxy.cli.record_io import read_record
from imdsproxy.core.model import Dialect, IpAddress, Port, Upstream
from imdsproxy.core.records import parse_instance, parse_network
from imdsproxy.core.snippets import Guest, Nic, Target, choose_dialect, plan_nic
from imdsproxy.core.snippets.targets import render_snippet, render_text
from imdsproxy.errors import RequestRefused


@options.command
def snippet(
    run: options.Invocation,
    instance: options.Instance,
    target: Annotated[
        Target,
        options.flag("--for", "|".join(Target), "The hypervisor to write it for."),
    ],
    *,
    dialect: Annotated[
        Dialect | None,
        options.flag(
            "--dialect",
            "|".join(Dialect),
            "Which documents the guest is to ask for; without it openstack, nocloud for Incus, "
            "or what the instance has.",
        ),
    ] = None,
) -> None:
    """The SMBIOS, NIC and route that make a stock image ask for this instance's metadata."""
    guest = _guest(run.daemon(), instance)
    made = render_snippet(guest, target, _dialect(guest, instance, target, dialect))
    shape = {
        "instance": instance,
        "for": made.target.value,
        "dialect": made.dialect.value,
        "parts": [asdict(part) for part in made.parts],
    }
    run.output.answer(shape, lambda output, _: output.text(render_text(made)))


def _dialect(guest: Guest, instance: str, target: Target, wanted: Dialect | None) -> Dialect:
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
    instance = read_record(
        "instance", parse_instance, daemon.get(path_to("instances", name))["record"]
    )
    dialects = instance.dialects
    if instance.upstream is Upstream.NOVA:
        dialects = frozenset({Dialect.OPENSTACK, Dialect.EC2})
    nics = tuple(_nic(daemon, port) for port in instance.ports)
    return Guest(instance.name, instance.uuid, dialects, nics)


def _nic(daemon: AdminClient, port: Port) -> Nic:
    shape = daemon.get(path_to("networks", port.network))
    return plan_nic(read_record("network", parse_network, shape["record"]), port.mac, _host_has)


def _host_has(address: IpAddress) -> bool:
    """Whether an address is this host's own: only those can be bound."""
    family = sockets.AF_INET6 if address.version == 6 else sockets.AF_INET  # noqa: PLR2004
    with sockets.socket(family, sockets.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True
