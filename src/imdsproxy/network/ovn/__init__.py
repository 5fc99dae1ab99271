"""OVN's networks on this host: their namespaces and ports on the integration bridge, and the heartbeat."""
