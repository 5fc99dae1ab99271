"""Programs that an operator or another program runs once; nothing that the daemon runs."""
