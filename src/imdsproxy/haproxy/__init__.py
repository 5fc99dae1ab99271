"""HAProxy: its configuration and maps (rules), process, sockets and files; nothing that knows sources or networks."""
