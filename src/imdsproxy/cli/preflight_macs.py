"""Whether guests' MACs can be checked on this host, and whether bridges keep guests to theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from imdsproxy.cli.preflight import Finding
from imdsproxy.errors import HostRefused

if TYPE_CHECKING:
    from imdsproxy.anti_spoofing.bridge_ports import GuardedPort

_AREA = "macs"


def check_kernel(refusal: str) -> Finding:
    """Whether the kernel can look at guests' MACs.

    Args:
        refusal: Of `try_mac_filter`.
    """
    if not refusal:
        return Finding(_AREA, "the kernel can check them")
    return Finding(
        _AREA,
        f"the kernel cannot check them (nf_tables, netdev chains at ingress and egress): {refusal}",
        "Linux 5.16; until then networks with MACs in their records need --no-mac-check",
        HostRefused.exit_status,
    )


def checked_devices(networks: Iterable[Mapping[str, object]]) -> list[str]:
    """The devices that networks with `mac_check` name, of records as mappings; a bridge perhaps, or not."""
    found: set[str] = set()
    for network in networks:
        listener = network.get("listener")
        if network.get("mac_check", True) and isinstance(listener, Mapping):
            device = listener.get("bridge") or listener.get("interface")
            if isinstance(device, str):
                found.add(device)
    return sorted(found)


def check_bridges(bridges: Mapping[str, Sequence[GuardedPort] | None]) -> list[Finding]:
    """Whether something keeps guests to their MACs: what imdsproxy cannot see.

    Args:
        bridges: Guests' ports by bridge; `None` where the device is none.
    """
    found: list[Finding] = []
    for bridge, ports in bridges.items():
        if not ports:
            continue
        open_ports = [port.name for port in ports if not port.by]
        if open_ports:
            found.append(
                Finding(
                    _AREA,
                    f"bridge {bridge}: nothing was seen that keeps the guests on {', '.join(open_ports)} from "
                    "using another's MAC",
                    "docs/anti-spoofing.md: nwfilter's clean-traffic, a rule for the bridge, or a locked port",
                    warning=True,
                )
            )
            continue
        seen = ", ".join(f"{port.name} ({port.by})" for port in ports)
        found.append(Finding(_AREA, f"bridge {bridge}: guests are kept to their MACs: {seen}"))
    return found
