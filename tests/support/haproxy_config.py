"""A specification of HAProxy's configuration."""

from pathlib import Path

from imdsproxy.haproxy.layout import Layout
from imdsproxy.haproxy.rules.model import Bind, DataplaneSpec
from imdsproxy.model.entities import METADATA_IPV4, NetworkId

SPEC = DataplaneSpec(
    (Bind(NetworkId("blue"), METADATA_IPV4, 80),),
    Layout(runtime=Path("/run/x"), state=Path("/var/x")).haproxy_paths(),
)
"""One network, and everything else at its default."""
