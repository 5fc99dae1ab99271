"""All access to the operating system that is not a client of a source or of HAProxy."""
