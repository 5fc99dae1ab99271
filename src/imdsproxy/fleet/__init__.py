"""Formats that hubs, hosts and etcd exchange: keys and values of the store, and lines of a host's stream."""
