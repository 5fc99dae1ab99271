"""The hub of a fleet: between etcd and the hosts, each of which gets only what is placed on it."""
