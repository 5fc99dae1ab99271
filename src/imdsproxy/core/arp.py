"""Who on this host may answer ARP for the metadata address.

Linux answers for each of its addresses on every device (`arp_ignore` 0). Once an interface listener has put
169.254.169.254 on one device, the host would answer for it on all the others too, and guests of a namespace or
bridge listener could reach the wrong place. A rule of ours keeps it from that.
"""

from __future__ import annotations

from collections.abc import Iterable

from imdsproxy.core.model import METADATA_IPV4, InterfaceListener, Network


def answering_devices(networks: Iterable[Network]) -> frozenset[str]:
    """The host's devices on which it is to answer; none where no network listens on one."""
    return frozenset(
        network.listener.device
        for network in networks
        if isinstance(network.listener, InterfaceListener)
    )


def render_arp_guard(table: str, devices: frozenset[str]) -> str:
    """An nftables script that replaces the table of that name at once; without devices it only removes it.

    Args:
        table: Our own table of family `arp`.
        devices: `answering_devices`.
    """
    # Naming it before deleting it is how nft(8) deletes what may not be there.
    script = [f"table arp {table}", f"delete table arp {table}"]
    if devices:
        names = ", ".join(f'"{name}"' for name in sorted(devices))
        script += [
            f"table arp {table} {{",
            "  chain input {",
            "    type filter hook input priority 0; policy accept;",
            f"    iifname != {{ {names} }} arp operation request arp daddr ip {METADATA_IPV4} drop",
            "  }",
            "}",
        ]
    return "\n".join(script) + "\n"
