"""Idle program that Neutron's DHCP agent starts instead of HAProxy. Pure.

The agent starts `haproxy -f …/ns-metadata-proxy/UUID.conf`. It expects a process whose pid is in the pid file that
UUID.conf names, and whose command line contains the uuid (`ProcessManager` in neutron/agent/linux/external_process.py).
The stand-in is such a process; it needs 0.2 MB and ends on SIGTERM. All other calls of `haproxy` run HAProxy.
"""

from typing import Final

STAND_IN: Final = "imdsproxy-for-haproxy"
"""First word of a stand-in's command line."""

_MARK: Final = "# Made by `imdsproxy takeover dhcp`; `imdsproxy handback dhcp` removes it."


def is_stand_in(text: str) -> bool:
    """Return whether the text of a program is a stand-in's."""
    return _MARK in text


def render_stand_in(haproxy: str) -> str:
    """Return the stand-in as a bash script.

    Args:
        haproxy: Path of HAProxy.
    """
    return f"""\
#!/bin/bash
{_MARK}
# For Neutron's DHCP agent, whose networks imdsproxy serves: a process that does nothing. All else is HAProxy.
if [[ $1 == -f && $2 == */ns-metadata-proxy/*.conf ]] && grep -q '^ *bind 169\\.254\\.169\\.254:80$' "$2"; then
    pid_file=$(sed -n 's/^ *pidfile  *//p' "$2")
    [[ -n $pid_file ]] || exit 1
    setsid bash -c 'echo $$ >"$1" && exec -a "$3 $2" sleep infinity' bash "$pid_file" "$2" {STAND_IN} \\
        </dev/null >/dev/null 2>&1 &
    exit 0
fi
exec {haproxy} "$@"
"""
