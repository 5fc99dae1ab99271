"""Access to the operating system, except clients of sources and of HAProxy."""
