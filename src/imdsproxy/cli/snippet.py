"""`imdsproxy snippet`: hypervisor configuration that makes a guest request metadata."""

import socket
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated

from imdsproxy.api.client import path_to, read_record
from imdsproxy.cli import options
from imdsproxy.errors import RequestRefused
from imdsproxy.model.entities import Dialect, IpAddress
from imdsproxy.model.records import parse_instance, parse_network
from imdsproxy.tools import snippets


@options.host_command
def snippet(
    run: options.Invocation,
    instance: options.Instance,
    target: Annotated[
        snippets.Target,
        options.flag(f"--for {'|'.join(snippets.Target)}", "The hypervisor of the guest."),
    ],
    *,
    dialect: Annotated[
        Dialect | None,
        options.flag(
            f"--dialect {'|'.join(Dialect)}",
            "Documents that the guest requests (default: openstack; nocloud for Incus; or a dialect that the "
            "instance has).",
        ),
    ] = None,
) -> None:
    """Print the SMBIOS, NIC and route settings that make a stock image request this instance's metadata."""
    daemon = run.daemon()
    shape = daemon.get(path_to("instances", instance))
    record = read_record("instance", parse_instance, shape["record"])
    networks = {}
    for port in record.ports:
        shape = daemon.get(path_to("networks", port.network))
        networks[port.network] = read_record("network", parse_network, shape["record"])
    dialects = record.served
    if dialect is not None and dialect not in dialects:
        raise RequestRefused(
            f"instance {instance} has no {dialect} documents (it has: {', '.join(sorted(dialects)) or 'none'})",
            hint="omit --dialect, or enable the dialect with `imdsproxy instance set`",
        )
    chosen = dialect or snippets.choose_dialect(target, dialects)
    if chosen is None:
        raise RequestRefused(
            f"instance {instance} has no documents",
            hint=f"enable a dialect, as `imdsproxy instance set {instance} --openstack`",
        )
    parts = snippets.render_snippet(record, networks, target, chosen, _host_has)
    answer = {
        "instance": instance,
        "for": target,
        "dialect": chosen,
        "parts": [asdict(part) for part in parts],
    }
    run.output.answer(answer, snippets.render_text(target, parts))


def _host_has(address: IpAddress) -> bool:
    """Return whether this host has an address, by trying to bind the address."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET  # noqa: PLR2004
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((str(address), 0))
        return True
    return False
