"""Acting on HAProxy: its process, its sockets, its files."""
