"""HAProxy's configuration as typed values and as text, and parsers of its answers. Pure."""
