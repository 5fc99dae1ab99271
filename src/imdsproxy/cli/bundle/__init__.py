"""`imdsproxy bundle`: one file that shows a host's state to others, without its secrets."""
