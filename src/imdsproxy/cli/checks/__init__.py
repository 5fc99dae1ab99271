"""What `imdsproxy check` looks at; loaded by that command alone."""
