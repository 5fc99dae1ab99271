"""Hub of a fleet, between etcd and the hosts; the host's side is in sources/fleet."""
