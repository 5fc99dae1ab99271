"""The hub's side of hosts and of other hubs: streams, changes in force, token keys, passwords; no routes."""
