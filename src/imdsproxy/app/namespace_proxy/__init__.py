"""`neutron-ns-metadata-proxy`: one network's or router's own HAProxy, for agents that spawn one per namespace.

Apart from the daemon: it needs no controller, and is gone once HAProxy runs. Agents start it by the
hundred, so nothing here imports what it does not need.
"""

from imdsproxy.app.namespace_proxy.command import main
from imdsproxy.app.namespace_proxy.proxy import (
    NetworkMetadataProxyHandler,
    ProxyDaemon,
    cleanup_config_file,
)

__all__ = ["NetworkMetadataProxyHandler", "ProxyDaemon", "cleanup_config_file", "main"]
