"""Listeners: what HAProxy binds in each network, what the host needs for it, and what watches over it."""
