"""The source `fleet`: records that a hub sends to this host, and the local copy that is served without a hub."""
