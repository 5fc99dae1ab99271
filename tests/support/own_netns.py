"""A /run/netns of the test process's own: what lists or removes namespaces by their names meets no other process's.

The genuine neutron-l3-agent removes each `qrouter-` namespace that it does not know, for one.
"""

import os
import subprocess
from typing import Final

from imdsproxy.host.process import call_libc
from support.lab import NETNS

_CLONE_NEWNS: Final = 0x20000
# Shared, as `ip netns` has it: programs with mounts of their own see namespaces that come later.
_MOUNT: Final = """
mount --make-rslave /
mount -t tmpfs -o mode=755 netns "$0"
mount --make-shared "$0"
"""


def take_own_netns() -> None:
    """Give this thread, and all that it starts from now on, mounts of its own with an empty /run/netns; root only."""
    if os.geteuid() == 0:
        NETNS.mkdir(parents=True, exist_ok=True)
        call_libc("unshare", _CLONE_NEWNS)
        subprocess.run(["/bin/sh", "-euc", _MOUNT, str(NETNS)], check=True)
