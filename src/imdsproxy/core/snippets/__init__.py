"""What a hypervisor must show a guest so that it asks for metadata, and the way there.

cloud-init runs `ds-identify` before anything else and stays off unless the machine looks like a cloud. What it
looks at is SMBIOS, or for containers the environment and the command line of process 1. `plan_gate` says what
must be seen for a dialect, `plan_route` how 169.254.169.254 is reached, and a module a target renders both in
the words of QEMU, libvirt, Proxmox or Incus.
"""

from __future__ import annotations

from imdsproxy.core.snippets.gate import (
    PREFERENCE,
    Gate,
    choose_dialect,
    looks_like_amazon,
    plan_gate,
)
from imdsproxy.core.snippets.model import Guest, Nic, Part, Snippet, Target
from imdsproxy.core.snippets.render import render_snippet, render_text
from imdsproxy.core.snippets.route import NoRoute, OnLink, Route, SomebodyElses, plan_route

__all__ = [
    "Gate",
    "Guest",
    "Nic",
    "NoRoute",
    "OnLink",
    "PREFERENCE",
    "Part",
    "Route",
    "Snippet",
    "SomebodyElses",
    "Target",
    "choose_dialect",
    "looks_like_amazon",
    "plan_gate",
    "plan_route",
    "render_snippet",
    "render_text",
]
