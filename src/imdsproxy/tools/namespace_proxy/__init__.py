"""`neutron-ns-metadata-proxy`: a HAProxy for one network or router, for agents that spawn one per namespace.

It is independent of the daemon: it needs no controller, and ends once HAProxy runs. Agents start hundreds, so no module
here imports more than it needs.
"""

from imdsproxy.tools.namespace_proxy.command import main
from imdsproxy.tools.namespace_proxy.proxy import (
    NetworkMetadataProxyHandler,
    ProxyDaemon,
    cleanup_config_file,
)

__all__ = ["NetworkMetadataProxyHandler", "ProxyDaemon", "cleanup_config_file", "main"]
