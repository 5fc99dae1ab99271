"""Programs that run once, for an operator or another program; nothing that the daemon runs."""
