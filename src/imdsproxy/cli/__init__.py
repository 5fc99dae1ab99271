"""Command line: one module per command; what a command does is in the daemon or in tools."""
