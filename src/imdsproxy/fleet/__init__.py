"""Formats that hubs, hosts and etcd exchange: keys, values and lines of streams. Pure; hub and sources/fleet act."""
