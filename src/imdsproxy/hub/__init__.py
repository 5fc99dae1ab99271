"""Hub of a fleet, between etcd and the hosts; each host gets only the records of its own instances."""
