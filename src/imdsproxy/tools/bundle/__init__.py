"""`imdsproxy bundle`: one file with a host's state for other people, without secrets."""
