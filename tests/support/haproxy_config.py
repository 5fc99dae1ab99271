"""HAProxy's configuration read back: its sections, and the words of their lines."""

from __future__ import annotations

import shlex
from pathlib import Path

from imdsproxy.core.haproxy.model import Bind, DataplaneSpec
from imdsproxy.core.model import METADATA_IPV4, NetworkId
from imdsproxy.dataplane.layout import Layout

SPEC = DataplaneSpec(
    (Bind(NetworkId("blue"), METADATA_IPV4, 80),),
    Layout(runtime=Path("/run/x"), state=Path("/var/x")).haproxy_paths(),
)
"""One network, and everything else at its default."""


def read_sections(text: str) -> dict[str, list[tuple[str, ...]]]:
    """The words of each line, by the header of its section; quotes are gone."""
    sections: dict[str, list[tuple[str, ...]]] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        if not line.startswith(" "):
            sections[line] = lines = []
        else:
            lines.append(tuple(shlex.split(line)))
    return sections
