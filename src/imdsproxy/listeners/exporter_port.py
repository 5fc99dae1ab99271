"""HAProxy's exporter must not cost guests their answers: it is left out where its port is taken.

HAProxy starts with all of its binds or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from imdsproxy.errors import Problem

_BIND: Final = re.compile(r"^\s*bind (\S+) name exporter\b", re.MULTILINE)


@dataclass(slots=True)
class ExporterPort:
    """Whether the exporter's address can be bound.

    Args:
        trial: Binds an address and port and lets go again; why that is refused, `None` if it is not.

    Attributes:
        in_force: What the running HAProxy has bound; it cannot be tried.
    """

    trial: Callable[[str, int], str | None]
    in_force: str | None = None

    def adopt(self, config: str) -> None:
        """Take over what a HAProxy that runs already was configured with."""
        found = _BIND.search(config)
        self.in_force = None if found is None else found[1]

    def choose(self, wanted: str | None) -> tuple[str | None, Problem | None]:
        """The address to bind, and why a wanted one is not bound."""
        if wanted is None or wanted == self.in_force:
            return wanted, None
        host, _, port = wanted.rpartition(":")
        refused = self.trial(host.strip("[]"), int(port))
        if refused is None:
            return wanted, None
        return None, Problem(
            "metrics.haproxy_listen",
            f"HAProxy's exporter is left out: {refused}",
            "free the port, or choose another; guests are served all the same",
        )
