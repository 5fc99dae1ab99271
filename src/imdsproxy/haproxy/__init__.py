"""HAProxy: its rules and maps, process, sockets and files; nothing that knows sources or the host's networks."""
