"""Listeners: HAProxy's binds in each network, the host objects for them, and the watch of the host."""
