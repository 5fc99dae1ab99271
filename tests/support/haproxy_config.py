"""A specification of HAProxy's configuration."""

from pathlib import Path

from imdsproxy.core.haproxy.model import Bind, DataplaneSpec
from imdsproxy.core.model import METADATA_IPV4, NetworkId
from imdsproxy.dataplane.layout import Layout

SPEC = DataplaneSpec(
    (Bind(NetworkId("blue"), METADATA_IPV4, 80),),
    Layout(runtime=Path("/run/x"), state=Path("/var/x")).haproxy_paths(),
)
"""One network, and everything else at its default."""
