"""Control of HAProxy: its process, sockets and files."""
