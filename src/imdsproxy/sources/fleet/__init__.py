"""The source `fleet`: records that a hub sends to this host, and the copy of them that it serves without one."""
