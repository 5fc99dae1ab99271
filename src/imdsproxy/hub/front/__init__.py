"""HAProxy in front of a hub: its configuration, process and accounts."""
