"""A genuine DHCP client in a guest, which then has what the lease names and nothing else."""

from pathlib import Path
from typing import Final

from support.lab import ip, run, within

_SCRIPT: Final = """#!/bin/sh
# Does with a lease what Debian's own script does, for a namespace.
case $1 in
bound | renew)
    ip -4 address flush dev "$interface"
    ip address add "$ip/$mask" dev "$interface"
    if [ -n "$staticroutes" ]; then
        set -- $staticroutes
        while [ $# -ge 2 ]; do
            case $2 in
            0.0.0.0) ip route replace "$1" dev "$interface" ;;
            *) ip route replace "$1" via "$2" dev "$interface" ;;
            esac
            shift 2
        done
    else
        for gateway in $router; do ip route replace default via "$gateway" dev "$interface"; done
    fi
    ;;
esac
"""


def take_lease(namespace: str, directory: Path) -> str:
    """Have a guest ask for its address by DHCP; the address.

    Args:
        directory: Where the client's script is put.
    """
    script = directory / "udhcpc.sh"
    script.write_text(_SCRIPT)
    script.chmod(0o755)
    words = ("udhcpc", "-i", "eth0", "-n", "-q", "-f", "-t", "10", "-T", "1", "-O", "staticroutes")
    run(*within(namespace), *words, "-s", str(script))
    found = ip("-n", namespace, "-br", "-4", "address").splitlines()
    (line,) = [one for one in found if "eth0" in one]
    return line.split()[2].partition("/")[0]
