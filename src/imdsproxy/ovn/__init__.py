"""Networks of OVN on this host: each one's namespace and port on the integration bridge, and the heartbeat."""
